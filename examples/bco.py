"""BCO's acceptance figure: labels from a log whose thumbs up and thumbs down come from different prompts.

World: the 64-word sentiment language and a 2-layer LM trained on it. 480 thumbs up and 120 thumbs down (4 to 1), the
sign of a response's true score; 90 % of the thumbs up were given to prompts about things met outdoors, 90 % of the
thumbs down to prompts about things found indoors. Each seed has a log and an order of its own. Accuracy is the share
of 400 same-prompt pairs (one good, one bad response) with r_up > r_down, on prompts nobody trained on, half of each
kind; every arm is shown at the best of the same three learning rates by 200 pairs of validation prompts. All make the
same updates on the same rows in the same order. The world and the rates were chosen on the validation pairs alone.

    python examples/bco.py              three minutes, three seeds
    python examples/bco.py --controls   also KTO with its labels balanced
    python examples/bco.py --full       SmolLM2 on film replies, questions against requests (some hours; best on a GPU)

Acceptance (specification), means of the seeds: BCO with matching at least 2 points above KTO; the standard deviation of
the per-step training loss over the last third is lower with the shift than without.

What was learned. (1) What matching buys takes training to show: with 640 and 160 rows in one and a half epochs of
batches of 16, BCO with matching led KTO by 1.3 points (0.918 and 0.906, the bound missed), with three epochs by 4.4.
Three epochs are what a trial on the validation pairs had before either measurement; both saw the same test pairs. The
lead is mostly on the prompts that most thumbs down were given to. Without matching BCO is about where KTO is: rewards
stay small here, and there both losses are nearly linear in them.
(2) The classifier has seen the prompts that it weighs, as thumbs down, and so shrinks their odds: the true ratio on
the rare kind is 9, w is about 3.
(3) The loss's spread over steps is mostly the weights' (at 3e-4 it is a seventh without matching). The shift lowers it
by one part in a hundred at the highest rate and not at all at the others, where rewards are smaller: a bound that is
reached by little. Where two arms do best at different rates their spreads do not compare; see the lines at equal rates.
(4) Weighing KTO's labels by their numbers, as its paper advises, makes it much worse on shifted labels (0.78 in the
first measurement; --controls).
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
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig
from pertoken.core.run import completions_stats
from pertoken.results import save_result
from pertoken.train.bco import BCO
from pertoken.train.kto import KTO
from pertoken.worlds.thumbs import Source, grammar_lm, grammar_source, same_prompt_pairs, shifted_thumbs, split_prompts

LOOP = LoopConfig(batch_size=24, steps=75, schedule="cosine")  # three epochs
ARMS: dict[str, tuple[str, Any]] = {
    "bco + matching": ("bco", BCO()),
    "bco": ("bco", BCO(udm=False)),
    "bco + matching, no shift": ("bco", BCO(shift="none")),
    "kto": ("kto", KTO()),
}
BALANCED = {"kto, classes balanced": ("kto", KTO(undesirable_weight=4.0))}  # lambda_D n_D / (lambda_U n_U) = 1
MAIN, CONTROL = "bco + matching", "bco + matching, no shift"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates that every arm chooses from."""
    controls: bool = False
    """Also KTO with the labels' weights that its paper advises for their numbers."""
    full: bool = False
    """SmolLM2 in the sentiment world instead of the small language."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/bco.json."""


class Accuracy:
    """Figures of a trained policy on both sets of pairs; the reference is the same for all, so it runs once."""

    def __init__(self, reference: LM, validation: list[Group], test: list[Group]):
        self.n, self.pairs = len(validation), [*validation, *test]
        self.reference = self._sums(reference)

    def _sums(self, lm: LM) -> np.ndarray:
        traces = [t for g in self.pairs for t in g.traces]
        return np.array([s["logp"].sum() for s in completions_stats(lm, traces)]).reshape(-1, 2)

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Shares of pairs that are told right; those of the test by the kind of prompt, too."""
        ratios = self._sums(lm) - self.reference
        right = ratios[:, 0] > ratios[:, 1]
        half = (len(right) - self.n) // 2
        parts = {"validation": right[: self.n], "test": right[self.n :]}
        parts |= {"first": parts["test"][:half], "second": parts["test"][half:]}
        return {name: float(part.mean()) for name, part in parts.items()}


@dataclass(frozen=True)
class World:
    """What differs between the small and the real world."""

    name: str
    policy: Callable[[], LM]
    log: Callable[[int], list[Group]]
    validation: list[Group]
    test: list[Group]
    config: LoopConfig


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="bco-"))
    world = _smollm2() if options.full else _grammar()
    arms = ARMS | (BALANCED if options.controls or options.full else {})
    evaluate = Accuracy(world.policy(), world.validation, world.test)
    runs: dict[tuple[str, float, int], dict[str, float]] = {}
    for seed in options.seeds:
        rows, told = world.log(seed), set()

        def say(line: str, told: set[str] = told) -> None:
            if line.startswith("bco:") and line not in told:  # what matching found, once
                told.add(line)
                print(line)

        for rate in options.rates:
            outcomes = compare(
                [Arm(name=name, slug=slug, objective=objective) for name, (slug, objective) in arms.items()],
                world.policy,
                rows,
                [],
                dataclasses.replace(world.config, lr=rate),
                out / f"{rate:g}",
                seeds=[seed],
                resolve=catalog.method,
                evaluate=evaluate,
                say=say,
                progress=options.full,
            )
            for o in outcomes:
                last = [h["loss"] for h in o.history][-len(o.history) // 3 :]
                runs[o.arm, rate, seed] = o.figures | {"loss_std": float(np.std(last))}
    mean = lambda arm, rate, key: float(np.mean([runs[arm, rate, s][key] for s in options.seeds]))
    print(f"\n{world.name}; means of seeds {options.seeds}\nvalidation accuracy by learning rate")
    for arm in arms:
        print(f"{arm:<26}" + "".join(f"{r:>8g} {mean(arm, r, 'validation'):.4f}" for r in options.rates))
    best = {arm: max(options.rates, key=lambda r, arm=arm: mean(arm, r, "validation")) for arm in arms}
    columns = ("test", "first", "second", "loss_std")
    print(f"\n{'held-out pairs, at the best rate':<34}" + "".join(f"{c:>10}" for c in columns))
    table = {arm: {c: mean(arm, best[arm], c) for c in columns} for arm in arms}
    for arm, row in table.items():
        print(f"{arm:<26}{best[arm]:>8g}" + "".join(f"{row[c]:>10.4f}" for c in columns))
    for rate in options.rates:
        with_, without = (mean(arm, rate, "loss_std") for arm in (MAIN, CONTROL))
        print(f"loss_std at {rate:g}: {with_:.4f} with the shift, {without:.4f} without")
    checks = {
        "accuracy at least 2 points above KTO's": table[MAIN]["test"] >= table["kto"]["test"] + 0.02,
        "the loss varies less with the shift": table[MAIN]["loss_std"] < table[CONTROL]["loss_std"],
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        same = mean(CONTROL, best[MAIN], "loss_std")
        _save(options, world, [runs[MAIN, best[MAIN], s]["test"] for s in options.seeds], best, table, same, checks)


def _save(
    options: Options,
    world: World,
    each: list[float],
    best: dict[str, float],
    table: dict[str, dict[str, float]],
    same: float,
    checks: dict[str, bool],
) -> None:
    figures = [
        *((f"held-out pair accuracy, {MAIN}", "test", arm) for arm in table if arm != MAIN),
        ("accuracy on prompts of the kind that most thumbs up were given to", "first", "kto"),
        ("accuracy on prompts of the kind that most thumbs down were given to", "second", "kto"),
        ("standard deviation of the per-step training loss, last third (less: better)", "loss_std", CONTROL),
    ]
    rows = [
        {"metric": metric, "value": table[MAIN][key], "baseline": arm, "baseline_value": table[arm][key]}
        for metric, key, arm in figures
    ]
    rows.append(rows[-1] | {"metric": rows[-1]["metric"] + ", both at the rate of the first", "baseline_value": same})
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


def _world(name: str, policy: Callable[[], LM], source: Source, asked: dict[str, list[str]], **sizes: Any) -> World:
    log = lambda seed: shifted_thumbs(source, asked["train"], up=sizes["up"], down=sizes["down"], seed=seed)
    pairs = [same_prompt_pairs(source, asked[side], sizes[side]) for side in ("validation", "test")]
    return World(name, policy, log, *pairs, dataclasses.replace(LOOP, batch_size=sizes["batch"]))


def _grammar() -> World:
    name = "grammar world, preset lexicon64, two kinds of prompts"
    return _world(name, grammar_lm, *grammar_source(), up=480, down=120, validation=200, test=400, batch=24)


def _smollm2() -> World:
    """VADER's labels of SmolLM2's own replies; questions have most thumbs up, requests most thumbs down."""
    from pertoken.core.lm import load
    from pertoken.core.rollout import Sampling
    from pertoken.score.vader import compound
    from pertoken.worlds import sentiment

    source = Source(
        lm=load("smollm2"),
        score=compound,
        kind=lambda prompt: prompt.endswith("?"),
        ask=sentiment.messages,
        sampling=Sampling(max_new_tokens=40),
    )
    name = "sentiment world, SmolLM2-135M-Instruct (dequantised Q4_1), questions and requests"
    asked, sizes = split_prompts(sentiment.prompts()), {"up": 400, "down": 100, "validation": 100, "test": 300}
    return _world(name, lambda: load("smollm2"), source, asked, **sizes, batch=20)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
