"""ReAGent — which input tokens a predicted token came from, by replacing them: forward passes alone.

Zhao, Shan, "ReAGent: Towards A Model-agnostic Feature Attribution Method for Generative Language Models", AAAI 2024
workshop on Responsible Language Models, arXiv 2402.00794. Input y_1..y_t, target w, p0 = p(w | y); B probes, each with
scores S in R^t that begin at 0. A step of a probe replaces a random set m (each position with probability `ratio`):

    d = p0 - p(w | y with m replaced),    S_i += logit( (1 + d) / 2 ) where i in m,  logit( (1 - d) / 2 ) elsewhere

A probe stops once w is among the top-k predictions where all but the n positions with the largest S are replaced. The
attribution is the mean over stopped probes of softmax(S); a position that is in the top n of at least `overlap` probes
is of the rationale. As credit: kind attribution, over prompt and completion, one credit a target.

Differs from the authors' code: S begins at 0, not at noise of order one that stays in it (``init="uniform"`` is
theirs); probabilities are clamped to [1e-6, 1 - 1e-6]; a replacement is never the token itself nor a special one; at
least `min_steps` are made; if no probe stopped all are averaged and ``meta["converged"]`` is False (there: 0/0). The
part-of-speech sampler of their configurations needs NLTK's data; ours keeps a token's shape (leading space, case,
digits, punctuation). Soft metrics: `_replacement.soft_faithfulness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.credit import Credit
from ..core.head import Head
from ..core.lm import LM
from ..core.packing import evaluating
from ..core.rollout import decoding
from ..core.trace import Trace
from ._replacement import Replace, replacer

CLAMP = 1e-6
_TOGETHER, _ROWS = 512, 64  # tokens and rows of a forward, if the probes of one step have fewer
_ACCELERATED = 16  # times as many where a forward costs the same whatever is in it
Watch = Callable[[int, Tensor], None]


def update(scores_BT: Tensor, replaced_BT: Tensor, delta_B: Tensor) -> Tensor:
    """S after a step: float64 (B, T)."""
    signed_BT = torch.where(replaced_BT, delta_B[:, None], -delta_B[:, None])
    return scores_BT + torch.logit(((signed_BT + 1) / 2).clamp(CLAMP, 1 - CLAMP))


def kept_positions(scores_BT: Tensor, free_T: Tensor, n: int) -> Tensor:
    """bool (B, T): the n free positions with the largest scores, and all that are not free. Ties go to the first."""
    ranked = torch.where(free_T, scores_BT, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, : min(n, int(free_T.sum()))]
    return torch.zeros_like(scores_BT, dtype=torch.bool).scatter(1, order, True) | ~free_T


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a probe has found enough."""

    among: int = 3
    """k: the target must be among so many predictions. 0: never stop."""
    rationale: int = 8
    """n, positions that are kept (0: `rationale_ratio` of them)."""
    rationale_ratio: float = 0.3
    """Share of the free positions, rounded up, where `rationale` is 0."""
    every: int = 1
    """Steps between tests."""
    min_steps: int = 30
    """Steps before the first."""

    def __post_init__(self) -> None:
        if min(self.among, self.rationale, self.min_steps) < 0 or self.every < 1 or not 0 < self.rationale_ratio <= 1:
            raise ValueError(f"{self}: counts are 0 or more, every is 1 or more, rationale_ratio in (0, 1]")

    def size(self, free: int) -> int:
        """n."""
        return self.rationale or int(np.ceil(self.rationale_ratio * free))

    def due(self, step: int) -> bool:
        """Whether there is a test after a step."""
        return bool(self.among) and step >= self.min_steps and step % self.every == 0


@dataclass(frozen=True, kw_only=True)
class ReAGent:
    """Options of ReAGent."""

    probes: int = 5
    """B."""
    ratio: float = 0.3
    """Probability that a position is replaced."""
    max_steps: int = 3000
    """Most steps."""
    sampler: str = "shape"
    """What replaces a token: uniform (any), shape (any of its shape), inferential (what the model itself expects
    there), or postag (any of its part of speech; NLTK with its tagger's data)."""
    init: Literal["zero", "uniform"] = "zero"
    """S at the start: zero, or the release's noise."""
    overlap: int = 2
    """Probes whose top n must agree on a position of the rationale."""
    stop: Stop = field(default_factory=Stop)
    """When a probe stops."""
    fixed: tuple[int, ...] = ()
    """Positions of the input that are never replaced and not ranked (from its end: negative); special tokens never."""
    seed: int = 0
    """Of masks and replacements."""
    replace: Any = None
    """From Python, in place of `sampler`: a masked LM (`MaskedReplacer`), or (lm, ids) -> `Replace`."""

    def __post_init__(self) -> None:
        if self.probes < 1 or self.max_steps < 1 or not 0 < self.ratio < 1 or self.init not in ("zero", "uniform"):
            raise ValueError(f"{self}: probes and max_steps are 1 or more, ratio lies in (0, 1), init: zero, uniform")

    def explain(self, lm: LM, traces: Sequence[Trace], targets: Sequence[int] | None = None) -> list[list[Credit]]:
        """One credit a target token of each trace, over prompt and completion; 0 from the target on, and where the
        input is longer than the context (``meta["cut"]``). A target with nothing to replace has ``meta["reason"]``.

        Args:
            targets: places of completion tokens, negative from the end; default: all that the policy emitted.

        Raises:
            ValueError: a target that is not there; a trace of another tokenizer.
        """
        out = []
        for number, trace in enumerate(traces):
            if trace.tokenizer != lm.view.fingerprint:
                raise ValueError(f"trace {number} is of another tokenizer than the model; encode it with lm.trace")
            places = np.flatnonzero(trace.mask).tolist() if targets is None else list(targets)
            wrong = [t for t in places if not -len(trace) <= t < len(trace)]
            if wrong:
                raise ValueError(f"trace {number} has {len(trace)} completion tokens and none at {wrong[0]}")
            out.append([self._target(lm, trace, t % len(trace), number) for t in places])
        return out

    def _target(self, lm: LM, trace: Trace, t: int, number: int) -> Credit:
        before, target = trace.prompt_ids + trace.completion_ids[:t], trace.completion_ids[t]
        ids = before[-lm.context :]
        values = np.zeros(len(trace.prompt_ids) + len(trace))
        meta: dict[str, Any] = {"target": len(before)}
        if len(ids) < len(before):
            meta["cut"] = len(before) - len(ids)  # tokens beyond the context, which get nothing
        if self._free(lm, ids).any():
            found = self.attribute(lm, ids, target, key=(number, t))
            values[len(before) - len(ids) : len(before)] = found.pop("scores")
            meta |= found
        else:
            meta["reason"] = "no token before it that may be replaced"
        return Credit(trace=trace, values=values, kind="attribution", over="all", method="reagent", meta=meta)

    def _free(self, lm: LM, ids: Sequence[int]) -> np.ndarray:
        free = np.array([i not in lm.view.special_ids for i in ids], bool)
        free[[p % len(ids) for p in self.fixed if -len(ids) <= p < len(ids)]] = False
        return free

    @torch.no_grad()
    def attribute(
        self, lm: LM, ids: Sequence[int], target: int, key: Sequence[int] = (), watch: Watch | None = None
    ) -> dict[str, Any]:
        """The attribution of one target.

        Args:
            ids: the input. key: with the seed, decides the draws.
            watch: told of S (B, t) after each step.

        Returns:
            ``scores`` (t,) that sum to 1, ``rationale`` (positions), ``steps`` of each probe, ``converged``, ``p0``,
            ``rows`` (inputs that the model was run on).

        Raises:
            ValueError: no input, one beyond the context, no position that may be replaced, or no such target.
        """
        if not len(ids):
            raise ValueError("nothing stands before the target; give it a prompt, or take a later target")
        if len(ids) > lm.context:
            raise ValueError(f"{len(ids)} tokens stand before the target, and the context has {lm.context}; cut them")
        if not 0 <= target < Head(lm.causal).vocabulary:
            raise ValueError(f"target {target} is no id of the model; give one below {Head(lm.causal).vocabulary}")
        free = self._free(lm, ids)
        if not free.any():
            raise ValueError("every position is fixed or special; leave one free to be replaced")
        # two streams, so that neither how many steps go together nor when a probe stops changes a draw
        probing, testing = np.random.default_rng([self.seed, *key]).spawn(2)
        replace: Replace = (self.replace or replacer(self.sampler))(lm, tuple(ids))
        ids_T, free_T, n = torch.tensor(list(ids)), torch.from_numpy(free), self.stop.size(int(free.sum()))
        p0, rows = float(self._probabilities(lm, ids_T[None])[0, target]), 1
        scores = torch.from_numpy(probing.uniform(size=(self.probes, len(ids)))) * (self.init == "uniform")
        steps, running = np.full(self.probes, self.max_steps), torch.ones(self.probes, dtype=torch.bool)
        done, more = 0, 1 if lm.device.type == "cpu" else _ACCELERATED
        while done < self.max_steps and running.any():
            # steps do not look at S, so that several are computed together; those after a probe's stop are thrown away
            active = running.nonzero()[:, 0]
            fit = more * min(_TOGETHER // len(ids), _ROWS) // len(active)
            together = min(self.max_steps - done, max(1, fit))
            masks, probed = self._drawn(together, ids_T, free_T, replace, probing)
            p = self._probabilities(lm, probed[:, active].flatten(0, 1))[:, target]
            p = p.double().cpu().unflatten(0, (together, -1))
            table = [scores]
            for mask, p_A in zip(masks, p, strict=True):
                new = table[-1].clone()
                new[active] = update(new[active], mask[active], p0 - p_A)
                table.append(new)
            tested = [k for k in range(1, together + 1) if self.stop.due(done + k)]
            rows += len(active) * (together + len(tested))
            last = {int(b): together for b in active}  # steps of this stretch that count
            if tested:
                kept = torch.stack([kept_positions(table[k][active], free_T, n) for k in tested])
                others = torch.stack([replace(self.probes, testing)[active] for _ in tested])
                left = self._probabilities(lm, torch.where(kept, ids_T, others).flatten(0, 1))
                hit = ((left > left[:, target, None]).sum(1) < self.stop.among).cpu().unflatten(0, (len(tested), -1))
                for b, column in zip(active.tolist(), hit.T.tolist(), strict=True):
                    if any(column):
                        last[b] = tested[column.index(True)]
                        running[b], steps[b] = False, done + last[b]
            for k in range(1, together + 1):
                scores = torch.stack([table[min(k, last.get(b, 0))][b] for b in range(self.probes)])
                if watch is not None and k <= max(last.values()):
                    watch(done + k, scores)
            done += together
        stopped = ~running if not running.all() else torch.ones_like(running)
        each = torch.where(free_T, scores, -torch.inf).softmax(1)
        votes = (kept_positions(scores, free_T, n) & free_T)[stopped].sum(0)
        return {
            "scores": each[stopped].mean(0).numpy(),
            "rationale": torch.nonzero(votes >= self.overlap)[:, 0].tolist(),
            "steps": steps.tolist(),
            "converged": bool(not running.all()),
            "p0": p0,
            "rows": rows,
        }

    def _drawn(
        self, together: int, ids_T: Tensor, free_T: Tensor, replace: Replace, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """What some steps replace (steps, B, t), and the inputs with it. A replacement by the same token is none."""
        masks, probed = [], []
        for _ in range(together):
            mask = torch.from_numpy(rng.random((self.probes, len(ids_T))) < self.ratio) & free_T
            probed.append(torch.where(mask, replace(self.probes, rng), ids_T))
            masks.append(mask & (probed[-1] != ids_T))
        return torch.stack(masks), torch.stack(probed)

    @staticmethod
    def _probabilities(lm: LM, ids_BT: Tensor) -> Tensor:
        """Next-token probabilities (B, V) after the last position, on the model's device."""
        with lm.active() as causal, evaluating(causal), decoding(causal):
            hidden = causal.base_model(input_ids=ids_BT.to(lm.device), use_cache=False).last_hidden_state[:, -1]
            return Head(causal)(hidden).softmax(-1)
