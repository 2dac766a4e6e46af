"""Next-byte distributions of one model, carried from byte to byte, and their mean over several models.

A `ByteState` holds cover(x) as branches: a token history whose bytes are a prefix of x, and the range of the vocabulary
that a last token can still be, given the bytes of x behind it. Only a branch that stands at the end of a token costs
the model something; the others split their range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.byte_ranges import Branch, byte_ranges
from ...core.lm import LM
from ...core.particles import logsumexp
from ...core.token_tree import History, TokenTree
from .canonical import Search, canonical, goes_on, unfinished

EOS = 256


class ByteModel:
    """A token model with one context, as a model of bytes.

    Args:
        lm: the model.
        context: ids that stand before the text and are not searched.
        search: which sequences count.

    Attributes:
        tree: the model's cache, shared by all states (``tree.forwards`` counts what it cost).

    Raises:
        ValueError: an empty context; a vocabulary without bytes.
    """

    def __init__(self, lm: LM, context: Sequence[int], search: Search):
        self.lm, self.search, self.view = lm, search, lm.view
        self.tree = TokenTree(lm, context)
        special = [k for k, i in enumerate(self.tree.context) if i in self.view.special_ids]
        self.said = self.tree.context[special[-1] + 1 if special else 0 :]
        """The part of the context that is text and what follows is spelt with."""
        self.begins = not self.said
        self.ranges, self.first = byte_ranges(self.view), byte_ranges(self.view, at_start=self.begins)
        self.rules = canonical(self.view) if search.mode == "canonical" else None
        if self.rules is not None and not self.rules.prefix(self.said):
            self.said = ()  # ids that the tokenizer would not give: what follows is judged without them
        kept = set(self.first.order.tolist())
        self.silent = [i for i in self.ranges.order.tolist() if i not in kept]
        """Ids without bytes at the start (the space that is put before a text)."""

    def start(self) -> ByteState:
        """The state of the empty text."""
        text = unfinished(b"".join(self.view.pieces(self.said)))
        return ByteState(self, self._branches([((), 0.0)]), 0.0, rest=text, fresh=True)

    def _branches(self, new: Sequence[tuple[History, float]]) -> tuple[Branch, ...]:
        """Branches of histories that end where the text ends."""
        out = []
        for (history, logw), logp in zip(new, self.tree.logps([h for h, _ in new]), strict=True):
            p = np.exp(logp)
            stops = [s for s in self.lm.stop_ids if s < len(p)]
            ranges = self.ranges if history else self.first
            inside = ranges.order < len(p)
            words, end = np.where(inside, p[np.where(inside, ranges.order, 0)], 0.0), float(p[stops].sum())
            silent = sum(float(p[i]) for i in self.silent) if not history else 0.0
            total = float(words.sum()) + end + silent  # what is neither text nor the end is not drawn
            words, end = words / total, end / total
            if self.rules is not None:
                end = end if self.rules.whole((*self.said, *history)) else 0.0
                if not self.search.fast:
                    words = np.where(self.rules.mask((*self.said, *history), ranges.order), words, 0.0)
            out.append(Branch(history, logw, ranges, ranges.root, words, end))
            if not history and self.silent:
                hushed = [((i,), logw + float(np.log(p[i] / total))) for i in self.silent if p[i] > 0]
                out += self._branches(hushed)
        return tuple(out)

    def prefetch(self, data: bytes) -> None:
        """Compute, in one pass, what `ByteState.advance` along these bytes is going to need (canonical mode)."""
        if self.rules is None:
            return
        at: list[list[History]] = [[] for _ in range(len(data) + 1)]
        at[0] = [(), *((i,) for i in self.silent)]
        for k in range(len(data)):
            for history in at[k]:
                ranges = self.ranges if history else self.first
                for node in ranges.along(data[k:]):
                    at[k + node.depth] += self._allowed(history, ranges.ending(node).tolist())
        self.tree.logps([h for some in at for h in some])

    def _allowed(self, history: History, tokens: Sequence[int]) -> list[History]:
        longer = [(*history, v) for v in tokens]
        return longer if self.rules is None else [h for h in longer if self.rules.prefix((*self.said, *h))]


class ByteState:
    """Where one model is after the bytes x.

    Attributes:
        logp: log P(x), of x and whatever follows, given the context.
        rest: bytes of a last character that is not complete.
        lost: share of P(x) that the beam and the threshold have cut, summed over steps.
    """

    def __init__(
        self,
        model: ByteModel,
        branches: tuple[Branch, ...],
        logp: float,
        *,
        rest: bytes = b"",
        lost: float = 0.0,
        fresh: bool = False,
    ):
        self.model, self.logp, self.rest, self.lost = model, logp, rest, lost
        self._cover = branches
        self._opened: tuple[Branch, ...] | None = branches if fresh else None

    def histories(self) -> list[History]:
        """What must stay in the model's cache."""
        return list(dict.fromkeys(b.history for b in self.branches()))

    def longest(self) -> int:
        """Tokens of the longest sequence, the context's too."""
        return len(self.model.tree.context) + max((len(b.history) for b in self._cover), default=0)

    def branches(self) -> tuple[Branch, ...]:
        """The cover, where a token ends here with a branch for what follows it."""
        if self._opened is None:
            new: dict[History, float] = {}
            model, floor = self.model, self.model.search.threshold
            for b in self._cover:
                ends = b.ranges.ending(b.node).tolist()
                weights = {v: b.logw + float(np.log(p)) for v, p in zip(ends, b.p, strict=False) if p > 0}
                likely = [v for v, w in weights.items() if not floor or w - self.logp >= np.log(floor)]
                self.lost += sum(float(np.exp(w - self.logp)) for v, w in weights.items() if v not in likely)
                new |= {h: weights[h[-1]] for h in model._allowed(b.history, likely)}
            opened = model._branches(list(new.items())) if new else ()
            self._opened = self._heaviest([b for b in (*self._cover, *opened) if b.onward() > -np.inf])
        return self._opened

    def _heaviest(self, branches: Sequence[Branch]) -> tuple[Branch, ...]:
        """As many branches as the beam holds."""
        beam, masses = self.model.search.beam, np.array([b.onward() for b in branches])
        if not beam or len(branches) <= beam:
            return tuple(branches)
        order = np.argsort(-masses, kind="stable")
        self.lost += float(np.exp(logsumexp(masses[order[beam:]]) - logsumexp(masses)))
        return tuple(branches[k] for k in sorted(order[:beam].tolist()))

    def joint(self) -> np.ndarray:
        """log P(x b) of each byte b, and log P(x, end), (257,); their sum is P(x), less what is not valid."""
        branches = self.branches()
        top = max((b.logw for b in branches), default=0.0)
        total = np.zeros(257)
        for b in branches:
            scale = np.exp(b.logw - top)
            total[:256] += scale * b.ranges.masses(b.node, b.p)
            total[EOS] += scale * b.end
        if self.model.rules is not None:  # a text is made of whole characters
            total[:256][~goes_on(self.rest)] = 0
        with np.errstate(divide="ignore"):
            return np.log(total) + top

    def alive(self) -> bool:
        """Whether anything can follow."""
        return bool((self.joint() > -np.inf).any())

    def logps(self) -> np.ndarray:
        """Log-probs (257,) float64 of the next byte, and of the end (`EOS`): `joint`, renormalised.

        Raises:
            ValueError: nothing can follow.
        """
        joint = self.joint()
        total = logsumexp(joint)
        if total == -np.inf:
            raise ValueError("no byte and no end can follow this text; look at the model, the beam and the threshold")
        return joint - total

    def advance(self, byte: int) -> ByteState:
        """The state after one more byte.

        Raises:
            ValueError: the byte is impossible here, or no byte.
        """
        if not 0 <= byte < 256:
            raise ValueError(f"{byte} is no byte; give 0 to 255")
        children = [child for b in self.branches() if (child := b.child(byte)) is not None]
        masses = np.array([b.mass() for b in children])
        logp = logsumexp(masses)
        if logp == -np.inf or (self.model.rules is not None and not goes_on(self.rest)[byte]):
            raise ValueError(
                f"the byte 0x{byte:02X} ({bytes([byte])!r}) is impossible here: no token sequence that counts spells it"
                + ("; mode='all' counts every sequence" if self.model.rules is not None else "")
            )
        floor = self.model.search.threshold
        kept = [k for k, m in enumerate(masses) if m > -np.inf and (not floor or m - logp >= np.log(floor))]
        lost = 1 - float(np.exp(logsumexp(masses[kept]) - logp))
        rest = unfinished(self.rest + bytes([byte]))
        return ByteState(self.model, tuple(children[k] for k in kept), logp, rest=rest, lost=self.lost + max(lost, 0.0))


class MeanState:
    """Several models' states of one text, their distributions averaged with equal weights (the arithmetic mean).

    A model that cannot go on with a byte drops out, and is counted.

    Attributes:
        states: of the models that are still in. dropped: how many are not. logp: log P(x) under the mean.
    """

    def __init__(self, states: Sequence[Any], *, dropped: int = 0, logp: float = 0.0):
        if not states:
            raise ValueError("a mean of no models; give at least one")
        self.states, self.dropped, self.logp = tuple(states), dropped, logp

    def logps(self) -> np.ndarray:
        """Log of the mean of the models' probabilities, (257,)."""
        if len(self.states) > 1:
            alive = tuple(s for s in self.states if s.alive()) or self.states[:1]
            self.dropped += len(self.states) - len(alive)
            self.states = alive
        if len(self.states) == 1:
            return self.states[0].logps()
        stacked = np.stack([s.logps() for s in self.states])
        top = stacked.max(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = top + np.log(np.exp(stacked - top).mean(0))
        return np.where(top == -np.inf, -np.inf, mean)

    def alive(self) -> bool:
        """Whether anything can follow."""
        return any(s.alive() for s in self.states)

    def advance(self, byte: int) -> MeanState:
        """All models that can, one byte on.

        Raises:
            ValueError: none can.
        """
        logps = self.logps()
        able = [s for s in self.states if s.logps()[byte] > -np.inf] or self.states[:1]
        more = [s.advance(byte) for s in able]
        return MeanState(more, dropped=self.dropped + len(self.states) - len(more), logp=self.logp + float(logps[byte]))
