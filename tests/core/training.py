"""What the tests of training share: data of random ids, real steps of real objectives, a step that is interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig, fit
from pertoken.core.run import completions_stats
from pertoken.core.step import REFERENCE, ObjectiveStep
from pertoken.train.dpo import DPO
from tests import tiny
from tests.methods.one_pass import exact_lm

FIRST_ROW = 100  # rows are not places


def make_groups(
    lm: LM, n: int = 10, kind: str = "pair", seed: int = 0, reference: LM | None = None, **sizes: int
) -> list[Group]:
    """n groups of random ids, rows numbered from FIRST_ROW, with log-probs of `reference` (default: `lm`)."""
    k = 2 if kind == "pair" else 1
    out = []
    for i, traces in enumerate(tiny.groups(lm, n=n, k=k, seed=seed, **sizes)):
        label = i % 2 == 0 if kind == "unpaired" else None
        example = Example(prompt=f"p{i}", responses=("r",) * k, kind=kind, label=label, row=FIRST_ROW + i)
        out.append(Group(example=example, prompt_ids=traces[0].prompt_ids, traces=tuple(traces)))
    return with_reference(out, reference or lm)


def with_reference(groups: Sequence[Group], lm: LM) -> list[Group]:
    """The groups with log-probs of `lm` as their column."""
    for group in groups:
        group.add_column(REFERENCE, [s["logp"] for s in completions_stats(lm, group.traces)])
    return list(groups)


class Stop(ObjectiveStep):
    """A step that is interrupted before its `after`-th update."""

    after: int | None = None

    def run(self, rows: list[int], *, train: bool) -> Any:
        if train and self.after is not None:
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
        return super().run(rows, train=train)


def dpo_step(n: int = 10, reference: int = 0, **options: Any) -> Stop:
    """DPO of a fresh exact model on pairs, two of them held out; the seed of the reference."""
    lm = exact_lm()
    groups = make_groups(lm, n + 2, reference=exact_lm(reference))
    return Stop(DPO(beta=0.5), lm, groups[:n], held_out=groups[n:], **options)


def config(**changes: Any) -> LoopConfig:
    """A short run that learns fast."""
    return LoopConfig(**({"lr": 3e-3, "batch_size": 4, "epochs": 2, "seed": 3, "warmup": 0.2} | changes))


def train(step: ObjectiveStep, out: Path, settings: LoopConfig | None = None, **options: Any) -> list[dict[str, float]]:
    """`fit` without a bar."""
    return fit(step, settings or config(), out, progress=False, **options)


def timeless(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """A history without its seconds."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def log(out: Path) -> list[dict[str, float]]:
    """What log.jsonl holds, without seconds."""
    return timeless([json.loads(line) for line in (out / "log.jsonl").read_text("utf8").splitlines()])


def weights(step: ObjectiveStep) -> dict[str, torch.Tensor]:
    """Copies of all that is trained."""
    return {f"{m}.{n}": p.detach().clone() for m, module in step.modules.items() for n, p in module.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).detach().abs().max()) for k in a)


def assert_close(a: Sequence[dict[str, float]], b: Sequence[dict[str, float]], tolerance: float) -> None:
    """Two histories agree in every figure."""
    assert len(a) == len(b)
    for x, y in zip(timeless(a), timeless(b)):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_allclose(x[key], y[key], rtol=tolerance, atol=tolerance, err_msg=f"{key}, {x['step']}")
