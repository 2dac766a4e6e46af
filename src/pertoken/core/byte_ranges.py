"""The vocabulary in the order of its bytes: all ids whose bytes start with a prefix are one contiguous range.

A `Node` is such a range and the length of its prefix, so a trie without a trie: the ids that end at the node come first
in its range, then the ranges of its 256 children. Masses are sums over the range itself. (The difference of two
cumulative sums over the vocabulary would cost less, but it cancels: below 1e-16 of the total nothing is left of it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .bytes import ByteView

_BYTES = np.arange(257)


class Node(NamedTuple):
    """Places ``lo:hi`` of `ByteRanges.order`, whose first `depth` bytes agree."""

    lo: int
    hi: int
    depth: int


class ByteRanges:
    """Ids sorted by bytes.

    Args:
        pieces: bytes of each id; those of ``b""`` are in no range.

    Attributes:
        order: ids in the order of their bytes, int64 (M,); ids of equal bytes stand side by side, smaller ones first.
        root: the whole range.
    """

    def __init__(self, pieces: Sequence[bytes]):
        found = sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: pieces[i])
        self.order = np.array(found, np.int64)
        self.root = Node(0, len(found), 0)
        self._lengths = np.array([len(pieces[i]) for i in found], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])[:-1].astype(np.int64)
        self._flat = np.frombuffer(b"".join(pieces[i] for i in found), np.uint8)
        self._columns: dict[int, np.ndarray] = {}

    def _column(self, depth: int) -> np.ndarray:
        """Byte `depth` of each entry, -1 where it is shorter."""
        if depth not in self._columns:
            column = np.full(len(self.order), -1, np.int16)
            long = self._lengths > depth
            column[long] = self._flat[self._starts[long] + depth]
            self._columns[depth] = column
        return self._columns[depth]

    def bounds(self, node: Node) -> np.ndarray:
        """(257,) places: child b is ``bounds[b]:bounds[b + 1]``; ids that end here are ``node.lo:bounds[0]``."""
        return node.lo + np.searchsorted(self._column(node.depth)[node.lo : node.hi], _BYTES)

    def ending(self, node: Node) -> np.ndarray:
        """Ids whose bytes are the prefix itself."""
        if node.depth == 0:
            return self.order[:0]
        column = self._column(node.depth)
        return self.order[node.lo : node.lo + int(np.searchsorted(column[node.lo : node.hi], 0))]

    def child(self, node: Node, byte: int) -> Node | None:
        """The node one byte further, None if no id goes there."""
        lo, hi = (node.lo + np.searchsorted(self._column(node.depth)[node.lo : node.hi], [byte, byte + 1])).tolist()
        return Node(lo, hi, node.depth + 1) if hi > lo else None

    def along(self, prefix: bytes) -> Iterator[Node]:
        """Nodes of the prefixes of `prefix`, of length 1, 2, ..., as far as there are any."""
        node: Node | None = self.root
        for byte in prefix:
            node = self.child(node, byte)
            if node is None:
                return
            yield node

    def find(self, prefix: bytes) -> Node | None:
        """Node of a prefix, None if no id starts with it."""
        node = [self.root, *self.along(prefix)][-1]
        return node if node.depth == len(prefix) else None

    def masses(self, node: Node, weights: np.ndarray) -> np.ndarray:
        """Sum of the weights of each child, (256,).

        Args:
            weights: of the ids ``order[lo:hi]``, (hi - lo,).
        """
        bounds = self.bounds(node) - node.lo
        out = np.zeros(256, weights.dtype)
        some = bounds[1:] > bounds[:-1]
        if some.any():
            out[some] = np.add.reduceat(weights, bounds[:-1][some])
        return out


@dataclass(frozen=True)
class Branch:
    """Sequences that begin with a history and go on with one of the ids at a node."""

    history: tuple[int, ...]
    logw: float
    ranges: ByteRanges
    node: Node
    p: np.ndarray
    """P(v | history) of the ids of the node, in their order; 0 where the sequence is not valid."""
    end: float
    """P(EOS | history) if the sequence may end here."""

    def mass(self) -> float:
        """Log of the probability of all of them."""
        total = float(self.p.sum())
        return self.logw + np.log(total) if total > 0 else -np.inf

    def onward(self) -> float:
        """Log of the probability of those that have bytes behind the node, and of the end."""
        total = float(self.p[len(self.ranges.ending(self.node)) :].sum()) + self.end
        return self.logw + np.log(total) if total > 0 else -np.inf

    def child(self, byte: int) -> Branch | None:
        """Those that go on with a byte."""
        node = self.ranges.child(self.node, byte)
        if node is None:
            return None
        return dataclasses.replace(self, node=node, p=self.p[node.lo - self.node.lo : node.hi - self.node.lo], end=0.0)


_ranges: WeakKeyDictionary[ByteView, dict[bool, ByteRanges]] = WeakKeyDictionary()


def byte_ranges(view: ByteView, *, at_start: bool = False) -> ByteRanges:
    """The ranges of a tokenizer, made once.

    Args:
        at_start: of a token that begins a text, which loses the space that the tokenizer puts before its first word.

    Raises:
        ValueError: a vocabulary that has lost its bytes (WordPiece, whole words).
    """
    if view.family == "wordpiece":
        raise ValueError(
            "this tokenizer's vocabulary has lost case and white space (WordPiece, or whole words), so its ids do not "
            "say which bytes they are; use a model with a byte-level or byte-fallback tokenizer"
        )
    known = _ranges.setdefault(view, {})
    if at_start not in known:
        known[at_start] = ByteRanges([view.pieces([i], at_start=at_start)[0] for i in range(view.size)])
    return known[at_start]
