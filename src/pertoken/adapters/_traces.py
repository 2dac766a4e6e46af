"""Completions of other libraries as traces: ids in, no model needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.bytes import ByteView
from ..core.trace import Trace


def trace_of(
    view: ByteView,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    meta: Mapping[str, Any],
    emitted: Sequence[bool] | None = None,
) -> Trace:
    """A trace from ids.

    Args:
        view: of their tokenizer.
        meta: what scorers may ask for: ``prompt``, and the row's other columns.
        emitted: which ids the policy produced (default: all).
    """
    prompt, completion = tuple(map(int, prompt_ids)), tuple(map(int, ids))
    return Trace(
        prompt_ids=prompt,
        prompt_pieces=view.pieces(prompt, at_start=True),
        completion_ids=completion,
        completion_pieces=view.pieces(completion),
        tokenizer=view.fingerprint,
        emitted=None if emitted is None else tuple(map(bool, emitted)),
        ended=bool(completion) and completion[-1] == view.eos_id,
        meta=dict(meta),
    )
