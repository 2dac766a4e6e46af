"""Tokens a second of the tokenize room: StochasTok beside the BPE-dropout of Hugging Face's tokenizers, and merging.

StochasTok is timed as it is used: the fast tokenizer's ids, then splits on ids, one text at a time, against the same
tokenizer with ``dropout`` at the rate that makes as many tokens (found by bisection before anything is timed; dropout
goes round the tokenizer's cache and merges again with gaps). Dynamic tokenization's merging of a batch is timed against
counting every pair afresh at each merge, as the release does, with the same merges. Alternated, medians.

(Not called tokenize.py: beside a script, that name would hide Python's own module.)

    python benchmarks/tokenize_speed.py --save
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tokenizers import Tokenizer

from pertoken.core.lm import load
from pertoken.results import save_result
from pertoken.tokenize.dynamic_tokenization import Boundary, DynamicTokenization, Symbols
from pertoken.tokenize.stochastok import StochasTok


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    model: str = "smollm2"
    """Whose tokenizer."""
    texts: int = 400
    """Texts of PERTOKEN_DATA's corpora."""
    proportion: float = 0.1
    """p of StochasTok."""
    batch: int = 32
    """Texts of a batch that is merged."""
    merges: int = 200
    """M, merges of a batch."""
    repeats: int = 5
    """Timed runs of each side."""
    save: bool = False
    """Write results/tokenize-speed.json."""


def corpus(n: int) -> list[str]:
    """Texts of up to 2,000 characters."""
    if not os.environ.get("PERTOKEN_DATA"):
        raise ValueError("set PERTOKEN_DATA to the folder that holds corpora/domains.jsonl.gz")
    with gzip.open(Path(os.environ["PERTOKEN_DATA"]) / "corpora" / "domains.jsonl.gz", "rt", encoding="utf8") as lines:
        texts = [json.loads(line)["text"][:2000] for line in lines]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:n]]


def alternated(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds of each side, and what it returned, taken in turn after one run that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    counts = {name: run() for name, run in sides.items()}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: (float(np.median(some)), counts[name]) for name, some in seconds.items()}


def with_dropout(tokenizer: Any, texts: list[str], tokens: int) -> tuple[Tokenizer, float]:
    """The tokenizer with the dropout at which the texts have about so many tokens."""
    core, low, high = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), 0.0, 0.5
    for _ in range(12):
        core.model.dropout = (low + high) / 2
        few = sum(len(core.encode(text, add_special_tokens=False).ids) for text in texts) < tokens
        low, high = (core.model.dropout, high) if few else (low, core.model.dropout)
    return core, float(core.model.dropout)


def recounted(rows: list[list[int]], boundary: Boundary, symbols: Symbols, merges: int) -> list[list[int]]:
    """The same merges with every pair of the batch counted at each of them (of equals, the first met)."""
    for _ in range(merges):
        counts = Counter(pair for row in rows for pair in pairwise(row))
        valid = (pair for pair in counts if boundary(*pair))
        best = max(valid, key=counts.__getitem__, default=None)
        if best is None:
            break
        new, made = symbols.joined(*best), []
        for row in rows:
            out, at = [], 0
            while at < len(row):
                hit = at + 1 < len(row) and (row[at], row[at + 1]) == best
                out.append(new if hit else row[at])
                at += 1 + hit
            made.append(out)
        rows = made
    return rows


def main(options: Options) -> None:
    """Measure, print, save."""
    tokenizer = load(options.model, template="plain").tokenizer
    texts = corpus(options.texts)
    size = sum(len(text.encode()) for text in texts)
    method = StochasTok(proportion=options.proportion)
    fast = tokenizer.backend_tokenizer
    encode = lambda text: fast.encode(text, add_special_tokens=False).ids
    rows = [encode(text) for text in texts]
    expanded = lambda: sum(len(method.expand(encode(text), tokenizer, i)[0]) for i, text in enumerate(texts))
    core, rate = with_dropout(tokenizer, texts, expanded())
    found = alternated(
        {
            "StochasTok, from text": expanded,
            "BPE-dropout": lambda: sum(len(core.encode(t, add_special_tokens=False).ids) for t in texts),
            "StochasTok, from ids": lambda: sum(len(method.expand(r, tokenizer, i)[0]) for i, r in enumerate(rows)),
            "tokenizer alone": lambda: sum(len(encode(text)) for text in texts),
        },
        options.repeats,
    )
    print(
        f"{len(texts)} texts, {size / 1e6:.2f} MB, {sum(map(len, rows))} tokens; "
        f"p {options.proportion}, dropout {rate:.4f}"
    )
    for name, (seconds, count) in found.items():
        print(
            f"  {name:<24}{count:>9} tokens  {count / seconds / 1e3:9.0f} thousand a second"
            f"  {size / seconds / 1e6:7.2f} MB/s"
        )
    ratio = found["BPE-dropout"][0] / found["StochasTok, from text"][0]
    print(f"StochasTok from text is {ratio:.2f} x as fast as BPE-dropout")
    symbols = Symbols(tokenizer)
    dynamic = DynamicTokenization(merges=options.merges)
    batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
    before = sum(map(len, rows))

    def kept() -> int:
        return sum(len(row) for batch in batches for row in dynamic.merge(batch, dynamic.rule(symbols)).rows)

    def afresh() -> int:
        rule = dynamic.rule(symbols)
        return sum(len(row) for batch in batches[:1] for row in recounted(batch, rule, symbols, options.merges))

    def kept_first() -> int:
        return sum(len(row) for row in dynamic.merge(batches[0], dynamic.rule(symbols)).rows)

    merging = alternated({"ours": kept_first, "counted afresh": afresh, "all batches": kept}, options.repeats)
    rule = dynamic.rule(symbols)
    if dynamic.merge(batches[0], rule).rows != recounted(batches[0], rule, symbols, options.merges):
        raise ValueError("the two ways of counting make other merges")
    gain = merging["counted afresh"][0] / merging["ours"][0]
    seconds, after = merging["all batches"]
    print(
        f"merging {options.merges} times, batches of {options.batch}: {before} -> {after} tokens, "
        f"{before / seconds / 1e3:.0f} thousand tokens a second; {gain:.1f} x as fast as counting afresh (one batch)"
    )
    if options.save:
        save_result(
            "tokenize-speed",
            metric="time of BPE-dropout over StochasTok's, from text, at as many tokens (more is better)",
            value=ratio,
            interval=None,
            baseline="tokenizers' BPE with dropout",
            baseline_value=1.0,
            bound="none is specified",
            reached=None,
            world=f"{options.model}'s tokenizer, {len(texts)} texts, {size / 1e6:.2f} MB",
            seeds=[0],
            notes=f"p {options.proportion}, dropout {rate:.4f}; one thread; medians of {options.repeats}, alternated",
            rows=[
                *({"metric": f"tokens a second, {n}", "value": count / s} for n, (s, count) in found.items()),
                {
                    "metric": f"tokens a second, {options.merges} merges of {options.batch} texts",
                    "value": before / seconds,
                },
                {"metric": "time of counting afresh over ours, one batch", "value": gain},
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
