"""Merging of neighbouring tokens, the most frequent pair of a batch first.

A token is a number (a *symbol*): a base token's own id, or one that `Symbols` gave to a new byte string. A joined
string that is a base token becomes that token again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ...core.bytes import byte_view
from .._pair_counts import Pair, PairCounts

Rule = Literal["pretokens", "word", "word_hyphen", "sentence"]
SPACES = b" \n\t"
PUNCTUATION = frozenset(b".,!?;:()-\"'\\/`$%&*+<=>@[]^_{|}~")  # without "#"
_DIGITS = frozenset(b"0123456789")


class Symbols:
    """Numbers of tokens: base ids below `base`, new tokens from there on, in the order in which they were made."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.view = tokenizer, byte_view(tokenizer)
        ids = sorted(tokenizer.get_vocab().values())
        self.base = ids[-1] + 1
        raw = lambda i: str(tokenizer.convert_ids_to_tokens(i)).startswith(
            "<0x"
        )  # a fallback's, of which text has none
        self._of: dict[bytes, int] = {}
        for i in sorted((i for i in ids if self.view.piece(i)), key=raw):
            self._of.setdefault(self.view.piece(i), i)
        self._new: list[bytes] = []

    def __len__(self) -> int:
        """Numbers in use."""
        return self.base + len(self._new)

    def piece(self, symbol: int) -> bytes:
        """Bytes of a token; ``b""`` for specials."""
        return self.view.piece(symbol) if symbol < self.base else self._new[symbol - self.base]

    def special(self, symbol: int) -> bool:
        """It stands for no text, so it never merges and keeps its row."""
        return symbol < self.base and (symbol in self.view.special_ids or not self.view.piece(symbol))

    def known(self, piece: bytes) -> int | None:
        """The token of these bytes, if there is one."""
        return self._of.get(piece)

    def of(self, piece: bytes) -> int:
        """The token of these bytes, made if need be."""
        found = self._of.get(piece)
        if found is None:
            found = self._of[piece] = len(self)
            self._new.append(piece)
        return found

    def joined(self, a: int, b: int) -> int:
        """The token that two neighbours become."""
        return self.of(self.piece(a) + self.piece(b))


def inside_one_character(piece: bytes) -> bool:
    """Whether bytes are a proper part of one UTF-8 character."""
    size = next(
        (n for n, low, high in ((2, 0xC2, 0xDF), (3, 0xE0, 0xEF), (4, 0xF0, 0xF4)) if low <= piece[0] <= high), 0
    )
    rest = piece[1:] if size else piece
    return len(piece) < (size or 4) and all(0x80 <= byte <= 0xBF for byte in rest)


class Boundary:
    """Which neighbours may merge (rules 1 to 3 of the module's docstring). Answers are remembered."""

    def __init__(self, symbols: Symbols, rule: Rule = "pretokens", reference: bool = False):
        from tokenizers.pre_tokenizers import WhitespaceSplit

        self.symbols, self.rule, self.reference = symbols, rule, reference
        backend = getattr(symbols.tokenizer, "backend_tokenizer", None)
        if rule == "pretokens" and backend is None:
            raise ValueError("a slow tokenizer shows no pre-tokens; load it with use_fast=True, or use boundary='word'")
        self._split: Any = backend.pre_tokenizer if rule == "pretokens" else WhitespaceSplit()
        self._known: dict[Pair, bool] = {}

    def __call__(self, a: int, b: int) -> bool:
        """Whether `a` followed by `b` may become one token."""
        found = self._known.get((a, b))
        if found is None:
            found = self._known[a, b] = self._valid(a, b)
        return found

    def _valid(self, a: int, b: int) -> bool:
        if self.symbols.special(a) or self.symbols.special(b):
            return False
        joined = self.symbols.piece(a) + self.symbols.piece(b)
        if any(byte in SPACES for byte in joined[1:]) and (joined == b"\n\n" or joined.strip(SPACES)):
            return False
        if self.rule == "sentence":
            return True
        try:
            text = joined.decode("utf-8")
        except UnicodeDecodeError:
            return self.reference or inside_one_character(joined)
        if self._split is not None and len(self._split.pre_tokenize_str(text)) != 1:
            return False
        if self.rule == "word_hyphen" and self._punctuation(b) and not self._punctuation(a):
            return self.symbols.piece(b) == b"-"
        return True

    def _punctuation(self, symbol: int) -> bool:
        some = set(self.symbols.piece(symbol))
        return symbol < self.symbols.base and bool(some & PUNCTUATION) and not some & _DIGITS


@dataclass(frozen=True)
class Merged:
    """Rows of a batch after merging.

    Attributes:
        rows: symbols. starts: for each, the place of its first base token (a tagging task's word ids: ``ids[start]``).
        steps: pairs that were merged, as bytes, in order: `replay` makes the same rows of the same batch.
        lengths: tokens of the whole batch after 0, 1, ... merges.
    """

    rows: list[list[int]]
    starts: list[list[int]]
    steps: tuple[tuple[bytes, bytes], ...]
    lengths: tuple[int, ...]

    def ends(self, row: int, length: int) -> list[int]:
        """Places of the last base tokens, of a row that had `length`."""
        return [s - 1 for s in [*self.starts[row][1:], length]] if length else []


def merge(
    rows: Sequence[Sequence[int]],
    boundary: Boundary,
    merges: int | None = None,
    *,
    weights: Sequence[int] | None = None,
    least: int = 1,
) -> Merged:
    """Merge the most frequent valid pair of all rows, up to `merges` times (None: until there is none).

    Args:
        weights: how often each row counts; default once. least: occurrences that a merge needs.

    Raises:
        ValueError: a negative number of merges.
    """
    if merges is not None and merges < 0:
        raise ValueError(f"merges={merges}: give 0 (the base tokens) or more, or None for all there are")
    counts = PairCounts(rows, boundary, boundary.symbols.joined, weights)
    steps, lengths = [], [counts.length]
    while (merges is None or len(steps) < merges) and (best := counts.best()) and best[1] >= least:
        steps.append(tuple(map(boundary.symbols.piece, best[0])))
        counts.merge(best[0])
        lengths.append(counts.length)
    return Merged(*counts.rows(), tuple(steps), tuple(lengths))


def boundaries(
    rows: Sequence[Sequence[int]], read: Merged, symbols: Symbols, shared: Merged | None = None
) -> list[tuple[int, int, int]]:
    """What is scored: row, place among the symbols of `read`, and the base token that follows, of each boundary.

    Args:
        rows: base ids. shared: whose boundaries; default those of `read`. Special tokens are not asked for.

    Raises:
        ValueError: a boundary that `read` lacks.
    """
    out = []
    for n, row in enumerate(rows):
        place = {end: k for k, end in enumerate(read.ends(n, len(row)))}
        for end in (read if shared is None else shared).ends(n, len(row))[:-1]:
            if end not in place:
                raise ValueError(f"row {n}: no token ends at {end} as the model reads it; score at fewer boundaries")
            if not symbols.special(row[end + 1]):
                out.append((n, place[end], row[end + 1]))
    return out


def replay(rows: Sequence[Sequence[int]], symbols: Symbols, steps: Sequence[tuple[bytes, bytes]]) -> Merged:
    """Merge exactly these pairs, in order, wherever they stand: the same batch again, or other texts by its merges."""
    pairs = [(symbols.of(a), symbols.of(b)) for a, b in steps]
    wanted = set(pairs)
    counts = PairCounts(rows, lambda a, b: (a, b) in wanted, symbols.joined)
    lengths = [counts.length]
    for pair in pairs:
        counts.merge(pair)
        lengths.append(counts.length)
    return Merged(*counts.rows(), tuple(steps), tuple(lengths))


def merges_for(curves: Sequence[Sequence[int]], share: float) -> int:
    """M of a target: the fewest merges a batch that take `share` of the possible reduction (0 to 1).

    Args:
        curves: `Merged.lengths` of batches that were merged to the limit.

    Raises:
        ValueError: no curve, a share out of range.
    """
    if not curves or not 0 <= share <= 1:
        raise ValueError(f"{len(curves)} curves, share={share}: give one curve or more, and a share from 0 to 1")
    longest = max(map(len, curves))
    total = np.sum([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves], 0)
    return int(np.argmax(total[0] - total >= share * (total[0] - total[-1]) - 1e-9))


def random_split(piece: bytes, symbols: Symbols, rng: np.random.Generator, most: int = 6) -> list[int] | None:
    """Cut bytes at random into 2 to `most` base tokens; None if eight draws give none."""
    for _ in range(8):
        cuts = rng.choice(len(piece) - 1, int(rng.integers(1, min(most, len(piece)))), replace=False) + 1
        ends = [0, *sorted(cuts.tolist()), len(piece)]
        ids = [symbols.known(piece[a:b]) for a, b in pairwise(ends)]
        if all(i is not None and i < symbols.base for i in ids):
            return [i for i in ids if i is not None]
    return None
