"""SPC as a guide: a step of the language model, its candidates looked ahead and weighed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...core.credit import Credit
from ...core.decode import Drawn, LMGuide, generators
from ...core.lm import LM
from ...core.packing import evaluating
from ...core.trace import Trace
from .._verifier import Differentiable, padded
from .estimate import Ahead, chances, first_order, look_ahead, pseudo_embeddings, reweigh
from .masked import MaskedLM, gibbs, masked_embeddings, retokenized, translated

if TYPE_CHECKING:
    from . import SPC

_TOGETHER = 256  # look-ahead rows computed together


@dataclass
class _Told:
    """What happened to one sequence: of each step its candidates, log q - log p_k and P^ of them."""

    steps: list[tuple[list[int], list[float], list[float]]] = field(default_factory=list)
    clipped: int = 0
    at_floor: int = 0
    lm_tokens: int = 0

    def drawn(self, trace: Trace) -> Drawn:
        at = [step[0].index(token) for step, token in zip(self.steps, trace.completion_ids, strict=True)]
        gain = np.array([step[1][i] for step, i in zip(self.steps, at, strict=True)])
        meta = {
            "probability": [step[2][i] for step, i in zip(self.steps, at, strict=True)],
            "estimates": sum(len(step[0]) for step in self.steps),
            "clipped": self.clipped,
            "at_floor": self.at_floor,
            "lm_tokens": self.lm_tokens,
        }
        return Drawn(trace, credit=Credit(trace=trace, values=gain, kind="logratio", method="spc"), meta=meta)


@dataclass
class _Row:
    """A sequence: its prompt, its answer so far, its random numbers."""

    prompt: tuple[int, ...]
    draws: np.random.Generator
    told: _Told
    answer: list[int] = field(default_factory=list)


@dataclass
class _State:
    base: Any
    rows: list[_Row]
    said: Tensor | None = None


class SPCGuide:
    """SPC as a guide: log q of the k candidates, -inf elsewhere. Made by `SPC.guide`."""

    def __init__(self, how: SPC, lm: LM, phi: Differentiable, masked: MaskedLM | None, longest: int | None, least: int):
        self.how, self.lm, self.phi, self.masked, self.longest, self.least = how, lm, phi, masked, longest, least
        self.base = LMGuide(lm=lm)
        self.vocabulary = min(self.base.vocabulary, len(phi.embedding))
        self.told: dict[tuple[int, int], _Told] = {}
        ends = [i for i in lm.view.special_ids | lm.stop_ids if i < self.vocabulary]
        self.words = torch.ones(self.vocabulary, dtype=torch.bool, device=lm.device)
        self.words[ends] = False
        self.table = phi.embedding[: self.vocabulary].to(lm.device)
        self.other = translated(masked, lm, self.table) if masked is not None and how.local.retokenize else None

    def start(self, prompts: Sequence[Any]) -> _State:
        """Rows draw as those of prompts 0, 1, ... of seed 0, until they are `placed`."""
        draws = [generators(0, i, 1)[0] for i in range(len(prompts))]
        rows = [_Row(self.base.ids(p), g, _Told()) for p, g in zip(prompts, draws, strict=True)]
        return _State(self.base.start(prompts), rows)

    def placed(self, state: _State, places: Sequence[tuple[int, int]], seed: int) -> None:
        """Random numbers by seed and place; what happens is told by place."""
        for row, (prompt, k) in zip(state.rows, places, strict=True):
            row.draws = np.random.Generator(generators(seed, prompt, k + 1)[k].bit_generator.jumped())
            self.told[prompt, k] = row.told

    def reorder(self, state: _State, index: Tensor) -> None:
        """Select rows; a row named twice has a history of its own each time."""
        self.base.reorder(state.base, index)
        chosen = index.tolist()
        first = [i not in chosen[:at] for at, i in enumerate(chosen)]
        state.rows = [
            state.rows[i] if new else copy.deepcopy(state.rows[i]) for i, new in zip(chosen, first, strict=True)
        ]

    @torch.no_grad()
    def step(self, state: _State, last_ids: Tensor | None) -> Tensor:
        """log q, (N, V)."""
        if last_ids is not None:
            for row, token in zip(state.rows, last_ids.tolist(), strict=True):
                row.answer.append(token)
        state.said = self.base.step(state.base, last_ids)[:, : self.vocabulary]
        logp = state.said
        if len(state.rows[0].answer) < self.least:
            stops = torch.tensor([i for i in self.lm.stop_ids if i < self.vocabulary], device=logp.device)
            logp = logp.index_fill(-1, stops, -torch.inf).log_softmax(-1)
        top = logp.topk(min(self.how.candidates, self.vocabulary), -1)
        together = max(1, _TOGETHER // (top.indices.shape[1] * self.how.samples))
        every = torch.arange(len(state.rows), device=logp.device)
        raw = torch.cat([self.estimate(state, some, top.indices[some]) for some in every.split(together)])
        chance, clipped = chances(raw, self.how.floor)
        logq, idle = reweigh(top.values, chance, self.how.floor)
        gain = torch.where(top.values > -torch.inf, logq - top.values.log_softmax(-1), 0.0)
        for i, row in enumerate(state.rows):
            row.told.steps.append((top.indices[i].tolist(), gain[i].tolist(), chance[i].tolist()))
            row.told.clipped += int(clipped[i].sum())
            row.told.at_floor += int(idle[i])
            row.told.lm_tokens += 1
        return torch.full_like(logp, -torch.inf).scatter(-1, top.indices, logq)

    def estimate(self, state: _State, some_N: Tensor, ids_NK: Tensor) -> Tensor:
        """phi's first-order expansion (N, K, S), not clipped, of candidates of some rows."""
        how, (n, k), s = self.how, ids_NK.shape, self.how.samples
        rows = [state.rows[i] for i in some_N.tolist()]
        each, index = [r for r in rows for _ in range(k * s)], some_N.repeat_interleave(k * s)
        first, far = ids_NK.reshape(-1).repeat_interleave(s), self._far(state)
        uniform = np.concatenate([r.draws.random((k * s, far)) for r in rows])
        refined = self.masked is not None and how.local.sweeps > 0 and far > 0
        kind = how.local.used
        wanted: dict[str, Any] = {"left": {"table": self.table}, "pseudo": {"likeliest": how.local.alternatives}}
        wanted = wanted.get(kind, {})
        given = torch.from_numpy(uniform).to(first.device), self.words

        def look(**options: Any) -> Ahead:
            for r in rows:
                r.told.lm_tokens += k * s * far
            return look_ahead(self.base, self.base.branch(state.base, index), first, *given, **options)

        ahead = look(**({} if refined else wanted))
        ids, mask, free, table, words = self._sentences(each, first, ahead)
        if self.masked is not None and refined:
            for u in self._noise(rows, free, k * s):
                ids = gibbs(self.masked, ids, mask, free, u, words, how.local.parallel)
            if kind != "mlm":  # the distributions around what the samples are now
                forced = ahead.ids.masked_scatter(ahead.words, ids[free])
                ahead = look(forced=forced, **wanted)
        embeds = table[ids]
        expected = embeds.clone()
        if kind == "mlm":
            assert self.masked is not None
            expected[free] = masked_embeddings(self.masked, ids, mask, free, words, table)
        elif kind == "pseudo" and far:
            heads = [(*r.prompt, *r.answer, v) for r, v in zip(each, first.tolist(), strict=True)]
            bars, spent = pseudo_embeddings(self.lm, heads, ahead, table)
            expected[free] = bars[ahead.words]
            for r, tokens in zip(rows, spent.reshape(n, -1).sum(1).tolist(), strict=True):
                r.told.lm_tokens += tokens
        elif ahead.expected is not None:
            expected[free] = ahead.expected[ahead.words]
        with evaluating(self.phi) if isinstance(self.phi, torch.nn.Module) else nullcontext():
            raw = first_order(self.phi, embeds, expected, mask, space=how.space, suppress=how.suppress)
        return raw.reshape(n, k, s)

    def _far(self, state: _State) -> int:
        """T - t: never beyond the longest answer, nor the model's positions."""
        t = len(state.rows[0].answer) + 1
        far = self.how.lookahead if self.how.length is None else self.how.length - t
        if far < 0:
            raise ValueError(f"length={self.how.length} (T) lies before t={t}; raise it or draw fewer tokens")
        if self.longest is not None and self.how.length is None:
            far = min(far, self.longest - t)
        return max(0, min(far, self.lm.context - t - max(len(r.prompt) for r in state.rows)))

    def _sentences(
        self, each: list[_Row], first: Tensor, ahead: Ahead
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the verifier reads: ids (M, W), mask, the free positions, embeddings of the ids, which ids are words."""
        known, fixed, tails = self.words.cpu(), [], []
        for row, v, ids, words in zip(each, first.tolist(), ahead.ids.tolist(), ahead.words.tolist(), strict=True):
            prompt = row.prompt if self.how.over == "all" else ()
            fixed.append([i for i in (*prompt, *row.answer, v) if i < len(known) and known[i]])
            tails.append(ids[: sum(words)])
        if self.other is not None:
            assert self.masked is not None
            ids, mask, free = retokenized(self.masked, self.lm, list(zip(fixed, tails, strict=True)))
            return ids, mask, free, *self.other
        ids, mask = padded([[*a, *b] for a, b in zip(fixed, tails, strict=True)], first.device)
        ends = torch.tensor([len(a) for a in fixed], device=ids.device)
        return (
            ids,
            mask,
            mask & (torch.arange(ids.shape[1], device=ids.device) >= ends[:, None]),
            self.table,
            self.words,
        )

    def _noise(self, rows: list[_Row], free: Tensor, each: int) -> Tensor:
        """Uniform numbers of the sweeps (sweeps, M, L), of which each row draws as many as its own sentences need."""
        most = free.sum(1).reshape(len(rows), each).amax(1).tolist()
        out = torch.zeros(self.how.local.sweeps, len(rows), each, max([*most, 1]), dtype=torch.float64)
        for i, (row, width) in enumerate(zip(rows, most, strict=True)):
            out[:, i, :, :width] = torch.from_numpy(row.draws.random((len(out), each, width)))
        return out.flatten(1, 2).to(free.device)
