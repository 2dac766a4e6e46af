"""What navigation is made of: a prompt with the beginning of a reply, its next logits, completions of first tokens."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ...core.decode import LMGuide, Stream, Streamed
from ...core.lm import LM
from ...core.rollout import Sampling, inverse_cdf
from ...core.trace import Trace

Memo = MutableMapping[tuple[Any, ...], Trace]
"""Greedy completions, by the ids they followed, their first one, and what ends them."""


def encoded(lm: LM, prompt: Any, reply: str, chat: bool = False) -> tuple[int, ...]:
    """Ids of a prompt (text, messages, or ids) and the beginning of a reply.

    Args:
        chat: text is a turn of the chat template; else prompt and reply are one plain text.
    """
    if isinstance(prompt, str) and not chat:
        return LM(lm.model, lm.tokenizer, template="plain").encode_prompt(prompt + reply)
    ids = prompt if isinstance(prompt, tuple) else lm.encode_prompt(prompt)
    return (*ids, *lm.tokenizer.encode(reply, add_special_tokens=False))


def says_something(lm: LM, token: int) -> bool:
    """Whether a token stands for text by itself: neither special nor a fragment of a character."""
    piece = lm.view.piece(token)
    try:
        return bool(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return False


@torch.no_grad()
def next_logits(lm: LM, ids: tuple[int, ...]) -> np.ndarray:
    """Log-probs (V,) of what follows, float32 or better: they rank as logits do."""
    guide = LMGuide(lm=lm)
    return guide.step(guide.start([ids]), None)[0].cpu().numpy()


@torch.no_grad()
def completed(
    lm: LM,
    prompt: tuple[int, ...],
    firsts: Sequence[int],
    close: str,
    how: Sampling,
    draws: Sequence[np.random.Generator],
    stream: Stream | None = None,
    memo: Memo | None = None,
) -> list[Trace]:
    """Complete each first token after a prompt, to a token with `close` in it, the terminator, or `max_new_tokens`.

    Returns:
        A trace each, the first token in it (with a ``sampled_logps`` of 0: it was chosen, not drawn).
    """
    memo = memo if memo is not None and how.temperature == 0 else {}
    names = [(prompt, first, close, how) for first in firsts]
    new = [k for k, name in enumerate(names) if name not in memo]
    tokens = {k: [firsts[k]] for k in new}
    logps: dict[int, list[tuple[float, float]]] = {k: [] for k in new}
    if new:
        guide = LMGuide(lm=lm)
        state = guide.start([prompt] * len(new))
        begin = guide.step(state, None)
        for row, k in enumerate(new):
            logps[k].append((0.0, float(begin[row, firsts[k]])))
    rows, last = list(new), torch.tensor([firsts[k] for k in new], device=lm.device)
    keep = [i for i, k in enumerate(rows) if not _over(lm, prompt, tokens[k], close, how)]
    while keep:
        if len(keep) < len(rows):
            kept = torch.tensor(keep, device=last.device)
            guide.reorder(state, kept)
            rows, last = [rows[i] for i in keep], last[kept]
        policy = guide.step(state, last)
        logits = policy
        if len(tokens[rows[0]]) < how.min_new_tokens:
            stops = [s for s in lm.stop_ids if s < policy.shape[-1]]
            logits = policy.index_fill(-1, torch.tensor(stops, dtype=torch.long, device=policy.device), -torch.inf)
        drawn = how.logps(logits)
        uniform = torch.tensor([draws[k].random() for k in rows], dtype=torch.float64, device=drawn.device)
        last = inverse_cdf(drawn, uniform)
        for row, (k, token) in enumerate(zip(rows, last.tolist(), strict=True)):
            tokens[k].append(token)
            logps[k].append((float(drawn[row, token]), float(policy[row, token])))
        keep = [i for i, k in enumerate(rows) if not _over(lm, prompt, tokens[k], close, how)]
    for k in new:
        sampled, own = np.array(logps[k]).T
        memo[names[k]] = lm.trace_of_ids(
            prompt,
            tokens[k],
            ended=tokens[k][-1] in lm.stop_ids,
            sampled_logps=sampled,
            policy_logps=own,
            sampling=asdict(how) | {"model": lm.name},
        )
    out = [memo[name] for name in names]
    for k, trace in enumerate(out if stream else ()):
        for t, (token, piece) in enumerate(zip(trace.completion_ids, trace.completion_pieces, strict=True)):
            stream(Streamed(0, k, token, piece, t == len(trace) - 1))  # type: ignore[misc]
    return out


def _over(lm: LM, prompt: tuple[int, ...], tokens: list[int], close: str, how: Sampling) -> bool:
    ended = tokens[-1] in lm.stop_ids or close.encode() in lm.view.piece(tokens[-1])
    return ended or len(tokens) >= how.max_new_tokens or len(prompt) + len(tokens) >= lm.context
