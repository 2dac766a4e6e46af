"""What one training step of each objective costs, in time and memory, relative to plain DPO on the same pack.

For every objective of the catalog that takes pairs, in one process: a step of DPO (forward, backward, clipping, AdamW),
a step of the objective on the same pairs, and so on in turn, so that both meet the machine in the same state. Columns
that preparation would add hold random values of their shape; helper models (a live reference, AlignDistil's teachers)
are frozen copies of SmolLM2. Preparation itself (helper models, scoring) is not in these times: a run's record says
what it took.

Memory: the most that torch's allocator held at any moment of a step, less what was held before it (all weights and
optimizer states) and less the gradients, in a step of its own that is not timed.

    python benchmarks/objectives.py              five timed steps of two pairs (HH when PERTOKEN_DATA is set)
    python benchmarks/objectives.py --only tdpo sparsepo aligndistil
    python benchmarks/objectives.py --quick      one step each: does it run?
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from _pairs import draw_pairs
from _profiled import Profiled
from _trl import now

from pertoken import catalog
from pertoken.core.data import Group
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig, apply_gradients, make_accelerator, make_optimizer
from pertoken.core.run import add_reference_logps
from pertoken.core.step import ObjectiveStep, live_models
from pertoken.results import save_result

FULL_VOCABULARY = ("tdpo", "sparsepo", "aligndistil")
TIME, MEMORY = 2.5, 1.5
CONFIG = LoopConfig(lr=1e-6)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    repeats: int = 5
    """Timed steps of each objective, each beside one of DPO."""
    batch: int = 2
    """Pairs a step."""
    only: tuple[str, ...] = ()
    """Objectives to measure (default: all that take pairs)."""
    model: str = "smollm2"
    threads: int = 2
    seed: int = 0
    quick: bool = False
    """One timed step each."""
    save: bool = False
    """Write results/objectives.json."""


class Side:
    """One objective on the batch, ready to step."""

    def __init__(self, slug: str, groups: Sequence[Group], options: Options, frozen: LM):
        self.objective = catalog.method(slug)()
        given = [self._with_columns(g, options.seed) for g in groups]
        policy = load(options.model)
        self.accelerator = make_accelerator(CONFIG, tempfile.gettempdir())
        torch.manual_seed(options.seed)
        others = {name: frozen for name in live_models(self.objective)}
        self.step = ObjectiveStep(self.objective, policy, given, others=others, accelerator=self.accelerator)
        self.optimizer = make_optimizer(self.step.modules, CONFIG)
        trained = [p for m in self.step.modules.values() for p in m.parameters() if p.requires_grad]
        self.gradients = sum(p.numel() * p.element_size() for p in trained)

    def _with_columns(self, group: Group, seed: int) -> Group:
        make = getattr(type(self.objective), "example_columns", None)
        out = dataclasses.replace(group, columns=dict(group.columns))
        if make is not None:
            mask = np.zeros((len(group.traces), max(map(len, group.traces))), bool)
            for k, trace in enumerate(group.traces):
                mask[k, : len(trace)] = trace.mask
            columns = make(np.random.default_rng((seed, group.example.row)), torch.from_numpy(mask))
            for name, rows in columns.items():
                if not rows.ndim:
                    out.add_column(name, float(rows))
                    continue
                entries = [np.asarray(row) for row in rows]
                whole = [e[: len(t)] if e.ndim else float(e) for e, t in zip(entries, group.traces, strict=True)]
                out.add_column(name, whole)
        return out

    def __call__(self) -> float:
        """Seconds of one whole step."""
        begin = now()[0]
        self.optimizer.zero_grad(set_to_none=True)
        result = self.step.run(list(range(self.step.size)), train=True)
        apply_gradients(self.optimizer, self.accelerator, result.count, CONFIG.lr, CONFIG.max_grad_norm)
        return now()[0] - begin

    def peak(self) -> int:
        """Bytes above weights, gradients and optimizer state, at most."""
        self.optimizer.zero_grad(set_to_none=True)  # what was made before the profiler would be freed inside of it
        held = Profiled(self.gradients, "cpu")
        with held():
            self()
        return held.peak


def main(options: Options) -> None:
    """Measure, print, and write the result if asked to."""
    torch.set_num_threads(options.threads)
    rows = [m for m in catalog.methods() if m.room == "train" and m.data == "pairs" and m.family != "reinforcement"]
    slugs = options.only or [m.slug for m in rows]
    frozen = load(options.model).reference()
    groups, what = draw_pairs(frozen, options.batch, options.seed)
    add_reference_logps(groups, frozen)
    load_before = os.getloadavg()[0]
    print(f"{len(groups)} {what} a step; {options.threads} threads, load {load_before:.1f}")
    base = Side("dpo", groups, options, frozen)
    base()
    base_peak = base.peak()
    print(f"{'objective':<22}{'seconds':>9}{'DPO':>8}{'time':>7}{'MiB':>8}{'DPO':>8}{'memory':>8}   time, 95 %")
    rows: list[dict[str, Any]] = []
    for slug in slugs:
        if slug == "dpo":
            continue
        side = Side(slug, groups, options, frozen)
        side()  # warm-up
        times = np.array([(base(), side()) for _ in range(1 if options.quick else options.repeats)])
        peak = side.peak()
        ratios = times[:, 1] / times[:, 0]
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(ratios, (10_000, len(ratios))), 1)
        interval = [float(v) for v in np.percentile(medians, (2.5, 97.5))]
        ratio, (dpo, own) = float(np.median(ratios)), np.median(times, 0)
        rows.append(
            {
                "metric": f"{slug}: time of a step over DPO's",
                "value": ratio,
                "interval": interval,
                "baseline": "DPO",
                "baseline_value": 1.0,
            }
        )
        rows.append({"metric": f"{slug}: memory of a step over DPO's", "value": peak / base_peak})
        print(
            f"{slug:<22}{own:9.2f}{dpo:8.2f}{ratio:7.2f}{peak / 2**20:8.0f}{base_peak / 2**20:8.0f}"
            f"{peak / base_peak:8.2f}   {interval[0]:.2f} to {interval[1]:.2f}"
        )
        del side
    measured = {row["metric"]: row["value"] for row in rows}
    full = [s for s in FULL_VOCABULARY if s in slugs]
    times = [measured[f"{s}: time of a step over DPO's"] for s in full]
    peaks = [measured[f"{s}: memory of a step over DPO's"] for s in full]
    if full:
        print(f"\nfull-vocabulary objectives: time at most {max(times):.2f}, memory at most {max(peaks):.2f} of DPO's")
    if options.save:
        worst = int(np.argmax(times))
        save_result(
            "objectives",
            metric="time of a training step over plain DPO's, the slowest full-vocabulary objective (less is better)",
            value=times[worst],
            interval=None,
            baseline="DPO",
            baseline_value=1.0,
            bound=f"tdpo, sparsepo and aligndistil at most {TIME} x the time and {MEMORY} x the memory",
            reached=max(times) <= TIME and max(peaks) <= MEMORY and len(full) == len(FULL_VOCABULARY),
            world=f"{options.model}, float32, {len(groups)} {what}, CPU, {options.threads} threads",
            seeds=[options.seed],
            notes=f"Slowest: {full[worst]}. Alternating steps in one process; helper models are frozen copies, "
            f"preparation is not timed; load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
            rows=rows,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
