"""Particles whose tokens are drawn by rejection under a constraint: the step sampler of AWRS for one prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.decode import Guide
from ..core.rollout import Sampling
from ._constraints import Constraint, State
from ._rejection import estimate

Piece = Callable[[int], bytes]
BYTES_FROM = 16  # refusals at one text; a few are not worth the calls to learn why


class _Node:
    """A text that particles have come to: where the constraint is, what was asked there, and the shortest pieces that
    are known to be refused. Particles share it."""

    __slots__ = ("known", "path", "refused", "state")

    def __init__(self, state: State, path: tuple[int, ...]):
        self.state, self.path, self.known, self.refused = state, path, {}, set()


@dataclass
class _Rows:
    """The particles that go on, the proposal's state, and their last tokens."""

    nodes: list[_Node]
    proposal: Any = None
    last: list[int] | None = None
    device: Any = None


@dataclass(kw_only=True, eq=False)
class ConstrainedSampler:
    """A `core.particles.StepSampler`.

    Attributes:
        counts: calls of the constraint; tokens that the estimators looked at (more, as particles of one text share
            calls, and tokens what they begin with); steps of particles.
    """

    constraint: Constraint
    piece: Piece
    """Bytes of a token."""
    stops: Sequence[int]
    """Terminators: they ask whether the text is complete."""
    sampling: Sampling = field(default_factory=Sampling)
    """Shapes the guide's weights: the target is of what comes out."""
    estimator: str = "auto"
    """As the four that follow: see `_rejection.estimate`."""
    max_accepts: int = 2
    max_rejects: float = math.inf
    proper_weights: bool = True
    prune: bool = True
    """Leave out tokens of no bytes before drawing, instead of rejecting them."""
    proposal: Guide | None = None
    """Draw from this guide; it must give a weight to whatever the target does."""
    prompt: Any = None
    """What the proposal is asked."""

    def __post_init__(self) -> None:
        self.counts = {"calls": 0, "looks": 0, "steps": 0}
        self.logps: dict[tuple[int, ...], float] = {}  # of each text's last token, by the guide
        self.ends: dict[tuple[int, ...], int] = {}  # the terminator that a text was ended by

    def start(self, n: int) -> _Rows:
        """Nothing read."""
        proposal = None if self.proposal is None else self.proposal.start([self.prompt] * n)
        return _Rows([_Node(self.constraint.start(), ())] * n, proposal)

    def step(
        self, state: _Rows, logw_NV: Tensor, draws: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A token and a log-weight a particle."""
        target = self.shaped(logw_NV, len(state.nodes[0].path))
        drawn_from = target
        if self.proposal is not None:
            last = None if state.last is None else torch.tensor(state.last, device=logw_NV.device)
            own = self.proposal.step(state.proposal, last)[:, : target.shape[1]]
            drawn_from = own.masked_fill(target == -torch.inf, -torch.inf)
        precise = drawn_from.double()
        top = precise.amax(-1, keepdim=True).clamp(min=-1e300)
        weights_NV = (precise - top).exp_()
        log_z = (top[:, 0] + weights_NV.sum(-1).log()).tolist()
        if any(map(math.isnan, log_z)):
            raise ValueError("a guide gave NaN; look at the model")
        weights = weights_NV.cpu().numpy()
        tokens, increments, nodes = [], [], []
        for row, node in enumerate(state.nodes):
            draw = estimate(
                weights[row],
                self.check(node),
                draws[row],
                estimator=self.estimator,
                max_accepts=self.max_accepts,
                max_rejects=self.max_rejects,
                proper_weights=self.proper_weights,
            )
            self.counts["steps"] += 1
            more, token = draw.logw, max(draw.token, 0)
            if draw.token >= 0:
                if self.proper_weights:
                    more += log_z[row]
                    if self.proposal is not None:
                        more += float(target[row, token]) - float(drawn_from[row, token])
                node = self.grown(node, token, float(logw_NV[row, token]))
            tokens.append(token)
            increments.append(more)
            nodes.append(node)
        state.nodes, state.last, state.device = nodes, tokens, logw_NV.device
        return np.array(tokens), np.array(increments)

    def end(self, state: _Rows, logw_NV: Tensor) -> np.ndarray:
        """The weight of all terminators where the text is complete."""
        shaped = self.shaped(logw_NV, len(state.nodes[0].path))[:, list(self.stops)].double().logsumexp(-1)
        out = np.full(len(state.nodes), -math.inf)
        for row, node in enumerate(state.nodes):
            stop = max(self.stops, key=lambda s, row=row: float(logw_NV[row, s]))
            self.counts["steps"] += 1
            if self.check(node)(stop):
                out[row] = float(shaped[row])
                self.grown(node, stop, float(logw_NV[row, stop]))
        return out

    def reorder(self, state: _Rows, index: Sequence[int]) -> _Rows:
        """Select rows."""
        if self.proposal is not None:
            self.proposal.reorder(state.proposal, torch.tensor(list(index), device=state.device))
        last = None if state.last is None else [state.last[i] for i in index]
        return _Rows([state.nodes[i] for i in index], state.proposal, last, state.device)

    def shaped(self, logw_NV: Tensor, length: int) -> Tensor:
        """Log-weights of the target: `sampling` applied, tokens of no bytes out, no end before it may come."""
        out = logw_NV
        if length < self.sampling.min_new_tokens:
            stops = torch.tensor(list(self.stops), device=logw_NV.device)
            out = out.index_fill(1, stops, -torch.inf)
        if self.sampling != Sampling(max_new_tokens=self.sampling.max_new_tokens):
            nothing = (out == -torch.inf).all(-1, keepdim=True)  # no token has mass: nothing to shape
            out = self.sampling.logps(out.masked_fill(nothing, 0.0)).masked_fill(nothing, -torch.inf)
        if self.prune:
            out = out.index_fill(1, _empty(self.piece, tuple(self.stops), out.shape[1]).to(out.device), -torch.inf)
        return out

    def check(self, node: _Node) -> Callable[[int], bool]:
        """f at a text: of a terminator whether the text is complete, of another token whether it may follow. What a
        token begins with is not asked about twice: no extension of what was refused is allowed."""
        known, counts, stops, piece = node.known, self.counts, self.stops, self.piece

        def ask(token: int) -> bool:
            counts["looks"] += 1
            answer = known.get(token)
            if answer is None:
                if token in stops:
                    counts["calls"] += 1
                    answer = node.state.complete()
                else:
                    said = piece(token)
                    answer = bool(said) and not self._refused(node, said) and self._allowed(node, said)
                known[token] = answer
            return answer

        return ask

    def _refused(self, node: _Node, said: bytes) -> bool:
        """Whether a piece begins with one that was refused."""
        return bool(node.refused) and any(said[:k] in node.refused for k in range(1, len(said) + 1))

    def _allowed(self, node: _Node, said: bytes) -> bool:
        """Ask the constraint, and keep what it refuses: the bytes that a parser stopped at, or, of a check that says
        yes or no, the piece, and from the 17th on its first byte if that is refused, too (a call more)."""
        self.counts["calls"] += 1
        reads = getattr(node.state, "reads", None)
        if reads is not None:
            end = reads(said)
            if end < len(said):
                node.refused.add(said[: end + 1])
            return end == len(said)
        answer = node.state.allows(said)
        if not answer and not getattr(self.constraint, "debug", False):  # which looks for extensions that are allowed
            first = said[:1]
            if len(node.refused) >= BYTES_FROM and first != said and first not in node.known:
                self.counts["calls"] += 1
                node.known[first] = node.state.allows(first)
            node.refused.add(said if node.known.get(first, True) else first)
        return answer

    def grown(self, node: _Node, token: int, logp: float) -> _Node:
        """The text with a token more."""
        path = (*node.path, token)
        self.logps[path] = logp
        if token in self.stops:
            self.ends[node.path] = token
            return node
        return _Node(node.state.after(self.piece(token)), path)

    def text(self, tokens: Sequence[int]) -> bytes:
        """Bytes of a particle."""
        return b"".join(map(self.piece, tokens))

    def history(self, tokens: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """A particle with its terminator, and the model's log-probs of its tokens."""
        path = (*tokens, self.ends[tuple(tokens)])
        return list(path), np.array([self.logps[path[: k + 1]] for k in range(len(path))])

    def critic(self, score: Callable[[list[bytes], list[bool]], Sequence[float]]) -> Callable[..., Sequence[float]]:
        """A critic of texts as one of tokens."""
        return lambda tokens, ended: score([self.text(t) for t in tokens], ended)


@lru_cache(maxsize=4)
def _empty(piece: Piece, stops: tuple[int, ...], size: int) -> Tensor:
    """The ids that stand for no bytes and end nothing."""
    return torch.tensor([v for v in range(size) if v not in stops and not piece(v)], dtype=torch.long)
