"""Does ReAGent find the token that an answer was copied from? Planted cues, SmolLM2; human rationales of LAMBADA.

Prompts say a code word once, then something else, then ask: "... the code is X. ... the code is". The target is the
model's own greedy token, which must be X, one token, with p0 >= 0.2; others are skipped and counted. The last 6 tokens
(the closing clause) are held fixed and not ranked. B = 4 probes, ratio 0.3, uniform replacements, no stop test, 60
steps. Bound, 20 prompts: the cue first in at least 50 % and among the first three in at least 80 % of the free tokens;
mean Soft-NC above random scores and above last-layer attention; at most 70 forwards of batch 4 a target. On a GPU
(``--full``) 60 prompts and 200 steps, whose forwards are printed and not bounded.

Soft-NC grows with the sum of the scores, whatever they say, so scores are compared that sum to 1 over the free tokens
(as the authors' evaluation does: a softmax of noise is their random). Divided by their maximum, as softmax scores
shrink with t, they are printed too: there random scores, which are all but even, remove most of every token.

Also printed: the rank of the cue after fewer steps, with 3 tokens held and with none.

Remedies (REMEDIES). The rule, written before any was measured: `--choose` measures the default and each remedy on the
development prompts (other frames, other words) and takes the one with the largest sum of both shares (first, top 3);
equal ones: the earlier in the list, the default before all. "240 steps" is shown and never chosen, as it costs four
times the forwards. The chosen one is then measured beside the default, once, on the prompts of the bound, which is
judged by the default.

`--rationales` asks whether scores agree with what people marked (PERTOKEN_DATA: rationales, 107 contexts of LAMBADA;
the target is the first token of the last word): AUROC and average precision of the tokens inside the marked words,
beside random scores, last-layer attention, the gradient's norm by a token's embedding, and plain nearness to the end;
for all texts, and for those where p0 >= 0.1. No bound.

Missed in part (``--full``): the cue is first in 0.25 and in the top 3 in 0.78; Soft-NC 0.35 is above random scores
(0.14) and attention (0.21), but divided by the maximum, as the specification has it, 0.47 is below random's 0.52. The
first run on a CPU (20 prompts, 60 steps) had 0.30 and 0.55: more steps help the top 3, not the first place. Chosen was
"inferential, ratio 0.1": 0.47 and 0.98, Soft-NC 0.43, short by two prompts of 60. AUROC on the rationales: 0.58, the
remedy 0.78, attention 0.84, gradient norm 0.86, nearness to the end 0.88: what people marked is mostly near the end.
Converged scores of a small model rank as inseq's do, with correlations of 0.92 to 0.96 (`benchmarks/explain.py`).

    python examples/reagent.py           20 prompts (five minutes on one core)
    python examples/reagent.py --choose --dev 8                  remedies, too (twenty minutes on one core)
    python examples/reagent.py --full --choose --rationales 107  the whole of it: six minutes on a GPU
    python examples/reagent.py --n 4     a look
"""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pertoken.core.lm import LM, load
from pertoken.core.packing import evaluating
from pertoken.explain._detection import auroc
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
MORE_WORDS = (
    "table water fire music doctor letter school coat bird ring gold iron snow sugar salt milk corn shirt shoe boat "
    "train wheel clock lamp brush knife spoon box door wall"
).split()
OTHER_WORDS = (
    "coffee monkey window flower island rabbit violin cotton copper tomato ladder market ocean planet carpet basket "
    "honey rice wood sand tree leaf road field hill lake moon star tower phone"
).split()
OTHER_FRAMES = (
    "Please note: the code is {0}. Our train was late. Once more, the code is",
    "She wrote that the code is {0}. Then they had tea. Yes, the code is",
    "Attention, the code is {0}. The shop was closed. I repeat, the code is",
)
HELD = 6
"""Tokens of the closing clause."""
PLAIN: dict[str, Any] = {"sampler": "uniform", "ratio": 0.3}
REMEDIES: dict[str, dict[str, Any]] = {
    "ratio 0.1": {"ratio": 0.1},
    "shape": {"sampler": "shape"},
    "inferential": {"sampler": "inferential"},
    "inferential, ratio 0.1": {"sampler": "inferential", "ratio": 0.1},
    "240 steps": {"max_steps": 240},
}
FIRST = {"first": 0.30, "in the top 3": 0.55}  # shares of the first run: 20 prompts, 60 steps


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    n: int = 20
    """Prompts that count."""
    steps: int = 60
    least: float = 0.2
    """p0 that a prompt must have."""
    full: bool = False
    """60 prompts, 200 steps."""
    choose: bool = False
    """Choose among REMEDIES on development prompts, and measure the chosen one beside the default."""
    dev: int = 40
    """Development prompts."""
    rationales: int = 0
    """Texts of LAMBADA with human rationales (there are 107)."""
    free: int = 6
    """Prompts that are also run with three tokens held, and with none."""
    save: bool = False
    """Write results/reagent.json."""


@torch.no_grad()
def next_token(lm: LM, ids: tuple[int, ...]) -> torch.Tensor:
    """Probabilities (V,)."""
    return lm.causal(torch.tensor([ids], device=lm.device)).logits[0, -1].float().softmax(-1).cpu()


@torch.no_grad()
def attention(lm: LM, ids: tuple[int, ...]) -> np.ndarray:
    """Last layer's attention of the last position, mean over heads, (t,)."""
    was = lm.causal.config._attn_implementation
    lm.causal.set_attn_implementation("eager")
    try:
        with evaluating(lm.causal):
            found = lm.causal(torch.tensor([ids], device=lm.device), output_attentions=True).attentions[-1]
    finally:
        lm.causal.set_attn_implementation(was)
    return found[0].mean(0)[-1].double().cpu().numpy()


def gradient_norm(lm: LM, ids: tuple[int, ...], target: int) -> np.ndarray:
    """Length of the gradient of log p(target) by each token's embedding, (t,)."""
    embedded = lm.causal.get_input_embeddings()(torch.tensor([ids], device=lm.device)).detach().requires_grad_()
    with evaluating(lm.causal):
        logp = lm.causal(inputs_embeds=embedded, use_cache=False).logits[0, -1].float().log_softmax(-1)[target]
    (gradient,) = torch.autograd.grad(logp, embedded)
    return gradient[0].norm(dim=1).double().cpu().numpy()


def prompts(lm: LM, words: list[str], frames: tuple[str, ...], least: float) -> tuple[list[Any], dict[str, int]]:
    """Prompts whose greedy next token is their cue, in a seeded order, and why others were skipped."""
    out: list[dict[str, Any]] = []
    skipped = {"the cue is not one token": 0, "the greedy token is another": 0, "p0 too low": 0}
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
            elif p[cue[0]] < least:
                skipped["p0 too low"] += 1
            else:
                out.append({"ids": ids, "cue": ids.index(cue[0]), "target": cue[0], "p0": float(p[cue[0]])})
    return [out[i] for i in np.random.default_rng(0).permutation(len(out))], skipped


def method(steps: int, number: int, how: dict[str, Any], held: int = HELD) -> ReAGent:
    """ReAGent of one prompt."""
    common: dict[str, Any] = PLAIN | {"probes": 4, "max_steps": steps, "stop": Stop(among=0), "seed": number}
    return ReAGent(**common | how, fixed=tuple(range(-held, 0)))


def chosen(lm: LM, options: Options, steps: int) -> tuple[str, dict[str, list[int]]]:
    """The configuration that the rule takes on the development prompts, and the ranks of all."""
    some = prompts(lm, OTHER_WORDS, OTHER_FRAMES, options.least)[0][: options.dev]
    table: dict[str, list[int]] = {}
    for name, how in {"default": {}, **REMEDIES}.items():
        if options.full and "max_steps" in how:
            continue
        table[name] = [
            rank(method(steps, number, how).attribute(lm, p["ids"], p["target"])["scores"], p["cue"])
            for number, p in enumerate(some)
        ]
        r = np.array(table[name])
        print(f"development, {len(r)} prompts: {name:<24}{(r == 1).mean():>6.2f}{(r <= 3).mean():>6.2f}", flush=True)
    allowed = [name for name in table if "max_steps" not in REMEDIES.get(name, {})]
    return max(allowed, key=lambda n: sum((np.array(table[n]) <= top).mean() for top in (1, 3))), table


def average_precision(score: np.ndarray, marked: np.ndarray) -> float:
    """Mean over marked tokens of the share of marked ones among those at least as high."""
    order = np.argsort(-score, kind="stable")
    hit = marked[order]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())


def rationales(lm: LM, n: int, steps: int, hows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Agreement with the words that people marked: rows for the result, and prints.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds rationales/lambada.jsonl.gz")
    with gzip.open(Path(folder) / "rationales" / "lambada.jsonl.gz", "rt", encoding="utf8") as lines:
        texts = [json.loads(line) for line in lines][:n]
    found: dict[str, list[tuple[float, float]]] = {}
    likely, skipped = [], 0
    for number, row in enumerate(tqdm(texts, unit="text")):
        before, word = row["text"].rstrip().rsplit(maxsplit=1)
        # what stands before is encoded by itself, as the model is asked; the last word keeps its space
        ids, pieces = lm.encode_completion(before, ended=False)
        target = lm.encode_completion(f" {word}", ended=False)[0][0]
        spans = [[len(row["text"][:end].encode()) for end in span] for span in row["rationale"]]
        ends = np.cumsum([len(p) for p in pieces])
        starts = ends - [len(p) for p in pieces]
        marked = np.array([any(a < e and s < b for a, b in spans) for s, e in zip(starts, ends, strict=True)])
        if not marked.any() or marked.all():
            skipped += 1
            continue
        likely.append(float(next_token(lm, ids)[target]) >= 0.1)
        scores = {n: method(steps, number, h, held=0).attribute(lm, ids, target)["scores"] for n, h in hows.items()}
        scores["random"] = np.random.default_rng([3, number]).random(len(ids))
        scores["attention"] = attention(lm, ids)
        scores["gradient norm"] = gradient_norm(lm, ids, target)
        scores["nearness to the end"] = np.arange(len(ids), dtype=np.float64)
        for name, values in scores.items():
            found.setdefault(name, []).append((auroc(values, marked), average_precision(values, marked)))
    out, sure = [], np.array(likely, bool)
    for which, of in ((f"all {len(sure)} texts", np.ones(len(sure), bool)), (f"{sure.sum()} texts of p0 >= 0.1", sure)):
        if not of.any():
            continue
        draws = np.random.default_rng(0).integers(0, int(of.sum()), (2000, int(of.sum())))
        print(f"human rationales, {which} ({skipped} without a marked token before the target)")
        for name, values in found.items():
            for k, metric in enumerate(("AUROC", "average precision")):
                v = np.array(values)[of, k]
                low, high = np.quantile(v[draws].mean(1), [0.025, 0.975]).tolist()
                print(f"  {name:<28}{metric:<18}{v.mean():.3f} [{low:.3f}, {high:.3f}]", flush=True)
                out.append({"metric": f"human rationales, {which}: {metric}, {name}", "value": float(v.mean())})
                out[-1]["interval"] = [low, high]
    return out


def rank(scores: np.ndarray, cue: int) -> int:
    """Place of the cue among free positions (1: first)."""
    return 1 + int((scores > scores[cue]).sum())


def faithfulness(lm: LM, ids: tuple[int, ...], scores: np.ndarray, seed: list[int], rescale: bool) -> float:
    """Soft-NC."""
    return soft_faithfulness(lm, ids, scores, rng=np.random.default_rng(seed), rescale=rescale)["soft_nc"]


def main(options: Options) -> None:
    """Run it and print the table."""
    begin = time.monotonic()

    def done(what: str) -> None:
        print(f"  [{time.monotonic() - begin:.0f} s: {what}]", flush=True)

    lm = load("smollm2", template="plain", attention="sdpa")
    n, steps = (60, 200) if options.full else (options.n, options.steps)
    some, skipped = prompts(lm, WORDS, FRAMES, options.least)
    if options.full:
        more, more_skipped = prompts(lm, MORE_WORDS, FRAMES, options.least)
        some, skipped = some + more, {why: k + more_skipped[why] for why, k in skipped.items()}
    some = some[:n]
    print(f"{len(some)} prompts; skipped: {skipped}", flush=True)
    best, tried = chosen(lm, options, steps) if options.choose else ("default", {})
    if options.choose:
        done(f"chosen on the development prompts: {best}")
    remedies = {best: REMEDIES[best]} if best != "default" else {}
    ranks: dict[str, list[int]] = {}
    metrics: dict[str, dict[str, list[float]]] = {"sum 1": {}, "maximum 1": {}}
    rows, undefined, frees = 0, 0, []
    for number, prompt in enumerate(tqdm(some, unit="prompt")):
        ids, cue, target = prompt["ids"], prompt["cue"], prompt["target"]

        def watch(step: int, scores: torch.Tensor, cue: int = cue) -> None:
            if step in (20, 40, 60, 100, steps):
                values = scores[:, :-HELD].softmax(1).mean(0).numpy()
                ranks.setdefault(f"{step} steps", []).append(rank(values, cue))

        found = method(steps, number, {}).attribute(lm, ids, target, watch=watch)
        rows, scores = max(rows, found["rows"]), found["scores"]
        free = scores > 0
        frees.append(int(free.sum()))
        noise = np.exp(np.random.default_rng([1, number]).random(len(ids)))
        rivals = {"reagent": scores, "random": noise * free, "attention": attention(lm, ids) * free}
        for name, how in remedies.items():
            rivals[name] = method(steps, number, how).attribute(lm, ids, target)["scores"]
            ranks.setdefault(name, []).append(rank(rivals[name], cue))
        for name, values in rivals.items():
            for scale, rescale in (("sum 1", False), ("maximum 1", True)):
                nc = faithfulness(lm, ids, values / values.sum(), [2, number], rescale)
                undefined += bool(np.isnan(nc))
                metrics[scale].setdefault(name, []).append(nc)
        if number < options.free:
            for held_too in (3, 0):
                other = method(steps, number, {}, held_too).attribute(lm, ids, target)["scores"]
                ranks.setdefault(f"{held_too} held", []).append(rank(other, cue))
    done("prompts of the bound")
    print(f"{'':<24}{'first':>8}{'top 3':>8}   ranks")
    for name, values in ranks.items():
        r = np.array(values)
        print(f"{name:<24}{(r == 1).mean():>8.2f}{(r <= 3).mean():>8.2f}   {values}")
    table = {scale: {name: float(np.nanmean(v)) for name, v in of.items()} for scale, of in metrics.items()}
    for scale, of in table.items():
        print(f"Soft-NC, scores of {scale}: " + ", ".join(f"{name} {value:.4f}" for name, value in of.items()))
    forwards, nc = math.ceil(rows / 4), table["sum 1"]
    print(f"undefined {undefined}; forwards of batch 4 a target {forwards}; free tokens {np.mean(frees):.1f}")
    last = np.array(ranks[f"{steps} steps"])
    first, third = float((last == 1).mean()), float((last <= 3).mean())
    checks = {
        "cue first in at least 50 %": first >= 0.5,
        "cue in the top 3 in at least 80 %": third >= 0.8,
        "Soft-NC above random scores and attention": nc["reagent"] > max(nc["random"], nc["attention"]),
    }
    if not options.full:
        checks["at most 70 forwards of batch 4"] = forwards <= 70
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}", flush=True)

    def keep(told: list[dict[str, Any]]) -> None:
        if not options.save:
            return
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
            world=f"SmolLM2-135M-Instruct, {n} prompts with one planted code word, last {HELD} tokens fixed, "
            f"{steps} steps",
            seeds=list(range(n)),
            notes=f"{forwards} forwards of batch 4; skipped: {skipped}; interval: bootstrap of prompts; "
            + (f"chosen on the development prompts: {best}; " if options.choose else "")
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
            ]
            + [
                {"metric": f"development: cue {words}, {name} ({len(v)} prompts)", "value": float(np.mean(found))}
                for name, v in tried.items()
                for words, found in (("first", np.array(v) == 1), ("in the top 3", np.array(v) <= 3))
            ]
            + [{"metric": f"first run (20 prompts, 60 steps): cue {k}", "value": v} for k, v in FIRST.items()]
            + told,
        )

    keep([])  # the rationales take a while
    if options.rationales:
        told = rationales(lm, options.rationales, steps, {"reagent": {}, **remedies})
        done("rationales")
        keep(told)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
