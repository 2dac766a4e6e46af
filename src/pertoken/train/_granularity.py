"""Token rewards as they are, or summed over sentences or over the whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.advantage import on_last
from ..core.stats import masked_sum
from ..core.trace import Trace

Granularity = Literal["token", "sentence", "sequence", "shaping"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


def regrouped(reward_NT: Tensor, mask_NT: Tensor, granularity: str, ends_NT: Tensor | None = None) -> Tensor:
    """Token rewards where the granularity puts them: (N, T).

    Args:
        reward_NT: 0 outside the mask.
        granularity: ``token``: as they are; ``sentence``: summed on the tokens that end a sentence, the rest on the
            last one; ``sequence``: summed on the last one; ``shaping``: as they are, less their sum on the last one.
        ends_NT: which tokens end a sentence (`sentence_ends`).
    """
    if granularity == "sequence":
        return on_last(masked_sum(reward_NT, mask_NT), mask_NT)
    if granularity == "shaping":
        return reward_NT - on_last(masked_sum(reward_NT, mask_NT), mask_NT)
    if granularity == "sentence":
        assert ends_NT is not None, "sentences need their ends"
        ends_NT = (ends_NT & mask_NT) | on_last(torch.ones_like(reward_NT[:, 0]), mask_NT).bool()
        sentence_NT = ends_NT.long().cumsum(1) - ends_NT.long()  # how many ended before
        sums_NS = reward_NT.new_zeros(len(reward_NT), reward_NT.shape[1] + 1).scatter_add(1, sentence_NT, reward_NT)
        return torch.where(ends_NT, sums_NS.gather(1, sentence_NT), torch.zeros_like(reward_NT))
    return reward_NT


def sentence_ends(traces: Sequence[Trace], longest: int) -> Tensor:
    """bool (N, longest): tokens whose text ends in ``.``, ``!`` or ``?``, or holds a newline."""
    ends_NT = torch.zeros(len(traces), longest, dtype=torch.bool)
    for row, trace in zip(ends_NT, traces, strict=True):
        for t, piece in enumerate(trace.completion_pieces):
            row[t] = piece.endswith((b".", b"!", b"?")) or b"\n" in piece
    return ends_NT
