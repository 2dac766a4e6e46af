"""Masks of packed rows, and attention on the CPU that skips what they forbid.

torch's SDPA multiplies every query with every key and masks afterwards: for four prompts in a row, or eight branches on
a short trunk, most of that is thrown away. A `TreeMask` is the dense additive mask, and whatever reads it finds that;
but `F.scaled_dot_product_attention` given one computes stretch by stretch: the trunk with its first branch as plain
causal attention, each further branch against the trunk and itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attends(segment: Tensor, branch: Tensor, position: Tensor, q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Whether column q of a row may look at column k: same stretch, not later, and k in the trunk or in q's branch.

    Args:
        segment, branch, position: of one row, shape (C,).
        q, k: column indices, broadcastable.
        window: sliding window by position, or None.
    """
    ok = (k <= q) & (segment[q] == segment[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
    if window is not None:
        ok = ok & (position[q] - position[k] < window)
    return ok


def additive_mask(
    segment_RC: Tensor, branch_RC: Tensor, position_RC: Tensor, window: int | None, dtype: torch.dtype
) -> Tensor:
    """What SDPA and eager attention add to their scores, (R, 1, C, C): 0 where `attends`, else the least number."""
    columns = torch.arange(segment_RC.shape[1], device=segment_RC.device)
    rows = [
        attends(s, b, t, columns[:, None], columns[None, :], window)
        for s, b, t in zip(segment_RC, branch_RC, position_RC, strict=True)
    ]
    allowed = torch.stack(rows)[:, None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def block_mask(segment_RC: Tensor, branch_RC: Tensor, position_RC: Tensor, window: int | None) -> Any:
    """The same for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attends(segment_RC[b], branch_RC[b], position_RC[b], q, k, window)

    rows, columns = segment_RC.shape
    return create_block_mask(allowed, rows, None, columns, columns, device=segment_RC.device)


Stretch = tuple[int, tuple[int, ...]]  # tokens of the trunk, and of each branch


class TreeMask(Tensor):
    """An additive mask (1, 1, C, C) that knows the stretches its row is made of, end to end."""

    pieces: list[tuple[int, int, Tensor | None]]  # tokens; of which trunk; mask of a branch over trunk and itself

    @staticmethod
    def of(mask: Tensor, stretches: Sequence[Stretch]) -> TreeMask:
        """The mask with its structure; what the stretches do not cover is padding."""
        pieces: list[tuple[int, int, Tensor | None]] = []
        start = 0
        for trunk, lengths in stretches:
            first, *others = [n for n in lengths if n] or [0]
            pieces.append((trunk + first, trunk, None))
            at = start + trunk + first
            for n in others:
                rows = mask[:, :, at : at + n]
                own = torch.cat((rows[..., start : start + trunk], rows[..., at : at + n]), -1)
                pieces.append((n, trunk, own))
                at += n
            start = at
        if start != mask.shape[-1]:
            raise ValueError(f"stretches of {start} tokens in a row of {mask.shape[-1]}")
        tree = mask.as_subclass(TreeMask)
        tree.pieces = pieces
        return tree

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            mask = options.get("attn_mask")
            if func is F.scaled_dot_product_attention and isinstance(mask, TreeMask) and len(args) == 3:
                query, key, value = args
                return _by_piece(
                    query, key, value, mask.pieces, **{k: v for k, v in options.items() if k != "attn_mask"}
                )
            return func(*args, **options)


def _by_piece(
    query: Tensor, key: Tensor, value: Tensor, pieces: list[tuple[int, int, Tensor | None]], **options: Any
) -> Tensor:
    """Attention of (1, heads, C, D), a piece at a time."""
    sizes = [n for n, _, _ in pieces]
    options.pop("is_causal", None)
    out, trunk_kv = [], (key, value)
    for q, k, v, (_, trunk, mask) in zip(*(x.split(sizes, 2) for x in (query, key, value)), pieces, strict=True):
        if mask is None:
            trunk_kv = k[:, :, :trunk], v[:, :, :trunk]
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        else:
            k, v = torch.cat((trunk_kv[0], k), 2), torch.cat((trunk_kv[1], v), 2)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(out, 2)
