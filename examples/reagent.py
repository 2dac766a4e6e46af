"""Does ReAGent find the token that an answer was copied from? Planted cues, SmolLM2.

Prompts say a code word once, then something else, then ask: "... the code is X. ... the code is". The target is the
model's own greedy token, which must be X, one token, with p0 >= 0.2; others are skipped and counted. The closing clause
is held fixed and not ranked. B = 4 probes, ratio 0.3, uniform replacements, no stop test, 60 steps. Bound, 20 prompts:
the cue first in at least 50 % and among the first three in at least 80 % of the free tokens; mean Soft-NC above random
scores and above last-layer attention; at most 70 forwards of batch 4 a target.

Missed: first in 0.40, in the top 3 in 0.65 of 20 prompts, and Soft-NC (0.51) is not above random scores' (0.53;
attention 0.39). The shares rise with the steps (first: 0.30 after 20 and 40, 0.40 after 60; top 3: 0.40, 0.40, 0.65),
so 60 steps of four probes end in the noise of the masks. No remedy was measured yet.

Also printed: the rank of the cue after 20, 40 and 60 steps, and with a clause that is free.

    python examples/reagent.py           20 prompts (ten minutes on one core: 61 forwards of batch 4 each)
    python examples/reagent.py --n 4     a look
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
CLAUSE = "the code is"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    n: int = 20
    """Prompts that count."""
    steps: int = 60
    least: float = 0.2
    """p0 that a prompt must have."""
    free: int = 4
    """Prompts that are also run with a free clause."""
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
    for word in WORDS:
        for frame in FRAMES:
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
                clause = len(lm.encode_completion(f" {CLAUSE}", ended=False)[0])
                out.append(
                    {"ids": ids, "cue": ids.index(cue[0]), "target": cue[0], "clause": clause, "p0": float(p[cue[0]])}
                )
    order = np.random.default_rng(0).permutation(len(out))[: options.n]
    return [out[i] for i in order], skipped


def rank(scores: np.ndarray, cue: int) -> int:
    """Place of the cue among free positions (1: first)."""
    return 1 + int((scores > scores[cue]).sum())


def main(options: Options) -> None:
    """Run it and print the table."""
    lm = load("smollm2", template="plain")
    some, skipped = prompts(lm, options)
    print(f"{len(some)} prompts; skipped: {skipped}")
    ranks: dict[str, list[int]] = {}
    metrics: dict[str, list[float]] = {"reagent": [], "random": [], "attention": []}
    forwards, undefined, frees = 0, 0, []
    for number, prompt in enumerate(tqdm(some, unit="prompt")):
        ids, held = prompt["ids"], tuple(range(-prompt["clause"], 0))
        seen: dict[int, np.ndarray] = {}

        def watch(step: int, scores: torch.Tensor, held: int = prompt["clause"], seen: Any = seen) -> None:
            if step in (20, 40, options.steps):
                free = torch.cat([scores[:, :-held], torch.full_like(scores[:, -held:], -torch.inf)], 1)
                seen[step] = free.softmax(1).mean(0).numpy()

        method = ReAGent(
            probes=4, max_steps=options.steps, sampler="uniform", stop=Stop(among=0), fixed=held, seed=number
        )
        found = method.attribute(lm, ids, prompt["target"], watch=watch)
        for step, values in seen.items():
            ranks.setdefault(f"{step} steps", []).append(rank(values, prompt["cue"]))
        forwards, scores = max(forwards, found["forwards"]), found["scores"]
        frees.append(sum(i not in lm.view.special_ids for i in ids) - prompt["clause"])
        rng = np.random.default_rng([1, number])
        rivals = {"reagent": scores, "random": rng.random(len(ids)) * (scores > 0), "attention": attention(lm, ids)}
        rivals["attention"] = rivals["attention"] * (scores > 0)
        for name, values in rivals.items():
            nc = soft_faithfulness(lm, ids, values, rng=np.random.default_rng([2, number]))["soft_nc"]
            undefined += bool(np.isnan(nc))
            metrics[name].append(nc)
        if number < options.free:
            method = ReAGent(probes=4, max_steps=options.steps, sampler="uniform", stop=Stop(among=0), seed=number)
            free = method.attribute(lm, ids, prompt["target"])["scores"]
            ranks.setdefault("clause free", []).append(rank(free, prompt["cue"]))
    print(f"{'':<14}{'first':>8}{'top 3':>8}   ranks")
    for name, values in ranks.items():
        r = np.array(values)
        print(f"{name:<14}{(r == 1).mean():>8.2f}{(r <= 3).mean():>8.2f}   {values}")
    nc = {name: float(np.nanmean(values)) for name, values in metrics.items()}
    print(f"Soft-NC {nc}, undefined {undefined}; forwards a target {forwards}; free tokens {np.mean(frees):.1f}")
    last = np.array(ranks[f"{options.steps} steps"])
    first, third = float((last == 1).mean()), float((last <= 3).mean())
    reached = first >= 0.5 and third >= 0.8 and nc["reagent"] > max(nc["random"], nc["attention"]) and forwards <= 70
    print("reached" if reached else "MISSED")
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
            bound="first in 50 %, in the top 3 in 80 %; Soft-NC above random and attention; at most 70 forwards",
            reached=bool(reached),
            world=f"SmolLM2-135M-Instruct, {n} prompts with one planted code word, closing clause fixed",
            seeds=list(range(n)),
            notes=f"top 3 in {third:.2f}; {forwards} forwards of batch 4; skipped: {skipped}; interval: bootstrap",
            rows=[{"metric": f"mean Soft-NC, {name}", "value": value} for name, value in nc.items()]
            + [
                {"metric": f"cue first, {name}", "value": float((np.array(v) == 1).mean())} for name, v in ranks.items()
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
