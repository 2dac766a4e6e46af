"""Does ReAGent find the token that an answer was copied from? Planted cues, SmolLM2.

Prompts say a code word once, then something else, then ask: "... the code is X. ... the code is". The target is the
model's own greedy token, which must be X, one token, with p0 >= 0.2; others are skipped and counted. The last 6 tokens
(the closing clause) are held fixed and not ranked. B = 4 probes, ratio 0.3, uniform replacements, no stop test, 60
steps. Bound, 20 prompts: the cue first in at least 50 % and among the first three in at least 80 % of the free tokens;
mean Soft-NC above random scores and above last-layer attention; at most 70 forwards of batch 4 a target.

Soft-NC grows with the sum of the scores, whatever they say, so scores are compared that sum to 1 over the free tokens
(as the authors' evaluation does: a softmax of noise is their random). Divided by their maximum, as softmax scores
shrink with t, they are printed too: there random scores, which are all but even, remove most of every token.

Also printed: the rank of the cue after 20, 40 and 60 steps, with 3 tokens held and with none. Remedies (REMEDIES) are
to be chosen on the development prompts (other frames, other words); none was measured yet.

Missed in part: after 60 steps the cue is first in 0.30 and in the top 3 in 0.55 of 20 prompts (bounds 0.50 and 0.80);
Soft-NC is above both rivals (0.28; random 0.15, attention 0.23), with 61 forwards. An earlier run held 3 tokens of the
clause, not 6, and compared scores of unequal sums: 0.40, 0.65, Soft-NC 0.51 against 0.53 of random scores. Ranks get
better with steps (first in 0.15, 0.25, 0.30 after 20, 40, 60), so that 60 steps of 4 probes look like too few, which
"240 steps" would tell. It seems no bug of the arithmetic: converged scores of a small model rank as inseq's do, with
correlations of 0.92 to 0.96 (`benchmarks/explain.py`).

    python examples/reagent.py           20 prompts (five minutes on one core)
    python examples/reagent.py --split dev --n 8 --remedies "ratio 0.1" "shape" "inferential"
    python examples/reagent.py --n 4     a look
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pertoken.core.lm import LM, load
from pertoken.core.packing import evaluating
from pertoken.explain._replacement import soft_faithfulness
from pertoken.explain.reagent import ReAGent, Stop
from pertoken.results import save_result

WORDS = (
    "apple river stone cloud tiger piano lemon bread horse glass paper chair green silver orange forest desert winter "
    "summer garden bridge castle dragon button candle engine rocket pepper pencil mirror"
).split()
FRAMES = (
    "Listen: the code is {0}. We left at noon. Again, the code is",
    "Today the code is {0}. It rained a lot. So the code is",
    "He said the code is {0}. Nobody spoke then. Remember, the code is",
)
OTHER_WORDS = (
    "coffee monkey window flower island rabbit violin cotton copper tomato ladder market ocean planet carpet basket"
).split()
OTHER_FRAMES = (
    "Please note: the code is {0}. Our train was late. Once more, the code is",
    "She wrote that the code is {0}. Then they had tea. Yes, the code is",
)
HELD = 6
"""Tokens of the closing clause."""
PLAIN: dict[str, Any] = {"sampler": "uniform", "ratio": 0.3}
REMEDIES: dict[str, dict[str, Any]] = {
    "ratio 0.1": {"ratio": 0.1},
    "shape": {"sampler": "shape"},
    "inferential": {"sampler": "inferential"},
    "240 steps": {"max_steps": 240},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    n: int = 20
    """Prompts that count."""
    steps: int = 60
    least: float = 0.2
    """p0 that a prompt must have."""
    split: Literal["test", "dev"] = "test"
    """The prompts of the bound, or those that remedies are chosen on."""
    remedies: tuple[str, ...] = ()
    """Which of REMEDIES to measure, too."""
    free: int = 6
    """Prompts that are also run with three tokens held, and with none."""
    save: bool = False
    """Write results/reagent.json."""


@torch.no_grad()
def next_token(lm: LM, ids: tuple[int, ...]) -> torch.Tensor:
    """Probabilities (V,)."""
    return lm.causal(torch.tensor([ids])).logits[0, -1].float().softmax(-1)


@torch.no_grad()
def attention(lm: LM, ids: tuple[int, ...]) -> np.ndarray:
    """Last layer's attention of the last position, mean over heads, (t,)."""
    was = lm.causal.config._attn_implementation
    lm.causal.set_attn_implementation("eager")
    try:
        with evaluating(lm.causal):
            found = lm.causal(torch.tensor([ids]), output_attentions=True).attentions[-1]
    finally:
        lm.causal.set_attn_implementation(was)
    return found[0].mean(0)[-1].double().numpy()


def prompts(lm: LM, options: Options) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Prompts whose greedy next token is their cue, and why others were skipped."""
    out: list[dict[str, Any]] = []
    skipped = {"the cue is not one token": 0, "the greedy token is another": 0, "p0 too low": 0}
    words, frames = (WORDS, FRAMES) if options.split == "test" else (OTHER_WORDS, OTHER_FRAMES)
    for word in words:
        for frame in frames:
            ids, pieces = lm.encode_completion(frame.format(word), ended=False)
            cue = lm.encode_completion(f" {word}", ended=False)[0]
            if len(cue) != 1 or ids.count(cue[0]) != 1:
                skipped["the cue is not one token"] += 1
                continue
            p = next_token(lm, ids)
            if int(p.argmax()) != cue[0]:
                skipped["the greedy token is another"] += 1
            elif p[cue[0]] < options.least:
                skipped["p0 too low"] += 1
            else:
                out.append({"ids": ids, "cue": ids.index(cue[0]), "target": cue[0], "p0": float(p[cue[0]])})
    order = np.random.default_rng(0).permutation(len(out))[: options.n]
    return [out[i] for i in order], skipped


def rank(scores: np.ndarray, cue: int) -> int:
    """Place of the cue among free positions (1: first)."""
    return 1 + int((scores > scores[cue]).sum())


def faithfulness(lm: LM, ids: tuple[int, ...], scores: np.ndarray, seed: list[int], rescale: bool) -> float:
    """Soft-NC."""
    return soft_faithfulness(lm, ids, scores, rng=np.random.default_rng(seed), rescale=rescale)["soft_nc"]


def main(options: Options) -> None:
    """Run it and print the table."""
    lm = load("smollm2", template="plain")
    some, skipped = prompts(lm, options)
    print(f"{len(some)} prompts; skipped: {skipped}")
    ranks: dict[str, list[int]] = {}
    metrics: dict[str, dict[str, list[float]]] = {"sum 1": {}, "maximum 1": {}}
    rows, undefined, frees = 0, 0, []
    for number, prompt in enumerate(tqdm(some, unit="prompt")):
        ids, cue, target = prompt["ids"], prompt["cue"], prompt["target"]
        held = tuple(range(-HELD, 0))
        common: dict[str, Any] = PLAIN | {"probes": 4, "max_steps": options.steps, "stop": Stop(among=0)}
        common |= {"seed": number}

        def watch(step: int, scores: torch.Tensor, cue: int = cue) -> None:
            if step in (20, 40, options.steps):
                values = scores[:, :-HELD].softmax(1).mean(0).numpy()
                ranks.setdefault(f"{step} steps", []).append(rank(values, cue))

        found = ReAGent(**common, fixed=held).attribute(lm, ids, target, watch=watch)
        rows, scores = max(rows, found["rows"]), found["scores"]
        free = scores > 0
        frees.append(int(free.sum()))
        noise = np.exp(np.random.default_rng([1, number]).random(len(ids)))
        rivals = {"reagent": scores, "random": noise * free, "attention": attention(lm, ids) * free}
        for name, how in REMEDIES.items():
            if name in options.remedies:
                rivals[name] = ReAGent(**common | how, fixed=held).attribute(lm, ids, target)["scores"]
                ranks.setdefault(name, []).append(rank(rivals[name], cue))
        for name, values in rivals.items():
            for scale, rescale in (("sum 1", False), ("maximum 1", True)):
                nc = faithfulness(lm, ids, values / values.sum(), [2, number], rescale)
                undefined += bool(np.isnan(nc))
                metrics[scale].setdefault(name, []).append(nc)
        if number < options.free:
            for held_too in (3, 0):
                other = ReAGent(**common, fixed=tuple(range(-held_too, 0))).attribute(lm, ids, target)["scores"]
                ranks.setdefault(f"{held_too} held", []).append(rank(other, cue))
    print(f"{'':<14}{'first':>8}{'top 3':>8}   ranks")
    for name, values in ranks.items():
        r = np.array(values)
        print(f"{name:<14}{(r == 1).mean():>8.2f}{(r <= 3).mean():>8.2f}   {values}")
    table = {scale: {name: float(np.nanmean(v)) for name, v in of.items()} for scale, of in metrics.items()}
    for scale, of in table.items():
        print(f"Soft-NC, scores of {scale}: " + ", ".join(f"{name} {value:.4f}" for name, value in of.items()))
    forwards, nc = math.ceil(rows / 4), table["sum 1"]
    print(f"undefined {undefined}; forwards of batch 4 a target {forwards}; free tokens {np.mean(frees):.1f}")
    last = np.array(ranks[f"{options.steps} steps"])
    first, third = float((last == 1).mean()), float((last <= 3).mean())
    checks = {
        "cue first in at least 50 %": first >= 0.5,
        "cue in the top 3 in at least 80 %": third >= 0.8,
        "Soft-NC above random scores and attention": nc["reagent"] > max(nc["random"], nc["attention"]),
        "at most 70 forwards of batch 4": forwards <= 70,
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        n = len(last)
        draws = np.random.default_rng(0).integers(0, n, (2000, n))
        low, high = np.quantile((last[draws] == 1).mean(1), [0.025, 0.975]).tolist()
        save_result(
            "reagent",
            metric="share of prompts whose planted cue is ranked first",
            value=first,
            interval=(low, high),
            baseline="random ranking of the free tokens",
            baseline_value=float(np.mean([1 / f for f in frees])),
            bound="; ".join(checks),
            reached=all(checks.values()),
            world=f"SmolLM2-135M-Instruct, {n} prompts with one planted code word, last {HELD} tokens fixed",
            seeds=list(range(n)),
            notes=f"{forwards} forwards of batch 4; skipped: {skipped}; interval: bootstrap of prompts; "
            + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
            rows=[
                {"metric": f"mean Soft-NC of scores of {scale}, {name}", "value": value}
                for scale, of in table.items()
                for name, value in of.items()
            ]
            + [
                {"metric": f"cue {words}, {name} ({len(v)} prompts)", "value": float((np.array(v) <= top).mean())}
                for name, v in ranks.items()
                for words, top in (("first", 1), ("in the top 3", 3))
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
