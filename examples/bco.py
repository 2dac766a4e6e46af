"""BCO's acceptance figure: labels from a log whose thumbs up and thumbs down come from different prompts.

World: the 64-word sentiment language and a 2-layer LM trained on it. 640 thumbs up and 160 thumbs down (4 to 1), the
sign of a response's true score; 90 % of the thumbs up were given to prompts about things met outdoors, 90 % of the
thumbs down to prompts about things found indoors. Each seed has a log and an order of its own. Accuracy is the share
of 400 same-prompt pairs (one good, one bad response) with r_up > r_down, on prompts nobody trained on, half of each
kind; every arm is shown at the best of the same three learning rates by 200 pairs of validation prompts. All make the
same updates on the same rows in the same order. The world and the rates were chosen on the validation pairs alone.

    python examples/bco.py          three minutes, three seeds
    python examples/bco.py --full   SmolLM2 on film replies, questions against requests (some hours; best on a GPU)

Acceptance (specification), means of the seeds: BCO with matching at least 2 points above KTO; the standard deviation of
the per-step training loss over the last third is lower with the shift than without.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken import catalog
from pertoken.core.compare import Arm, compare
from pertoken.core.data import Group
from pertoken.core.evaluate import pair_margins
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig
from pertoken.results import save_result
from pertoken.train.bco import BCO
from pertoken.train.kto import KTO
from pertoken.worlds.thumbs import Thumbs, grammar_lm, grammar_thumbs

LOOP = LoopConfig(batch_size=16, steps=75, schedule="cosine")
ARMS: dict[str, tuple[str, Any]] = {
    "bco + matching": ("bco", BCO()),
    "bco": ("bco", BCO(udm=False)),
    "bco + matching, no shift": ("bco", BCO(shift="none")),
    "kto": ("kto", KTO()),
    "kto, classes balanced": ("kto", KTO(undesirable_weight=4.0)),  # lambda_D n_D / (lambda_U n_U) = 1
}
MAIN, CONTROL = "bco + matching", "bco + matching, no shift"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates that every arm chooses from."""
    full: bool = False
    """SmolLM2 in the sentiment world instead of the small language."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/bco.json."""


@dataclass(frozen=True)
class Accuracy:
    """Figures of a trained policy on both sets of pairs."""

    validation: list[Group]
    test: list[Group]

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Shares of pairs that are told right; those of the test by the kind of prompt, too."""
        right = pair_margins(lm, reference, self.test) > 0
        return {
            "validation": float((pair_margins(lm, reference, self.validation) > 0).mean()),
            "test": float(right.mean()),
            "first": float(right[: len(right) // 2].mean()),
            "second": float(right[len(right) // 2 :].mean()),
        }


@dataclass(frozen=True)
class World:
    """What differs between the small and the real world."""

    name: str
    policy: Callable[[], LM]
    thumbs: Callable[[int], Thumbs]
    config: LoopConfig


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="bco-"))
    world = _smollm2() if options.full else _grammar()
    runs: dict[tuple[str, float, int], dict[str, float]] = {}
    for seed in options.seeds:
        thumbs, told = world.thumbs(seed), set()

        def say(line: str, told: set[str] = told) -> None:
            if line.startswith("bco:") and line not in told:  # what matching found, once
                told.add(line)
                print(line)

        for rate in options.rates:
            outcomes = compare(
                [Arm(name=name, slug=slug, objective=objective) for name, (slug, objective) in ARMS.items()],
                world.policy,
                thumbs.train,
                [],
                dataclasses.replace(world.config, lr=rate),
                out / f"{rate:g}",
                seeds=[seed],
                resolve=catalog.method,
                evaluate=Accuracy(thumbs.validation, thumbs.test),
                say=say,
                progress=options.full,
            )
            for o in outcomes:
                last = [h["loss"] for h in o.history][-len(o.history) // 3 :]
                runs[o.arm, rate, seed] = o.figures | {"loss_std": float(np.std(last))}
    mean = lambda arm, rate, key: float(np.mean([runs[arm, rate, s][key] for s in options.seeds]))
    print(f"\n{world.name}; means of seeds {options.seeds}\nvalidation accuracy by learning rate")
    for arm in ARMS:
        print(f"{arm:<26}" + "".join(f"{r:>8g} {mean(arm, r, 'validation'):.4f}" for r in options.rates))
    best = {arm: max(options.rates, key=lambda r, arm=arm: mean(arm, r, "validation")) for arm in ARMS}
    columns = ("test", "first", "second", "loss_std")
    print(f"\n{'held-out pairs, at the best rate':<34}" + "".join(f"{c:>10}" for c in columns))
    table = {arm: {c: mean(arm, best[arm], c) for c in columns} for arm in ARMS}
    for arm, row in table.items():
        print(f"{arm:<26}{best[arm]:>8g}" + "".join(f"{row[c]:>10.4f}" for c in columns))
    checks = {
        "accuracy at least 2 points above KTO's": table[MAIN]["test"] >= table["kto"]["test"] + 0.02,
        "the loss varies less with the shift": table[MAIN]["loss_std"] < table[CONTROL]["loss_std"],
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        _save(options, world, runs, best, table, checks)


def _save(options: Options, world: World, runs: Any, best: Any, table: Any, checks: dict[str, bool]) -> None:
    each = [runs[MAIN, best[MAIN], s]["test"] for s in options.seeds]
    other = {arm: row for arm, row in table.items() if arm != MAIN}
    rows = [
        {
            "metric": f"held-out pair accuracy, {MAIN}",
            "value": table[MAIN]["test"],
            "baseline": arm,
            "baseline_value": row["test"],
        }
        for arm, row in other.items()
    ]
    rows += [
        {
            "metric": f"accuracy on {kind} prompts",
            "value": table[MAIN][key],
            "baseline": "kto",
            "baseline_value": table["kto"][key],
        }
        for kind, key in (("most thumbs up's", "first"), ("most thumbs down's", "second"))
    ]
    rows.append(
        {
            "metric": "standard deviation of the per-step training loss, last third (less: better)",
            "value": table[MAIN]["loss_std"],
            "baseline": "no shift",
            "baseline_value": table[CONTROL]["loss_std"],
        }
    )
    save_result(
        "bco",
        metric="held-out preference accuracy, shifted and imbalanced labels, BCO with matching",
        value=table[MAIN]["test"],
        interval=(min(each), max(each)),
        baseline="kto",
        baseline_value=table["kto"]["test"],
        bound="; ".join(checks),
        reached=all(checks.values()),
        world=world.name,
        seeds=options.seeds,
        notes="interval: least and greatest of the seeds; rates by validation: "
        + ", ".join(f"{arm} {rate:g}" for arm, rate in best.items())
        + "; "
        + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
        rows=rows,
    )


def _grammar() -> World:
    return World("grammar world, preset lexicon64, two kinds of prompts", grammar_lm, grammar_thumbs, LOOP)


def _smollm2() -> World:
    """VADER's labels of SmolLM2's own replies; questions have most thumbs up, requests most thumbs down."""
    from pertoken.core.lm import load
    from pertoken.core.rollout import Sampling
    from pertoken.score.vader import compound
    from pertoken.worlds import sentiment
    from pertoken.worlds.thumbs import Source, shifted_thumbs

    source = Source(
        lm=load("smollm2"),
        score=compound,
        kind=lambda prompt: prompt.endswith("?"),
        ask=sentiment.messages,
        sampling=Sampling(max_new_tokens=40),
    )
    sizes: dict[str, Any] = {"up": 400, "down": 100, "n_validation": 100, "n_test": 300}
    return World(
        "sentiment world, SmolLM2-135M-Instruct (dequantised Q4_1), questions and requests",
        lambda: load("smollm2"),
        lambda seed: shifted_thumbs(source, sentiment.prompts(), **sizes, seed=seed),
        dataclasses.replace(LOOP, steps=60),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
