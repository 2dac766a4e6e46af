"""Where a completion is cut into pieces: macro actions of so many tokens, of random lengths, by surprise, by grammar.

All are `protocols.Segmenter`: a trace (and log-probs, for the one that looks at them) to the index of the first token
of each piece. Tokens that the policy did not emit are not counted and belong to the piece before them. The rules are
those of MA-RLHF (Chai et al., arXiv 2410.02743); `macro_ids` makes a tensor of what they say.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .parsing import Parser, Tree, Unparsed, clauses, leaves, sentences
from .protocols import Segmenter
from .trace import Trace


def checked(starts: Iterable[int], trace: Trace) -> list[int]:
    """The starts that a segmenter gave.

    Raises:
        ValueError: they do not begin with 0, do not increase, or go beyond the completion.
    """
    found = [int(s) for s in starts]
    sound = found[:1] == [0] and found[-1] < len(trace) and all(a < b for a, b in itertools.pairwise(found))
    if not (sound if len(trace) else not found):
        raise ValueError(
            f"the segmenter cut {len(trace)} tokens (row {trace.meta.get('row')}) at {found[:20]}; give strictly "
            "increasing indices of first tokens, the first of them 0 (none for an empty completion)"
        )
    return found


def with_tail(starts: Sequence[int], trace: Trace) -> list[int]:
    """The last emitted token as a piece of its own, which holds the sequence's reward undiluted; no start twice."""
    emitted = np.flatnonzero(trace.mask)
    return sorted({*starts, *(int(k) for k in emitted[-1:])})


def macro_ids(starts: Sequence[Sequence[int]], mask_NT: Tensor) -> Tensor:
    """The number of each token's piece, counted from 0 along each row: int64 (N, T). Padding is in the last one."""
    first_NT = torch.zeros(mask_NT.shape, dtype=torch.long)
    for n, some in enumerate(starts):
        first_NT[n, list(some)] = 1
    return (first_NT.cumsum(1) - 1).clamp(min=0).to(mask_NT.device)


def _at(ordinals: Iterable[int], trace: Trace) -> list[int]:
    """Ordinals among the emitted tokens as indices of tokens; 0 is a start, always."""
    if not len(trace):
        return []
    emitted = np.flatnonzero(trace.mask)
    return sorted({0, *(int(emitted[k]) for k in ordinals if 0 < k < len(emitted))})


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A piece each n emitted tokens."""

    n: int = 5

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n}: a macro action has 1 token or more (1: ordinary PPO; paper: 5)")

    def __call__(self, trace: Trace, logps: np.ndarray | None = None) -> list[int]:
        """See `protocols.Segmenter`."""
        return _at(range(0, int(trace.mask.sum()), self.n), trace)


@dataclass(frozen=True, kw_only=True)
class Randomized:
    """Lengths from {1, 2, 3, 5, 10}, each `repeat_times`, shuffled; when they are used up, the rest is one piece.

    The order depends on `seed` and the ids of prompt and completion alone, so that a resumed run cuts alike.
    """

    repeat_times: int = 25
    seed: int = 0
    lengths: tuple[int, ...] = (1, 2, 3, 5, 10)

    def __post_init__(self) -> None:
        if self.repeat_times < 1 or not self.lengths or min(self.lengths) < 1 or self.seed < 0:
            raise ValueError(f"{self}: repeat_times and lengths are 1 or more, and the seed is not negative")

    def __call__(self, trace: Trace, logps: np.ndarray | None = None) -> list[int]:
        """See `protocols.Segmenter`."""
        rng = np.random.default_rng([self.seed, len(trace.prompt_ids), *trace.prompt_ids, *trace.completion_ids])
        lengths = rng.permutation(np.repeat(self.lengths, self.repeat_times))
        return _at(np.cumsum(lengths).tolist(), trace)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Runs of perplexity exp(-log p) that does not rise: p_{i+1} > p_i starts a piece.

    `cut`: at i, the token before the rise ("release", what the authors' code does), or at i+1, the one that is more
    surprising ("after").
    """

    cut: Literal["release", "after"] = "release"

    def __post_init__(self) -> None:
        if self.cut not in ("release", "after"):
            raise ValueError(f"ppl_cut={self.cut!r} is not one of release, after")

    def __call__(self, trace: Trace, logps: np.ndarray | None = None) -> list[int]:
        """See `protocols.Segmenter`.

        Raises:
            ValueError: no log-probs.
        """
        if logps is None:
            raise ValueError("cutting by perplexity looks at log-probs of the tokens; give logps (T,)")
        seen = np.asarray(logps, np.float64)[trace.mask]
        rises = np.flatnonzero(seen[1:] < seen[:-1])  # perplexity rises where the log-prob falls
        return _at((rises + (self.cut == "after")).tolist(), trace)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """Constituents: of each sentence's tree, depth first, a subtree with fewer than `cutoff` tokens is one piece, a
    larger one is descended into; a single word joins the piece before it (at the start of a sentence, it opens one).

    Sentences end after . ! ? with white space, and at newlines; each starts a piece. A token belongs to the word in
    which its first byte that is no white space lies.

    Attributes:
        parser: text of a sentence -> its tree (`parsing.Tree`; `parsing.real_parser` has three).
        cutoff: the authors' code has no default; 5 is ours, the n of fixed pieces.
    """

    parser: Parser = field(default=clauses)
    cutoff: int = 5

    def __post_init__(self) -> None:
        if self.cutoff < 2:
            raise ValueError(f"parser_cutoff={self.cutoff}: no constituent has fewer than 1 token; give 2 or more")

    def __call__(self, trace: Trace, logps: np.ndarray | None = None) -> list[int]:
        """See `protocols.Segmenter`.

        Raises:
            Unparsed: a tree lies outside of its sentence, or its words and the tokens do not agree.
        """
        emitted = np.flatnonzero(trace.mask)
        pieces = [trace.completion_pieces[k] for k in emitted]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        if len(text.encode()) != sum(map(len, pieces)):
            raise Unparsed(f"row {trace.meta.get('row')}: the tokens' bytes are not the text's")
        ends = np.cumsum([0, *(len(c.encode()) for c in text)])  # of characters, in bytes
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        at = [int(b) + len(p) - len(p.lstrip() or p) for b, p in zip(begins, pieces, strict=True)]
        tokens = np.array(at)

        def within(start: int, end: int) -> np.ndarray:
            """Ordinals of the tokens in [start, end) of the text's characters."""
            return np.flatnonzero((tokens >= ends[start]) & (tokens < ends[end]))

        starts: list[int] = []
        for begin, end in sentences(text):
            tree = _shifted(self.parser(text[begin:end]), begin)
            if not _sound(tree, begin, end):
                raise Unparsed(
                    f"row {trace.meta.get('row')}: the tree of {text[begin:end]!r} is not one of spans in it"
                )
            starts += within(begin, end)[:1].tolist()
            self._descend(tree, within, starts)
        return _at(sorted(set(starts)), trace)

    def _descend(self, tree: Tree, within, starts: list[int]) -> None:
        start, end, parts = tree
        inside = within(start, end)
        if sum(1 for _ in leaves(tree)) == 1:
            if not len(inside):
                raise Unparsed("a word of the tree has no token of its own")
        elif len(inside) < self.cutoff:
            starts += inside[:1].tolist()
        else:
            for part in parts:
                self._descend(part, within, starts)


def _shifted(tree: Tree, by: int) -> Tree:
    start, end, parts = tree
    return start + by, end + by, tuple(_shifted(part, by) for part in parts)


def _sound(tree: Tree, begin: int, end: int) -> bool:
    """Whether spans lie in [begin, end), children in their parent and in order."""
    if not begin <= tree[0] < tree[1] <= end:
        return False
    for part in tree[2]:
        if not _sound(part, begin, tree[1]) or part[0] < tree[0]:
            return False
        begin = part[1]
    return True


def cut(
    traces: Sequence[Trace], segmenter: Segmenter, logps: Sequence[np.ndarray | None], fallback: Segmenter
) -> tuple[list[list[int]], int]:
    """Starts of the pieces of each trace, the last emitted token alone; and how often `fallback` had to do it."""
    found, failed = [], 0
    for trace, some in zip(traces, logps, strict=True):
        try:
            starts = checked(segmenter(trace, some), trace)
        except Unparsed:
            starts, failed = checked(fallback(trace, some), trace), failed + 1
        found.append(with_tail(starts, trace))
    return found, failed
