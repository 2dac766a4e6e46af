"""How much of a text a rewrite keeps: token edit similarity, and the words that were kept.

A global alignment of words turns the rewrite into the original: KEEP, SUB, INS (a word of the original alone), DEL (of
the rewrite alone); a match scores +2, all else -2. With m operations, d of them not KEEP:

    sim = 0 if d = m, 1 if d = 0, else exp( -d / (m - d) )

Optimal alignments may tie with different (m, d): three SUB score as one KEEP and four INS or DEL do. Ours is the
shortest of the optimal ones, so it is symmetric and depends on no algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MATCH, OTHER = 2, -2
Text = str | Sequence[str]


def edit_similarity(rewrite: Text, original: Text, compat: str | None = None) -> float:
    """sim, in [0, 1].

    Args:
        rewrite, original: texts, cut at white space, or lists of words.
        compat: ``reference`` has the release's alignment (`hirschberg`), and 0 for two empty texts (ours: 1).

    Raises:
        ValueError: an unknown `compat`.
    """
    m, d = operations(rewrite, original, compat)
    if m == 0 and compat is None:
        return 1.0
    return 0.0 if d == m else 1.0 if d == 0 else math.exp(-d / (m - d))


def operations(rewrite: Text, original: Text, compat: str | None = None) -> tuple[int, int]:
    """(m, d) of the alignment."""
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r} is not one of None, reference")
    x, y = _words(rewrite), _words(original)
    if compat == "reference":
        done = hirschberg(x, y)
        return len(done), sum(op != "KEEP" for op in done)
    x_ids, y_ids = _ids(x, y)
    unit = min(len(x), len(y)) + 1  # a score in these units, less the number of KEEPs: the shortest is the largest
    best = int(_last_row(x_ids, y_ids, MATCH * unit - 1, OTHER * unit)[-1])
    score = -(-best // unit)
    kept = score * unit - best
    d = kept - score // MATCH  # score = 2 kept - 2 d
    return kept + d, d


def hirschberg(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The release's alignment: halves of the rewrite, each with its part of the original, the first of equal ones.

    Returns:
        Operations that turn `x` (the rewrite) into `y`.
    """
    if not x or not y:
        return ["INS"] * len(y) + ["DEL"] * len(x)
    if len(x) == 1 or len(y) == 1:
        return _traced(x, y)
    x_ids, y_ids = _ids(x, y)
    half = len(x) // 2
    before = _last_row(x_ids[:half], y_ids, MATCH, OTHER)
    after = _last_row(x_ids[half:][::-1], y_ids[::-1], MATCH, OTHER)[::-1]
    cut = int(np.argmax(before + after))
    return hirschberg(x[:half], y[:cut]) + hirschberg(x[half:], y[cut:])


def copy_rate(rewrite: Text, original: Text) -> float:
    """Share of the rewrite's words that are KEPT; 0 for an empty rewrite."""
    m, d = operations(rewrite, original)
    return (m - d) / max(1, len(_words(rewrite)))


def length_ratio(rewrite: Text, original: Text) -> float:
    """Words of the rewrite by words of the original."""
    return len(_words(rewrite)) / max(1, len(_words(original)))


def _words(text: Text) -> list[str]:
    return text.split() if isinstance(text, str) else list(text)


def _ids(x: Sequence[str], y: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    known = {word: i for i, word in enumerate(dict.fromkeys([*x, *y]))}
    return np.array([known[w] for w in x], np.int64), np.array([known[w] for w in y], np.int64)


def _last_row(x: np.ndarray, y: np.ndarray, match: int, other: int) -> np.ndarray:
    """Best scores of all of x against y[:j], j = 0..len(y)."""
    gaps = other * np.arange(len(y) + 1, dtype=np.int64)
    row = gaps.copy()
    for word in x:
        step = row + other
        step[1:] = np.maximum(step[1:], row[:-1] + np.where(y == word, match, other))
        row = np.maximum.accumulate(step - gaps) + gaps  # INS from any earlier column
    return row


def _traced(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The whole table, traced back from the end: the diagonal first, then DEL, then INS."""
    x_ids, y_ids = _ids(x, y)
    table = [_last_row(x_ids[:i], y_ids, MATCH, OTHER) for i in range(len(x) + 1)]
    done: list[str] = []
    i, j = len(x), len(y)
    while i or j:
        here = table[i][j]
        if i and j and here == table[i - 1][j - 1] + (MATCH if x[i - 1] == y[j - 1] else OTHER):
            done.append("KEEP" if x[i - 1] == y[j - 1] else "SUB")
            i, j = i - 1, j - 1
        elif i and here == table[i - 1][j] + OTHER:
            done.append("DEL")
            i -= 1
        else:
            done.append("INS")
            j -= 1
    return done[::-1]
