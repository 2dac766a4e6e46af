"""Prompts as context ids and bytes to search, and drawn bytes as tokens of a trace."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.byte_ranges import ByteRanges, byte_ranges
from ...core.lm import LM
from ...core.trace import Trace
from .canonical import canonical
from .states import ByteState


@dataclass(frozen=True)
class Continue:
    """A text that is continued after ids that are no part of it (markers, a template)."""

    context: tuple[int, ...]
    text: str | bytes


def fim(
    lm: LM, prefix: str | bytes, suffix: str, markers: Sequence[str] = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
) -> Continue:
    """Fill in the middle, suffix first, so that the prefix is what is continued: it may end inside a token.

        <fim_prefix> <fim_suffix> suffix <fim_middle> prefix ...

    Raises:
        ValueError: a tokenizer without these markers.
    """
    vocabulary = lm.tokenizer.get_vocab()
    missing = [m for m in markers if m not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; give markers=... of a model trained to fill in")
    before, after, middle = (vocabulary[m] for m in markers)
    return Continue((before, after, *lm.tokenizer.encode(suffix, add_special_tokens=False), middle), prefix)


def reading(lm: LM, prompt: Any, *, whole: bool = False) -> tuple[tuple[int, ...], bytes]:
    """A prompt as ids that are read as they stand, and the bytes behind them, which are searched.

    Args:
        whole: all of a continued text is searched, not only what stands behind its last sure boundary.

    Raises:
        ValueError: no id before the text, and no BOS.
    """
    byte_ranges(lm.view)  # refuses a vocabulary without bytes
    if isinstance(prompt, Continue):
        return _continued(lm, prompt.context, prompt.text, whole)
    if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], int):
        return prompt, b""
    if isinstance(prompt, bytes):
        return _continued(lm, (), prompt, whole)
    if lm.template == "chat":
        if not isinstance(prompt, str) and prompt and prompt[-1]["role"] == "assistant":
            return _continued(lm, lm.encode_prompt(list(prompt[:-1])), prompt[-1]["content"], whole)
        return lm.encode_prompt(prompt), b""
    if not isinstance(prompt, str):
        lm.encode_prompt(prompt)  # refuses several turns, as there is no template for them
        prompt = prompt[0]["content"]
    return _continued(lm, (), prompt, whole)


def _continued(lm: LM, context: tuple[int, ...], text: str | bytes, whole: bool) -> tuple[tuple[int, ...], bytes]:
    data = text.encode() if isinstance(text, str) else text
    known = data.decode("utf8", "ignore") if not whole else ""
    fixed: tuple[int, ...] = ()
    if known and data.startswith(known.encode()):
        ids = tuple(lm.tokenizer.encode(known, add_special_tokens=False))
        pieces = lm.view.pieces(ids, at_start=not context)
        tail, begins = canonical(lm.view).tail(ids)
        if not begins and b"".join(pieces) == known.encode():
            fixed = ids[: len(ids) - len(tail)]
            data = data[len(b"".join(pieces[: len(fixed)])) :]
    bos = lm.tokenizer.bos_token_id
    if not context and bos is not None:
        usual = lm.encode_prompt("a") if lm.template == "plain" else ()
        if not fixed or usual[:1] == (bos,):
            context = (bos,)
    if not context and not fixed:
        raise ValueError(
            "nothing stands before the first token of this text, and the tokenizer has no BOS: nothing says how "
            "likely it is; put a word before it, or set tokenizer.bos_token"
        )
    return (*context, *fixed), data


def spelling(ranges: ByteRanges, data: bytes) -> list[int] | None:
    """As few ids as spell the bytes, None if none do."""
    best: list[list[int] | None] = [[]] + [None] * len(data)
    for k in range(len(data)):
        so_far = best[k]
        if so_far is None:
            continue
        for node in ranges.along(data[k:]):
            ids = ranges.ending(node)
            there = best[k + node.depth]
            if len(ids) and (there is None or len(there) > len(so_far) + 1):
                best[k + node.depth] = [*so_far, int(ids[0])]
    return best[-1]


def tokens_of(lm: LM, state: ByteState | None, before: int, drawn: bytes) -> tuple[list[int], list[bytes]]:
    """Ids and pieces of drawn bytes: the likeliest tokenization's where it does not reach into the prompt, else as few
    as there are.

    Args:
        before: searched bytes of the prompt.

    Raises:
        ValueError: bytes that the vocabulary cannot spell (an ensemble drew what this model cannot).
    """
    view, ranges = lm.view, byte_ranges(lm.view)
    best = max(state.branches(), key=lambda b: b.mass(), default=None) if state is not None else None
    history = best.history if best is not None else ()
    pieces = view.pieces(history, at_start=state is not None and state.model.begins)
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    inner = [(i, p) for i, p, at in zip(history, pieces, ends, strict=False) if at >= before and p]
    start = next((at for at, p in zip(ends, pieces, strict=False) if at >= before and p), before + len(drawn))
    left = drawn[: start - before]
    right = drawn[start - before + sum(len(p) for _, p in inner) :]
    out_ids: list[int] = []
    out_pieces: list[bytes] = []
    for chunk, middle in ((left, inner), (right, [])):
        ids = spelling(ranges, chunk)
        if ids is None:
            raise ValueError(
                f"{lm.name or 'the first model'} has no tokens that spell {chunk!r}; put another one first"
            )
        out_ids += [*ids, *(i for i, _ in middle)]
        out_pieces += [*(view.piece(i) for i in ids), *(p for _, p in middle)]
    return out_ids, out_pieces


def traced(
    lm: LM,
    prompt: Any,
    data: bytes,
    drawn: bytes,
    ended: bool,
    logps: np.ndarray,
    state: ByteState | None,
    sampling: dict[str, Any],
) -> Trace:
    """A trace of drawn bytes.

    Args:
        data: bytes of the prompt that were searched. logps: (bytes and end, 2), under what was drawn from and under P.
    """
    ids, pieces = tokens_of(lm, state, len(data), drawn)
    cuts = np.cumsum([0, *map(len, pieces)])
    sums = np.array([logps[a:b].sum(0) for a, b in itertools.pairwise(cuts)]).reshape(-1, 2)
    if ended:
        ids, pieces, sums = [*ids, lm.terminator], [*pieces, b""], np.concatenate([sums, logps[-1:]])
    asked: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str | list) else {}
    if isinstance(prompt, str):
        prompt_ids = lm.encode_prompt(prompt)
    else:
        context, rest = reading(lm, prompt)
        prompt_ids = (*context, *(spelling(byte_ranges(lm.view), rest) or ()))
    return lm.trace_of_ids(
        prompt_ids,
        ids,
        pieces,
        ended=ended,
        sampled_logps=sums[:, 0],
        policy_logps=sums[:, 1],
        sampling=sampling,
        meta=asked,
    )
