"""Acceptance figures of reward-augmented DPO: does the policy do what score it is asked for, and what does it unlearn?

World: the 64-word sentiment language, preset "goals": half of the prompts on which its 2-layer LM was trained begin
with "aim N :", N one of ten number words that the completions repeat now and then but whose sentiment does not depend
on it. So the LM reads the words, and they mean nothing of quality to it (the row of the start model shows that). The
goal sentence is " aim {goal} :" before the prompt; the score is the sum of a completion's sentiment words, -4 to 4
mapped to 1 to 10 and rounded. Pairs are of bare prompts: the best of four samples against a random other one, as in the
paper's preprocessing. Both arms make the same number of updates at the same rate and beta, so DPO sees each pair twice
as often. Rate and beta are the best of 5e-4, 1e-3, 2e-3 and 0.1, 0.3 for DPO, by accuracy on development pairs of
training prompts.

    python examples/reward_augmented.py          three minutes, three seeds
    python examples/reward_augmented.py --full   SmolLM2 on film replies, scored by VADER (some hours on two cores)

Acceptance (specification), medians of three seeds: (1) controllability: Spearman correlation of the requested score
(1, 3, 5, 8, 10) with the obtained one, 60 held-out prompts each, greedy, >= 0.3 and >= 0.2 above both DPO and the start
model asked with the same sentence; (2) unlearning: mean change of the per-token log-prob (trained minus start model,
each under the prompt it is used with: DPO bare, DPO-RA goal 10) of held-out rejected responses with r_l >= 7 and
r_w > r_l, at least 30 % smaller in magnitude than DPO's, on at least 30 pairs.

What was learned. (1) On development pairs: an LM that does not look at the goal learns it late or not at all. With
number words that nothing depended on, 700 of 800 updates passed at a loss of log 2 before the correlation rose to 0.9;
with words that it has learned to repeat, the 240 updates here suffice. (2) Unlearning differs much between seeds: in
nats a token 1.71, 1.02, 0.45 for DPO-RA under goal 10 and 1.01, 1.68, 1.60 for DPO. The median is 36 % smaller, the
mean of the three only 26 %, and on the first seed DPO-RA loses more (on development pairs, too: 1.71 against 1.00, at a
rate of 1e-3 0.93 against 0.50, there with a third of the pairs 0.70 against 0.54). Seeds 4, 5, 6, run afterwards to see
which it is, gave 0.84, 0.89, 0.49 against 1.56, 1.27, 1.21: over all six the mean is 35 % smaller and the median 39 %.
Their correlations were 0.29, 0.86, 0.84. (3) Asked without any goal, the policy moves too: its greedy answers then
score 10, 10 and 8.4 (seeds 1, 2, 3), the start model's 6.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken import catalog
from pertoken.core.compare import Arm, compare
from pertoken.core.data import Group
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import completions_stats
from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.train.dpo import DPO
from pertoken.train.reward_augmented import Goal, RewardAugmented
from pertoken.worlds.experiment import group_of
from pertoken.worlds.grammar import GRAMMARS, prompts, train_lm

REQUESTS = (1, 3, 5, 8, 10)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    full: bool = False
    """SmolLM2 in the sentiment world instead of the small language."""
    pairs: int = 300
    """Prompts with --full, each of which gives at most one pair."""
    prompts: int = 2100
    """Prompts whose samples make the training pairs (about nine in ten do)."""
    updates: int = 240
    """Updates of both arms in the small language."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/reward-augmented.json."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What both arms are given.

    Attributes:
        policy: makes the start model. train, held_out: pairs of bare prompts, `Example.scores` on the scale 1 to 10.
        prompts: held-out prompts that scores are requested on. score: text -> score on the scale.
        method: the options of DPO-RA; DPO has the same beta.
    """

    name: str
    policy: Callable[[], LM]
    train: list[Group]
    held_out: list[Group]
    prompts: list[Any]
    score: Callable[[str], float]
    method: RewardAugmented
    config: LoopConfig
    sampling: Sampling


def best_and_other(drawn: Sequence[Sequence[Trace]], prompt: Sequence[Any], score: Any, seed: int) -> list[Group]:
    """The best of each prompt's samples against a random other one; pairs with equal scores are left out."""
    rng, groups = np.random.default_rng(seed), []
    for said, traces in zip(prompt, drawn, strict=True):
        scores = [score(t.text) for t in traces]
        best = int(np.argmax(scores))
        other = int(rng.choice([k for k in range(len(traces)) if k != best]))
        if scores[best] > scores[other] and traces[best].text.strip() and traces[other].text.strip():
            pair = (scores[best], scores[other])
            groups.append(group_of(traces[best], traces[other], said, pair, len(groups), "samples"))
    return groups


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank."""
    ranks = []
    for values in (np.asarray(x), np.asarray(y)):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.std(r) for r in ranks) > 0 else 0.0


@dataclass(frozen=True)
class Figures:
    """What a trained policy does with goals: `bare` says that it is used without one."""

    world: World

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Spearman's rho and the mean score for each request; the change of good rejected responses, with and without
        goal 10."""
        ask, world = self.world.method.ask, self.world
        asked = [ask(p, s, lm) for s in REQUESTS for p in world.prompts]
        said = [t[0].text for t in sample(lm, asked, 1, world.sampling, batch=256)]
        scores = np.array([world.score(text) for text in said]).reshape(len(REQUESTS), -1)
        bare = [t[0].text for t in sample(lm, world.prompts, 1, world.sampling, batch=256)]
        good = [g for g in world.held_out if _of(g)[1] >= 7 and _of(g)[0] > _of(g)[1]]
        out: dict[str, Any] = {
            "rho": spearman(np.repeat(REQUESTS, scores.shape[1]).tolist(), scores.ravel().tolist()),
            "good": len(good),
            "score bare": float(np.mean([world.score(text) for text in bare])),
            **{f"score {s}": float(v) for s, v in zip(REQUESTS, scores.mean(1), strict=True)},
        }
        for k, side in enumerate(("chosen", "rejected")):
            traces = [g.traces[k] for g in good]
            top = [
                t.with_prompt(lm.encode_prompt(ask(g.example.prompt, None, lm)), lm.view) for g, t in zip(good, traces)
            ]
            for name, some in (("bare", traces), ("goal 10", top)):
                ours, start = (completions_stats(m, some) for m in (lm, reference))
                changes = [float((a["logp"] - b["logp"]).mean()) for a, b in zip(ours, start, strict=True)]
                out[f"{side} {name}"] = float(np.mean(changes))
        return out


def _of(group: Group) -> tuple[float, ...]:
    assert group.example.scores is not None
    return group.example.scores


def run(world: World, options: Options, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of every arm, one a seed; those of the start model once."""
    method = world.method
    arms = [
        Arm(name="dpo", slug="dpo", objective=DPO(beta=method.beta, label_smoothing=method.label_smoothing)),
        Arm(name="dpo-ra", slug="reward-augmented", objective=method),
    ]
    figures, common = Figures(world), {"resolve": catalog.method, "progress": options.full}
    data = (world.policy, world.train, world.held_out, world.config, out)
    outcomes = compare(
        arms, *data, seeds=options.seeds, evaluate=figures, say=print if options.full else None, **common
    )
    start = world.policy()
    return {"start": [figures(start, start, 0)]} | {
        a.name: [o.figures for o in outcomes if o.arm == a.name] for a in arms
    }


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="reward-augmented-"))
    world = _smollm2(out, options) if options.full else _grammar(options)
    by_arm = run(world, options, out)
    median = {n: {k: float(np.median([f[k] for f in fs])) for k in fs[0]} for n, fs in by_arm.items()}
    print(f"\n{world.name}; {len(world.train)} pairs; medians of seeds {options.seeds}")
    columns = ["rho", *(f"score {s}" for s in REQUESTS), "score bare", "rejected bare", "rejected goal 10"]
    print(f"{'arm':<8}" + "".join(f"{c:>17}" for c in columns))
    for name, m in median.items():
        print(f"{name:<8}" + "".join(f"{m[c]:>17.3f}" for c in columns))
    ra, dpo, start = (median[n] for n in ("dpo-ra", "dpo", "start"))
    kept, lost = abs(ra["rejected goal 10"]), abs(dpo["rejected bare"])
    checks = {
        "rho >= 0.3": ra["rho"] >= 0.3,
        "rho >= 0.2 above DPO's and the start model's": ra["rho"] >= max(dpo["rho"], start["rho"]) + 0.2,
        "good rejected responses change by at least 30 % less": kept <= 0.7 * lost,
        f"on at least 30 pairs (here {ra['good']:.0f})": ra["good"] >= 30,
    }
    print(f"change of good rejected responses, nats a token: {kept:.4f} (goal 10) against {lost:.4f} (DPO, bare)")
    spread = {n: [abs(f[k]) for f in by_arm[n]] for n, k in (("dpo-ra", "rejected goal 10"), ("dpo", "rejected bare"))}
    for name, some in spread.items():
        print(f"  {name:<8}seeds {', '.join(f'{v:.3f}' for v in some)}; mean {np.mean(some):.3f}")
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        each = [f["rho"] for f in by_arm["dpo-ra"]]
        rows = [
            {"metric": "rho, start model asked with the same sentence", "value": start["rho"]},
            {
                "metric": "|change of per-token log-prob| of rejected responses scored 7 or more, goal 10 (nats)",
                "value": kept,
                "interval": [min(spread["dpo-ra"]), max(spread["dpo-ra"])],
                "baseline": "dpo, bare prompt",
                "baseline_value": lost,
                "bound": "at most 0.7 of DPO's",
                "reached": kept <= 0.7 * lost,
            },
            {
                "metric": "the same, mean of seeds in place of the median",
                "value": float(np.mean(spread["dpo-ra"])),
                "baseline": "dpo, bare prompt",
                "baseline_value": float(np.mean(spread["dpo"])),
            },
            {
                "metric": "obtained score, goal 10",
                "value": ra["score 10"],
                "baseline": "dpo, bare",
                "baseline_value": dpo["score bare"],
            },
            {
                "metric": "obtained score, no goal",
                "value": ra["score bare"],
                "baseline": "dpo, bare",
                "baseline_value": dpo["score bare"],
            },
        ]
        save_result(
            "reward-augmented",
            metric="controllability: Spearman correlation of requested and obtained score",
            value=ra["rho"],
            interval=(min(each), max(each)),
            baseline="dpo asked with the same sentence",
            baseline_value=dpo["rho"],
            bound="; ".join(checks),
            reached=all(checks.values()),
            world=world.name,
            seeds=options.seeds,
            notes="interval: least and greatest of the seeds; "
            + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
            rows=rows,
        )


def _grammar(options: Options, held: str = "test") -> World:
    grammar = GRAMMARS["goals"]
    base = str(train_lm(grammar, seed=0))
    lm = load(base, device="cpu", attention="sdpa")
    method = RewardAugmented(
        beta=0.3,
        goal=Goal(sentence=" aim {goal} :", separator="", place="user", decimals=0),
    )

    def score(text: str) -> float:
        return float(round(np.clip(5.5 + 4.5 * grammar.score(text) / 4, 1, 10)))

    split = {side: [p for p in some if " aim " not in p] for side, some in prompts(grammar).items()}
    sides = {}
    for number, (side, n) in enumerate((("train", options.prompts), (held, 800))):
        asked = [split[side][i % len(split[side])] for i in range(n)]
        drawn = sample(lm, asked, 4, Sampling(max_new_tokens=40), seed=number, batch=512)
        sides[number] = best_and_other(drawn, asked, score, number)
    return World(
        name="grammar world, preset goals",
        policy=lambda: load(base, device="cpu", attention="sdpa"),
        train=sides[0],
        held_out=sides[1],
        prompts=split[held][:60],
        score=score,
        method=method,
        config=LoopConfig(lr=2e-3, batch_size=16, steps=options.updates),
        sampling=Sampling(max_new_tokens=40, temperature=0.0),
    )


def _smollm2(out: Path, options: Options) -> World:
    """300 pairs of film replies; the score is VADER's compound, mapped to 1 to 10 and rounded to one decimal."""
    from pertoken.core.record import read_json, write_json
    from pertoken.core.stages import Stages
    from pertoken.score.vader import compound
    from pertoken.worlds import sentiment

    lm = load("smollm2")
    sampling = Sampling(max_new_tokens=24)
    score = lambda text: round(5.5 + 4.5 * compound(text), 1)
    split = sentiment.prompts()
    sides = {}
    for number, (side, n) in enumerate((("train", options.pairs), ("test", options.pairs))):
        asked = [sentiment.messages(split[side][i % len(split[side])]) for i in range(n)]

        def make(folder: Path, asked: Any = asked, number: int = number) -> None:
            drawn = sample(lm, asked, 4, sampling, seed=number)
            write_json(folder / "traces.json", [[t.to_json() for t in some] for some in drawn])

        folder = Stages(out / "stages", print).run(f"samples-{side}", {"n": n, "lm": lm.identity()}, make)
        drawn = [[Trace.from_json(t) for t in some] for some in read_json(folder / "traces.json")]
        sides[side] = best_and_other(drawn, [tuple(a) for a in asked], score, number)
    return World(
        name="sentiment world, SmolLM2-135M-Instruct (dequantised Q4_1)",
        policy=lambda: load("smollm2"),
        train=sides["train"],
        held_out=sides["test"],
        prompts=[sentiment.messages(p) for p in split["test"][: min(60, options.pairs)]],
        score=score,
        method=RewardAugmented(beta=0.1),
        config=LoopConfig(lr=1e-5, batch_size=8, steps=2 * -(-len(sides["train"]) // 8)),
        sampling=dataclasses.replace(sampling, temperature=0.0),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
