"""SparsePO's acceptance figure: do its learnt reward weights stand where the preference is decided?

World: the 45-word language of the specification, whose label shows in one kind of slot only; its 2-layer, 64-wide LM
(400 steps); pairs of a positive (chosen) and a negative text after one prompt. Each arm makes the same 150 updates of
16 pairs, beta 0.8, rate 3e-4. `sparsepo` has independent masks, l1 = 0.002 on the reward mask and networks that learn
ten times faster, as in the specification's pilot; beside it the same with the paper's l1 = 0 and 1x (`defaults`), MaPO
and TDPO1. The same l1 on the KL mask, too, ends it: on development pairs (new texts after training prompts) that mask
is 0 for every token well before 150 updates, which is an error after 50 of them; so here it has none.

AUC: does M_u rank the slots of sentiment words above the other tokens of held-out responses? Uniform weights have 0.50,
the same network untrained (the very start of that run) is printed beside it, and a logistic probe on the same hidden
states is the ceiling: a weight comes from the state BEFORE its token, so neither can see the word itself, only that
one is expected. Accuracy is that of the policy alone: held-out pairs with a higher log-ratio of the chosen side;
`loss_accuracy` is what each loss itself asks for, masked log-ratio plus masked KL. Both are held to the bound.

    python examples/sparsepo.py          about three minutes, three seeds
    python examples/sparsepo.py --full   SmolLM2 on film replies, slots are the words of VADER's lexicon (hours)

Acceptance (specification), medians of the seeds: AUC >= 0.85 (SmolLM2: 0.60) at a sparsity of 30 to 95 %, at least 0.05
above the untrained network, and accuracy within 2 points of TDPO1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken import catalog
from pertoken.core.compare import Arm, compare
from pertoken.core.credit import Credit
from pertoken.core.data import Group
from pertoken.core.evaluate import pair_margins, sequence_kl
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig
from pertoken.core.run import completions_stats
from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.train import mapo, sparsepo
from pertoken.train.mapo import MaPO
from pertoken.train.sparsepo import LearnedMask, Network, SparsePO
from pertoken.train.tdpo import TDPO
from pertoken.worlds.experiment import labelled_pairs

FIGURES = ("auc", "untrained_auc", "sparsity", "kl_sparsity", "accuracy", "loss_accuracy", "kl_chosen")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    full: bool = False
    """SmolLM2 in the sentiment world instead of the small language."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/sparsepo.json."""


@dataclass(frozen=True)
class World:
    """Pairs, where their sentiment words are, and how every arm is trained."""

    name: str
    policy: Any
    train: list[Group]
    held_out: list[Group]
    truth: Any  # trace -> (T,), not 0 on sentiment words
    config: LoopConfig
    beta: float
    auc: float  # that is to be reached
    probed: int = 400  # training pairs that the probe learns from


@dataclass(frozen=True)
class Policy:
    """Figures of a trained policy on held-out pairs."""

    held_out: list[Group]

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Accuracy without masks or KL, and the forward KL on chosen responses in nats."""
        chosen = [g.traces[0] for g in self.held_out]
        return {
            "accuracy": float((pair_margins(lm, reference, self.held_out) > 0).mean()),
            "kl_chosen": float(sequence_kl(lm, reference, chosen, forward=True).mean()),
        }


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="sparsepo-"))
    world = _smollm2(out) if options.full else _slots()
    own = {"beta": world.beta, "sharing": "independent"}
    masked = {
        "sparsepo": SparsePO(**own, l1_u=0.002, network=Network(mask_lr_factor=10.0)),
        "sparsepo defaults": SparsePO(**own),
    }
    arms = {
        "tdpo1": ("tdpo", TDPO(variant="tdpo1", beta=world.beta)),
        **{name: ("sparsepo", objective) for name, objective in masked.items()},
        "mapo": ("mapo", MaPO(beta=world.beta)),
    }
    outcomes = compare(
        [Arm(name=n, slug=slug, objective=o) for n, (slug, o) in arms.items()],
        world.policy,
        world.train,
        world.held_out,
        world.config,
        out,
        seeds=options.seeds,
        resolve=catalog.method,
        evaluate=Policy(world.held_out),
        progress=options.full,
    )
    reference = world.policy()
    traces = [t for g in world.held_out for t in g.traces]
    truths = [world.truth(t) for t in traces]
    figures: dict[str, list[dict[str, float]]] = {n: [] for n in arms}
    for outcome in outcomes:
        found, last = dict(outcome.figures), outcome.history[-1]
        found["loss_accuracy"] = last[f"eval_{'rewards/accuracies' if outcome.arm == 'tdpo1' else 'loss_accuracy'}"]
        if outcome.arm in masked:
            folder = out / outcome.arm / f"seed-{outcome.seed}"
            credits = LearnedMask(run=folder, reference=reference).score(traces)
            of_kl = LearnedMask(run=folder, reference=reference, side="kl").score(traces)
            start = _untrained(masked[outcome.arm], reference, traces, outcome.seed)
            found |= {"auc": auc(credits, truths), "untrained_auc": auc(start, truths)}
            found |= {"sparsity": sparsity(credits), "kl_sparsity": sparsity(of_kl)}
        elif outcome.arm == "mapo":
            credits = mapo.mask_credit(MaPO(), reference, traces)
            found |= {"auc": auc(credits, truths), "sparsity": sparsity(credits)}
        else:
            found |= {"auc": auc([_uniform(t) for t in traces], truths), "sparsity": 0.0}
        figures[outcome.arm].append(found)
    median = {n: {k: float(np.median([f[k] for f in fs])) for k in fs[0]} for n, fs in figures.items()}
    ceiling = probe(reference, world, traces, truths)
    print(f"\n{world.name}; medians of seeds {options.seeds}; weights read {sparsepo.READS}")
    print(f"{'arm':<26}" + "".join(f"{c:>14}" for c in FIGURES))
    for name, m in median.items():
        print(f"{name:<26}" + "".join(f"{m[c]:>14.4f}" if c in m else f"{'':>14}" for c in FIGURES))
    print(f"AUC of uniform weights 0.50, of a logistic probe on the same states (ceiling) {ceiling:.4f}")
    ours, tdpo = median["sparsepo"], median["tdpo1"]
    checks = {
        f"AUC at least {world.auc}": ours["auc"] >= world.auc,
        "sparsity of 30 to 95 %": 30 <= ours["sparsity"] <= 95,
        "0.05 above the untrained network": ours["auc"] >= ours["untrained_auc"] + 0.05,
        "accuracy within 2 points of TDPO1": ours["accuracy"] >= tdpo["accuracy"] - 0.02,
        "loss_accuracy within 2 points of TDPO1": ours["loss_accuracy"] >= tdpo["loss_accuracy"] - 0.02,
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        _save(options, world, figures, median, ceiling, checks)


def auc(credits: Sequence[Credit], truths: Sequence[np.ndarray]) -> float:
    """Of ranking sentiment words above the other emitted tokens, terminators among them; ties count half."""
    from sklearn.metrics import roc_auc_score

    label = np.concatenate([t[c.trace.mask] != 0 for c, t in zip(credits, truths, strict=True)])
    return float(roc_auc_score(label, np.concatenate([c.values[c.trace.mask] for c in credits])))


def sparsity(credits: Sequence[Credit]) -> float:
    """Percentage of exact zeros among emitted tokens."""
    return 100 * float((np.concatenate([c.values[c.trace.mask] for c in credits]) == 0).mean())


def probe(reference: LM, world: World, traces: Sequence[Trace], truths: Sequence[np.ndarray]) -> float:
    """AUC of a logistic regression, from training responses, on the states that the masks read."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def states(some: Sequence[Trace]) -> np.ndarray:
        found = completions_stats(reference, some, frozenset({"hidden_all"}))
        return np.concatenate([s["hidden_all"][t.mask, 1:].reshape(t.mask.sum(), -1) for s, t in zip(found, some)])

    def labels(some: Sequence[Trace], known: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([v[t.mask] != 0 for t, v in zip(some, known, strict=True)])

    learnt = [t for g in world.train[: world.probed] for t in g.traces]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(states(learnt), labels(learnt, [world.truth(t) for t in learnt]))
    return float(roc_auc_score(labels(traces, truths), model.decision_function(states(traces))))


def _untrained(objective: SparsePO, reference: LM, traces: Sequence[Trace], seed: int) -> list[Credit]:
    """The weights of the networks that this seed starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = objective.init_state(reference.causal.config)
    assert state is not None
    return sparsepo.mask_credit(objective, state.to(reference.device), reference, traces)


def _uniform(trace: Trace) -> Credit:
    return Credit(trace=trace, values=trace.mask.astype(float), kind="weight", method="uniform")


def _save(
    options: Options,
    world: World,
    figures: dict[str, list[dict[str, float]]],
    median: dict[str, dict[str, float]],
    ceiling: float,
    checks: dict[str, bool],
) -> None:
    ours, each = median["sparsepo"], [f["auc"] for f in figures["sparsepo"]]
    against = {"auc": ("uniform weights", 0.5)}
    against |= {key: ("tdpo1", median["tdpo1"][key]) for key in ("accuracy", "loss_accuracy", "kl_chosen")}
    labels = {
        "auc": "AUC of reward weights for sentiment words",
        "sparsity": "exact zeros among the reward weights (%)",
        "kl_sparsity": "exact zeros among the KL weights (%)",
        "accuracy": "held-out pair accuracy of the policy",
        "loss_accuracy": "held-out pair accuracy by masked log-ratio plus masked KL",
        "kl_chosen": "forward KL on held-out chosen responses (nats)",
    }
    rows: list[dict[str, Any]] = [
        {"metric": f"{label}, {name}", "value": m[key]}
        | ({"baseline": against[key][0], "baseline_value": against[key][1]} if key in against else {})
        for name, m in median.items()
        if name != "tdpo1"
        for key, label in labels.items()
        if key in m and (name, key) != ("sparsepo", "auc")
    ]
    rows.append({"metric": "AUC of a logistic probe on the same states (ceiling)", "value": ceiling})
    save_result(
        "sparsepo",
        metric="AUC of SparsePO's reward weights (independent masks, l1_u 0.002, 10x rate) for sentiment words "
        "among the tokens of held-out responses",
        value=ours["auc"],
        interval=(min(each), max(each)),
        baseline="the same network untrained",
        baseline_value=ours["untrained_auc"],
        bound="; ".join(checks),
        reached=all(checks.values()),
        world=world.name,
        seeds=options.seeds,
        notes="interval: least and greatest of the seeds. A weight comes from the state before its token. "
        + "; ".join(f"{check}: {'yes' if good else 'no'}" for check, good in checks.items()),
        rows=rows,
    )


def _slots() -> World:
    world = labelled_pairs("slots45", n_train=800, n_held_out=200)
    config = LoopConfig(lr=3e-4, batch_size=16, steps=150)
    name = "grammar world, preset slots45"
    return World(name, world.policy, world.train, world.held_out, world.truth, config, beta=0.8, auc=0.85)


def _smollm2(out: Path) -> World:
    from pertoken.demo import DemoOptions, sentiment_pairs
    from pertoken.score.vader import compound, lexicon_labels
    from pertoken.worlds.sentiment import lexicon_truth

    train, held_out, _ = sentiment_pairs(DemoOptions(pairs=200, held_out=60), load("smollm2"), out, compound, print)
    config = LoopConfig(lr=1e-5, batch_size=8, epochs=3)
    return World(
        "sentiment world, SmolLM2-135M-Instruct (dequantised Q4_1)",
        lambda: load("smollm2"),
        train,
        held_out,
        lambda trace: lexicon_truth(trace, lexicon_labels),
        config,
        beta=0.1,
        auc=0.60,
        probed=60,  # 30 layers of 576 numbers a token
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
