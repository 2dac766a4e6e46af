"""Counts of neighbouring pairs, kept up to date while pairs are replaced: the core of byte-pair encoding."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Pair = tuple[int, int]


class PairCounts:
    """The valid pairs of rows of symbols, and where they are. A merge costs what it changes, not another count.

    Places are those of the first rows' symbols, counted through all rows; a merged symbol has the place of its first
    part. Overlapping occurrences count each.

    Args:
        valid: whether two symbols may become one. joined: which one. weights: how often each row counts (default 1).
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        valid: Callable[[int, int], bool],
        joined: Callable[[int, int], int],
        weights: Sequence[int] | None = None,
    ):
        self._valid, self._joined = valid, joined
        self._row_starts = [0, *np.cumsum([len(row) for row in rows]).tolist()]
        self._symbol = [symbol for row in rows for symbol in row]
        weights = [1] * len(rows) if weights is None else weights
        self._weight = [w for row, w in zip(rows, weights, strict=True) for _ in row]
        self._next = [i + 1 for i in range(len(self._symbol))]
        self._previous = [i - 1 for i in range(len(self._symbol))]
        for row, begin in zip(rows, self._row_starts):
            if row:
                self._previous[begin], self._next[begin + len(row) - 1] = -1, -1
        self._count: dict[Pair, int] = {}
        self._places: dict[Pair, set[int]] = {}
        self._firsts: dict[Pair, list[int]] = {}  # heaps, of which those no longer in `_places` are dropped when met
        self._queue: list[tuple[int, int, Pair]] = []  # the same
        self.length = len(self._symbol)
        self._publish({pair for place in range(self.length) if (pair := self._add(place))})

    def best(self) -> tuple[Pair, int] | None:
        """The most frequent pair (of equals the one met first, row by row) and its count; None without a pair."""
        while self._queue:
            count, first, pair = self._queue[0]
            if self._count.get(pair) == -count and self._first(pair) == first:
                return pair, -count
            heapq.heappop(self._queue)
        return None

    def merge(self, pair: Pair) -> int:
        """Replace all occurrences, left to right, none overlapping; how many there were."""
        (a, b), new = pair, self._joined(*pair)
        touched: set[Pair | None] = set()
        before = self.length
        for place in sorted(self._places.get(pair, ())):
            gone = self._next[place]
            if self._symbol[place] != a or gone < 0 or self._symbol[gone] != b:
                continue  # it was used up by the occurrence before
            left, right = self._previous[place], self._next[gone]
            touched |= {self._remove(p) for p in (left, place, gone)}
            self._symbol[place], self._symbol[gone], self._next[place] = new, -1, right
            if right >= 0:
                self._previous[right] = place
            touched |= {self._add(left), self._add(place)}
            self.length -= 1
        self._publish(pair for pair in touched if pair)
        return before - self.length

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Symbols of each row, and the places of their first base tokens in it."""
        symbols, starts = [], []
        for begin, end in zip(self._row_starts, self._row_starts[1:]):
            left = [i for i in range(begin, end) if self._symbol[i] >= 0]
            symbols.append([self._symbol[i] for i in left])
            starts.append([i - begin for i in left])
        return symbols, starts

    def _pair(self, place: int) -> Pair | None:
        following = self._next[place] if place >= 0 else -1
        return (self._symbol[place], self._symbol[following]) if following >= 0 else None

    def _add(self, place: int) -> Pair | None:
        pair = self._pair(place)
        if pair is None or not self._valid(*pair):
            return None
        self._count[pair] = self._count.get(pair, 0) + self._weight[place]
        self._places.setdefault(pair, set()).add(place)
        heapq.heappush(self._firsts.setdefault(pair, []), place)
        return pair

    def _remove(self, place: int) -> Pair | None:
        pair = self._pair(place)
        if pair is None or place not in self._places.get(pair, ()):
            return None
        self._count[pair] -= self._weight[place]
        self._places[pair].discard(place)
        return pair

    def _first(self, pair: Pair) -> int:
        firsts, places = self._firsts[pair], self._places[pair]
        while firsts[0] not in places:
            heapq.heappop(firsts)
        return firsts[0]

    def _publish(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if self._places[pair]:
                heapq.heappush(self._queue, (-self._count[pair], self._first(pair), pair))
            else:
                del self._count[pair], self._places[pair], self._firsts[pair]
