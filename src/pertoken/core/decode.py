"""Decoding one token at a time: guides give next-token log-weights, samplers draw from them, traces remember how.

Draws depend on the seed and on the place of prompt and sample, not on what else is in the batch (as `rollout.sample`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .credit import Credit
from .guides import Guide, LMGuide, Parts, Placed, Product, weighted
from .lm import LM, Prompt
from .rollout import Sampling, inverse_cdf
from .trace import Trace

__all__ = ["Decoder", "Drawn", "Guide", "LMGuide", "Parts", "Placed", "Product", "Stream", "Streamed", "decode"]
__all__ += ["generators", "guidance", "weighted"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """One continuation of a prompt.

    Attributes:
        trace: the continuation; ``sampled_logps`` under what it was drawn from, ``policy_logps`` under the base model.
        logw: its log-weight (0 where all weigh alike; -inf: dead). credit: what guided it, token by token, if any.
        meta: figures of the draw, JSON values.
    """

    trace: Trace
    logw: float = 0.0
    credit: Credit | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """A token, as it is drawn: of which prompt and sample, its id, its bytes, whether the sequence ends here."""

    prompt: int
    sample: int
    token: int
    piece: bytes
    ended: bool


Stream = Callable[[Streamed], None]


class Decoder(Protocol):
    """A method of the room `generate`: n continuations of each prompt. What it needs besides the model (an
    autoregressive reward, a constraint, a verifier) are its options."""

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """n draws a prompt, in order. `stream` is called with each token as it comes, by the methods that draw left to
        right (particles cannot: their past changes)."""
        ...


def generators(seed: int, prompt: int, n: int) -> list[np.random.Generator]:
    """One counter-based generator a sample of a prompt: the same draws whatever else is in the batch.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    return [np.random.Generator(np.random.Philox(key=[seed, (prompt << 32) + i])) for i in range(n)]


@torch.no_grad()
def decode(
    lm: LM,
    guide: Guide,
    prompts: Sequence[Any],
    *,
    n: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    stream: Stream | None = None,
    base: Callable[[Any], Tensor | None] | None = None,
    batch: int = 64,
    meta: Mapping[str, Any] | None = None,
    draws: Sequence[Sequence[np.random.Generator]] | None = None,
    requests: Sequence[Any] | None = None,
    each: Callable[[Any, Tensor, list[tuple[int, int]]], None] | None = None,
) -> list[list[Trace]]:
    """Draw from a guide, left to right.

    Args:
        lm: whose tokens these are: pieces, stop ids, the prompt of the traces.
        guide: the (composed) guide; its log-weights are normalised, then `sampling` is applied.
        base: state -> what the base model said last, (N, V) log-probs, for ``policy_logps``; default: a `Product`'s
            first guide if it is used, else what the guide said.
        batch: sequences computed together. meta: put into each trace's ``sampling``.
        draws: n generators a prompt, where a prompt has another place for whoever asked than it has here; default:
            `generators` of the seed and the place.
        requests: what the guide starts from, one a prompt, where it is more than the prompt (weights of its own).
        each: told of each step: the guide's state, the ids drawn (N,), and (prompt, sample) of each row.

    Returns:
        n traces a prompt.

    Raises:
        ValueError: log-weights with NaN, or none above -inf; a setting out of range.
    """
    sampling = sampling or Sampling()
    if n < 1 or batch < 1:
        raise ValueError(f"n={n}, batch={batch}: give 1 or more")
    ids, asked_of = [LMGuide(lm=lm).ids(p) for p in prompts], prompts if requests is None else requests
    out: list[list[Trace]] = [[] for _ in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    together = max(1, batch // n)
    for start in range(0, len(order), together):
        part = order[start : start + together]
        state = guide.start([asked_of[i] for i in part for _ in range(n)])
        chance = [g for i in part for g in (draws[i] if draws is not None else generators(seed, i, n))]
        if isinstance(guide, Placed):
            guide.placed(state, [(i, k) for i in part for k in range(n)], seed)
        rows, last = np.arange(len(chance)), None
        tokens: list[list[int]] = [[] for _ in chance]
        logps: list[tuple[list[float], list[float]]] = [([], []) for _ in chance]
        ended = [False] * len(chance)
        while len(rows):
            logw = guide.step(state, last)
            logits = logw.log_softmax(-1)
            first = base(state) if base is not None else _first(state)
            policy = logits if first is None else first
            stops = [s for s in lm.stop_ids if s < logits.shape[-1]]
            if len(tokens[rows[0]]) < sampling.min_new_tokens:
                logits = logits.index_fill(-1, torch.tensor(stops, dtype=torch.long, device=logits.device), -torch.inf)
            drawn = sampling.logps(logits)
            uniform = torch.tensor([chance[r].random() for r in rows], dtype=torch.float64, device=drawn.device)
            token = inverse_cdf(drawn, uniform)
            if each:
                each(state, token, [(part[r // n], int(r % n)) for r in rows])
            record = torch.stack([x.gather(1, token[:, None])[:, 0].double() for x in (drawn, policy)]).cpu().numpy()
            if not np.isfinite(record[0]).all():
                row = int(rows[~np.isfinite(record[0])][0])
                raise ValueError(f"prompt {part[row // n]}: no next token has a finite weight; look at the guides")
            keep = []
            for k, (row, t) in enumerate(zip(rows, token.tolist(), strict=True)):
                tokens[row].append(t)
                for place, value in zip(logps[row], record[:, k], strict=True):
                    place.append(float(value))
                ended[row] = t in lm.stop_ids
                full = len(tokens[row]) >= sampling.max_new_tokens
                full |= len(ids[part[row // n]]) + len(tokens[row]) >= lm.context
                if stream:
                    stream(Streamed(part[row // n], int(row % n), t, lm.view.piece(t), ended[row] or full))
                if not ended[row] and not full:
                    keep.append(k)
            kept = torch.tensor(keep, dtype=torch.long, device=token.device)
            if 0 < len(keep) < len(rows):
                guide.reorder(state, kept)
            rows, last = rows[keep], token[kept]
        how = dataclasses.asdict(sampling) | {"model": lm.name, "seed": seed} | dict(meta or {})
        for row in range(len(chance)):
            i = part[row // n]
            asked = {} if isinstance(prompts[i], tuple) and isinstance(prompts[i][0], int) else {"prompt": prompts[i]}
            out[i].append(
                lm.trace_of_ids(
                    ids[i],
                    tokens[row],
                    ended=ended[row],
                    sampled_logps=np.array(logps[row][0]),
                    policy_logps=np.array(logps[row][1]),
                    sampling=how | {"place": [i, row % n]},
                    meta=asked,
                )
            )
    return out


def _first(state: Any) -> Tensor | None:
    return state.said[0] if isinstance(state, Parts) and state.said else None


def guidance(trace: Trace, method: str, version: int = 1) -> Credit:
    """What the guides did to each token: log-prob under what it was drawn from less that under the base model."""
    assert trace.sampled_logps is not None and trace.policy_logps is not None
    values = np.asarray(trace.sampled_logps) - np.asarray(trace.policy_logps)
    return Credit(trace=trace, values=values, kind="logratio", method=method, version=version)
