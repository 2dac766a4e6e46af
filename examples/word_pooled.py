"""Which model knows the next word: pooled words, bytes or subwords, at equal time and equal size?

Three arms from scratch on Tiny Shakespeare (PERTOKEN_DATA's corpora), normalised as in the release (punctuation apart,
single spaces), each with a space before every word; the last fifth of the text is held out. All have blocks of the same
kind and width, parameters within 10 % of each other (the baselines' layers are chosen so), the same windows of words in
training, and as much of it: by default the same number of seconds (of processor time on a CPU, of the clock on an
accelerator), with --full as many steps as fit into the same time, seconds a step being measured before (medians, arm
after arm in turn), and, beside it, into the same floating-point operations of forward passes. Of held-out words,
each with half a window of context or more, all arms are asked the same: the greedy spelling up to the next space, as a
string.

How much training, with --full: the time that takes the subword model through the text 5, 10 or 20 times, whichever
budget gives the best word accuracy that either BASELINE has, with seed 0, on the last 5,000 words of the training
part (kept from training then and in what is reported). The bound is judged at equal time, which the specification
names first; written before any of it was run.

The bound belongs to --full: word accuracy at least 1.3 times the byte model's and 1.0 times the subword model's, and on
words seen 1 to 9 times in training twice the subword model's (undecided below 20 hits in both). The default run is too
short for one; it prints the arms and judges nothing.

Missed by --full: 0.120 against 0.132 of bytes and 0.170 of subwords at equal time, in which a pooled step takes that of
3.0 subword steps (on a GPU that other jobs shared). At equal operations it is above bytes, 0.107 against 0.089. No arm
ever has a word right that was seen less than ten times. Both baselines still get better with the budget, of which 20
passes, the most that was offered, were taken.

    python examples/word_pooled.py           2 layers x 128, p = 2, windows of 32 words, 50 s an arm (three minutes)
    python examples/word_pooled.py --full    4 layers x 256, p = 4, windows of 64 words, two seeds (minutes on a GPU)
"""

from __future__ import annotations

import gzip
import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.results import save_result
from pertoken.tokenize import _pooled_training as training
from pertoken.tokenize.word_pooled import Spelling, WordPooled
from pertoken.tokenize.word_pooled import measure as m
from pertoken.tokenize.word_pooled.codec import normalise

LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    width: int = 128
    layers: int = 2
    prefix: int = 2
    window: int = 32
    vocabulary: int = 2048
    """Of the subword model."""
    seconds: float = 50.0
    batch: int = 8
    words: int = 3000
    """Held-out words."""


FULL = Size(width=256, layers=4, prefix=4, window=64, vocabulary=4096, batch=32, words=10_000)
EPOCHS = (5, 10, 20)
"""Budgets of --full: the time, or forward operations, of so many passes of the subword model over the text."""
VALIDATION = 5000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = ()
    """Default: 1; with --full 1 and 2."""
    full: bool = False
    """The specification's size, whose bound is judged."""
    seconds: float | None = None
    """Of training an arm, if other than the size's; without --full."""
    epochs: tuple[int, ...] = EPOCHS
    """With --full: the budgets to choose from, in passes of the subword model over the text."""
    device: str = ""
    """Default: an accelerator if there is one."""
    save: bool = False
    """Write results/word-pooled.json."""


def text() -> str:
    """Tiny Shakespeare, normalised, with a space before every word.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds corpora/tinyshakespeare.txt.gz")
    with gzip.open(Path(folder) / "corpora" / "tinyshakespeare.txt.gz", "rt", encoding="utf8") as file:
        return " " + normalise(file.read())


def arms(size: Size, words: list[bytes], held: list[bytes], seed: int) -> dict[str, Any]:
    """The three, with random weights; parameters of the baselines as near the pooled model's as whole layers allow."""
    heads, every = max(1, size.width // 32), [*words, *held]
    # chunks of the longest words may make a window longer than its words: half as many places more
    options = WordPooled(
        prefix=size.prefix, width=size.width, layers=size.layers, heads=heads, spelling=Spelling(layers=1, heads=4),
        block=size.window + size.window // 2, longest=LONGEST, dropout=0.1,
    )  # fmt: skip
    codec = options.codec()
    out: dict[str, Any] = {"word-pooled": m.PooledArm(options.build(codec, seed=seed), codec)}
    count = lambda model: sum(p.numel() for p in model.parameters())
    target = count(out["word-pooled"].model)
    joined = b"".join(words).decode()
    for name, (pieces, cut) in {
        "bytes": m.byte_pieces(),
        "subwords": m.subword_pieces(joined, size.vocabulary),
    }.items():
        sizes = {word: len(cut(word)) for word in set(every)}
        total = np.cumsum([0, *(sizes[word] for word in every)])
        # a few places more than the longest window, for words that are spelled in more pieces
        places = int((total[size.window :] - total[: -size.window]).max()) + 16
        made = [options.baseline(len(pieces), places, layers, seed=seed) for layers in range(1, 2 * size.layers + 4)]
        model = min(made, key=lambda model: abs(count(model) / target - 1))
        if abs(count(model) / target - 1) > 0.1:
            raise ValueError(f"{name}: {count(model)} parameters, {target} of the pooled model; change vocabulary")
        out[name] = m.GPTArm(model, pieces, cut)
    return out


def trained(name: str, arm: Any, words: list[bytes], size: Size, seed: int, device: str, **budget: Any) -> str:
    """Train an arm; what it was."""
    arm.model.to(device)
    begun = time.perf_counter()
    steps = training.train(arm, words, lr=1e-3, window=size.window, batch=size.batch, seed=seed, **budget)
    took = time.perf_counter() - begun
    parameters = sum(p.numel() for p in arm.model.parameters())
    return f"{name}, seed {seed}: {parameters:,} parameters, {steps} steps, {took:.0f} s"


def costs(size: Size, words: list[bytes], held: list[bytes], device: str) -> dict[str, dict[str, float]]:
    """What a step of each arm costs, the subword model's being 1: of time, and of forward operations."""
    made = arms(size, words, held, 0)
    for arm in made.values():
        arm.model.to(device)
    how: dict[str, Any] = {"window": size.window, "batch": size.batch, "seed": 0}
    flops = {name: training.forward_flops(arm, words, **how) for name, arm in made.items()}
    seconds = training.step_seconds(made, words, **how)
    print(f"seconds a step {seconds}, forward operations {flops}", flush=True)
    relative = lambda of: {name: of[name] / of["subwords"] for name in of}
    return {"time": relative(seconds), "operations": relative(flops)}


def chosen(
    options: Options, size: Size, words: list[bytes], held: list[bytes], device: str, cost: dict[str, float]
) -> int:
    """Passes over the text at which the better baseline is best on the last words of the training part."""
    part, asked = words[:-VALIDATION], words[-VALIDATION:]
    best: dict[int, float] = {}
    for epochs in options.epochs:
        made, best[epochs] = arms(size, part, [*asked, *held], 0), 0.0
        for name in ("bytes", "subwords"):
            said = trained(name, made[name], part, size, 0, device, steps=steps_of(epochs, part, size, cost[name]))
            found = float(m.measure(made[name], asked, size.window).word_accuracy or 0.0)
            best[epochs] = max(best[epochs], found)
            print(f"budget {epochs}: {said}; validation {found:.4f}", flush=True)
    return max(best, key=best.__getitem__)


def steps_of(epochs: float, words: list[bytes], size: Size, cost: float) -> int:
    """Steps of an arm in what so many passes over the text take the subword model."""
    return max(1, round(epochs * len(words) / (size.window * size.batch) / cost))


def main(options: Options) -> None:
    """Run it and print the table."""
    size = FULL if options.full else Size()
    seconds = size.seconds if options.seconds is None else options.seconds
    if options.full and options.seconds is not None:
        raise ValueError("--full counts steps; leave --seconds out, or --full")
    seeds = options.seeds or ((1, 2) if options.full else (1,))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    every = [f" {word}".encode() for word in text().split()]
    words, held = every[: len(every) * 4 // 5], every[len(every) * 4 // 5 :][: size.words]
    kinds, told, epochs = {"time": {}}, f"{seconds:g} s an arm", 0
    if options.full:
        kinds = costs(size, words, held, device)
        epochs = chosen(options, size, words, held, device, kinds["time"])
        told = f"{epochs} (of {options.epochs}) passes of the subword model over the text, of equal time"
        words = words[:-VALIDATION]
    seen = Counter(words)
    print(f"{len(words)} words to learn from, {len(held)} held out; {told} on {device}", flush=True)
    found: dict[str, list[m.Measured]] = {}
    for kind, seed in itertools.product(kinds, seeds):
        for arm_name, arm in arms(size, words, held, seed).items():
            if kind == "operations" and arm_name == "subwords":
                continue  # as many steps as before
            cost = kinds[kind].get(arm_name, 1.0)
            budget = {"steps": steps_of(epochs, words, size, cost)} if options.full else {"seconds": seconds}
            said = trained(arm_name, arm, words, size, seed, device, **budget)
            result = m.measure(arm, held, size.window)
            name = arm_name if kind == "time" else f"{arm_name}, equal operations"
            found.setdefault(name, []).append(result)
            rare = {f"{low}-{high or ''}": pair for (low, high), pair in result.buckets(seen).items()}
            print(
                f"{said}, equal {kind}; next word {result.word_accuracy:.4f}, unit {result.unit_accuracy:.4f}, "
                f"{result.bits_per_byte:.4f} bits a byte; hits by training count {rare}",
                flush=True,
            )
    mean = lambda name, what: float(np.mean([getattr(f, what) for f in found[name]]))
    accuracy = {name: mean(name, "word_accuracy") for name in found}
    rare = {name: np.sum([f.buckets(seen)[1, 10] for f in found[name]], axis=0).tolist() for name in found}
    pooled, subword = rare["word-pooled"][0], rare["subwords"][0]
    decided = max(pooled, subword) >= 20
    ratios = [accuracy["word-pooled"] / max(accuracy[name], 1e-9) for name in ("bytes", "subwords")]
    enough = ratios[0] >= 1.3 and ratios[1] >= 1.0 and (pooled >= 2 * subword or not decided)
    reached = bool(enough) if options.full else None
    verdict = "" if reached is None else f": {'reached' if reached else 'MISSED'}"
    said = f"words seen 1-9 times, hits of words: {rare}" + ("" if decided else " (undecided: below 20 hits)")
    print(
        f"next-word accuracy over the byte model's {ratios[0]:.3f}, over the subword model's {ratios[1]:.3f}{verdict}"
    )
    print(said)
    if options.save:
        rows = [
            {"metric": "bits a byte", "value": mean("word-pooled", "bits_per_byte"), "baseline": name,
             "baseline_value": mean(name, "bits_per_byte")} for name in ("bytes", "subwords")
        ]  # fmt: skip
        if options.full:
            rows += [
                {
                    "metric": f"next-word accuracy, {name}",
                    "value": accuracy[name],
                    "notes": f"words seen 1-9 times: {rare[name]}",
                }
                for name in found
                if name.endswith("operations")
            ]
        other = {"metric": "next-word accuracy", "value": accuracy["word-pooled"], "baseline": "bytes"}
        save_result(
            "word-pooled",
            metric="next-word accuracy on held-out words, greedy spelling to the next space",
            value=accuracy["word-pooled"],
            interval=None,
            baseline="subwords, equal time and parameters",
            baseline_value=accuracy["subwords"],
            bound="1.3 times the byte model, 1.0 times the subword model, twice it on words seen 1-9 times"
            + ("" if options.full else " (of --full; not judged)"),
            reached=reached,
            world=f"Tiny Shakespeare, {size.layers} layers x {size.width}, p = {size.prefix}, {told} ({device})",
            seeds=seeds,
            notes=said,
            rows=[{**other, "baseline_value": accuracy["bytes"]}, *rows],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
