"""GPO against SPPO and DPO in a small world: who wins against the start, at which KL. The specification gives no bound.

World: the 64-word sentiment language of the grammar world and a 2-layer LM trained on it. 480 pairs (best and worst of
four samples, by the language's true score) train a general preference model together with its backbone (`gpm-reward`,
d = 4, normalised). GPO and SPPO then make three rounds of 20 updates, each on best and worst of K = 5 samples of the
round's own start for 160 prompts, judged by that model alone; DPO makes the same 60 updates on the 480 pairs that the
preference model learned from. All with batches of 16, AdamW, 5e-4.

Figures are on held-out prompts, two samples of either side each: the win rate counts which sample has the higher TRUE
score (ties half), which neither GPO nor SPPO ever sees; the preference model's own opinion stands beside it, as do KL
(policy || start, summed over a response, nats), and the share of distinct responses.

    python examples/gpo.py          three minutes, three seeds
    python examples/gpo.py --dev    what beta was chosen by: the same figures on prompts of the training split, seed 0

beta was chosen on prompts of the training split, seed 0, among 3, 1, 0.3 (GPO) and 0.3, 0.1, 0.03 (SPPO), by the
preference model's win rate: 1 and 0.03. The latter goes twice as far from the start (KL 10.7 against 6.1 there), so
SPPO with 0.1, whose KL is nearest to GPO's (5.3), stands beside it. DPO's beta is 0.1, its usual one in this world.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken import catalog
from pertoken.core.compare import Arm, Outcome, compare
from pertoken.core.evaluate import seeds_interval, sequence_kl
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import Run
from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.score.gpm import GPM
from pertoken.train.dpo import DPO
from pertoken.train.gpm_reward import GPMReward
from pertoken.train.gpo import GPO
from pertoken.worlds.experiment import GrammarPairs, grammar_pairs

SAMPLING = Sampling(max_new_tokens=40)
ROUNDS, UPDATES, PROMPTS = 3, 20, 160
LOOP = LoopConfig(lr=5e-4, batch_size=16, steps=UPDATES, schedule="constant", warmup=0.1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    beta: float = 1.0
    """GPO's beta."""
    sppo_betas: tuple[float, ...] = (0.03, 0.1)
    """SPPO's."""
    dev: bool = False
    """Every beta, seed 0, on prompts of the training split."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/gpo.json."""


def preference_model(world: GrammarPairs, out: Path) -> GPM:
    """The general preference model, trained on the pairs; prints how often it is right on held-out ones."""
    run = Run(
        slug="gpm-reward",
        objective=GPMReward(dim=4),
        policy=world.policy(),
        groups=list(world.train),
        held_out=list(world.held_out),
        config=LoopConfig(lr=1e-3, batch_size=16, epochs=4),
        out=out / "gpm-reward",
        resolve=catalog.method,
        progress=False,
    )
    final = run.go(resume=(out / "gpm-reward").exists())["final"]
    right = final["eval_rewards/accuracies"]
    print(
        f"preference model: {right:.1%} of {len(world.held_out)} held-out pairs right, max |s| {final['score/max']:.2f}"
    )
    return GPM(folder=str(out / "gpm-reward"))


@dataclass
class Judge:
    """Figures of a policy on some prompts: true scores of its samples, and both judges' win rates against the start."""

    world: GrammarPairs
    model: GPM
    prompts: list[tuple[int, ...]]
    start: list[list[Trace]] = field(default_factory=list)

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        self.start = self.start or sample(self.world.policy(), self.prompts, 2, SAMPLING, seed=991, batch=512)
        ours = sample(lm, self.prompts, 2, SAMPLING, seed=100 + seed, batch=512)
        flat = [t for some in ours for t in some]
        scores, before = self.scores(ours), self.scores(self.start)
        believed = [self.model.prefer([*a, *b])[:2, 2:].mean() for a, b in zip(ours, self.start, strict=True)]
        return {
            "scores": scores.tolist(),
            "reward": float(scores.mean()),
            "start": float(before.mean()),
            "win": win_rate(scores, before),
            "believed": float(np.mean(believed)),
            "kl": float(sequence_kl(lm, self.world.policy(), flat).mean()),
            "distinct": len({(t.prompt_ids, t.completion_ids) for t in flat}) / len(flat),
        }

    def scores(self, traces: list[list[Trace]]) -> np.ndarray:
        """True scores (prompts, 2)."""
        return np.array([[self.world.grammar.score(t.text) for t in some] for some in traces])


def win_rate(a: np.ndarray, b: np.ndarray) -> float:
    """How often a sample of a has the higher score than one of b after the same prompt; ties half."""
    difference = a[:, :, None] - b[:, None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def main(options: Options) -> None:
    """Train, judge, print."""
    out = Path(options.out or tempfile.mkdtemp(prefix="gpo-"))
    world = grammar_pairs("lexicon64", n_train=480, n_held_out=200)
    model = preference_model(world, out)
    judge = Judge(world, model, sorted({g.prompt_ids for g in world.train[PROMPTS:]}) if options.dev else world.prompts)
    judge.prompts = judge.prompts[:80]

    def gpo(target: str, beta: float) -> Arm:
        objective: Any = GPO(target=target, beta=beta, rounds=ROUNDS, scorer=model, sampling=SAMPLING)  # type: ignore[arg-type]
        return Arm(name=f"{target} beta {beta:g}", slug="gpo", objective=objective)

    pairs = [("gpo", options.beta), *(("sppo", b) for b in options.sppo_betas)]
    if options.dev:
        pairs = [("gpo", b) for b in (3.0, 1.0, 0.3)] + [("sppo", b) for b in (0.3, 0.1, 0.03)]
    seeds = (0,) if options.dev else options.seeds
    common: dict[str, Any] = {"seeds": seeds, "resolve": catalog.method, "evaluate": judge, "progress": False}
    arms = [gpo(*pair) for pair in pairs]
    outcomes = compare(arms, world.policy, world.train[:PROMPTS], [], LOOP, out, **common)
    whole = dataclasses.replace(LOOP, steps=ROUNDS * UPDATES)
    arms.append(Arm(name="dpo", slug="dpo", objective=DPO()))
    outcomes += compare(arms[-1:], world.policy, world.train, [], whole, out, **common)
    show(outcomes, judge, options, [arm.name for arm in arms])


def show(outcomes: list[Outcome], judge: Judge, options: Options, names: list[str]) -> None:
    """The table, and what is saved."""
    columns = ("win", "believed", "reward", "kl", "distinct")
    by_arm = {name: [o for o in outcomes if o.arm == name] for name in names}
    figures = {n: {c: seeds_interval([o.figures[c] for o in some]) for c in columns} for n, some in by_arm.items()}
    reward = by_arm[names[0]][0].figures["start"]
    print(f"\n{len(judge.prompts)} prompts; means of seeds [95 %]; the start has true reward {reward:.2f}")
    print(f"{'arm':<16}" + "".join(f"{c:>24}" for c in columns) + f"{'updates':>9}")
    for name, f in figures.items():
        cells = "".join(f"{m:>8.3f} [{low:6.3f},{high:6.3f}]" for m, low, high in f.values())
        print(f"{name:<16}{cells}{by_arm[name][0].record['updates']:>9}")
    for name in names:
        notes = [n for n in by_arm[name][0].record["notes"] if n.startswith("gpo")]
        print(*(f"  {name}, last round, {note}" for note in notes), sep="\n") if notes else None
    if options.dev:
        return
    scores = {n: [np.array(o.figures["scores"]) for o in some] for n, some in by_arm.items()}
    against = {n: seeds_interval([win_rate(a, b) for a, b in zip(scores[names[0]], scores[n])]) for n in names[1:]}
    for name, (mean, low, high) in against.items():
        print(f"win rate of GPO against {name}: {mean:.3f} [{low:.3f}, {high:.3f}] (true score; no bound is given)")
    if options.save:
        save(options, names, figures, against)


def save(
    options: Options,
    names: list[str],
    figures: dict[str, dict[str, tuple[float, float, float]]],
    against: dict[str, tuple[float, float, float]],
) -> None:
    """Write results/gpo.json."""
    win = figures[names[0]]["win"]
    rows: list[dict[str, Any]] = [
        {"metric": f"win rate of GPO against {n} by the true score", "value": m, "interval": [low, high]}
        for n, (m, low, high) in against.items()
    ]
    labels = {"win": "win rate against the start by the true score", "kl": "KL(policy || start) of a response, nats"}
    rows += [
        {"metric": f"{label}, {n}", "value": figures[n][c][0], "interval": list(figures[n][c][1:])}
        for c, label in (*labels.items(), ("believed", "win rate against the start by the preference model"))
        for n in names
        if (n, c) != (names[0], "win")
    ]
    save_result(
        "gpo",
        metric="win rate against the start by the true score, three rounds of 20 updates",
        value=win[0],
        interval=win[1:],
        baseline=names[1],
        baseline_value=figures[names[1]]["win"][0],
        bound="",
        reached=None,
        world="grammar world, preset lexicon64; preference model: gpm-reward, d=4",
        seeds=options.seeds,
        notes="the specification gives no figure for GPO. Intervals: Student's t over seeds. Arms differ in KL, which "
        "stands in the rows: a higher win rate at a higher KL is no better method",
        rows=rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
