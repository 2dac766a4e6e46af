"""The masked LM of SPC: conditionals of one position, Gibbs sweeps, expected embeddings; and, if it has a tokenizer of
its own, sentences cut anew as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.bytes import byte_view
from ...core.head import at_least_float32
from ...core.lm import LM, quiet
from ...core.packing import evaluating
from ...core.rollout import inverse_cdf
from .._verifier import padded
from .estimate import expected_embeddings, words_only

_TOGETHER = 64  # masked sentences computed together: their logits are (64, V)


class MaskedLM:
    """A transformers masked LM and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        if tokenizer.mask_token_id is None:
            raise ValueError("this tokenizer has no mask token; give the tokenizer of a masked LM")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.before = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
        self.after = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else []

    @classmethod
    def load(cls, source: str | Path, device: Any = None) -> MaskedLM:
        """From a folder or a Hub id.

        Raises:
            ValueError: it cannot be read.
        """
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        try:
            with quiet():
                model, tokenizer = AutoModelForMaskedLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
                return cls(model.to(device), tokenizer)
        except (OSError, ImportError) as error:
            raise ValueError(
                f"no masked LM at {str(source)!r}: give a folder or a Hub id in reach ({error})"
            ) from error

    def shares(self, lm: LM) -> bool:
        """Whether each of the LM's tokens has the same id here (a mask token may come on top)."""
        known = self.tokenizer.get_vocab()
        return all(known.get(token) == i for token, i in lm.tokenizer.get_vocab().items())

    @torch.no_grad()
    def logps(self, ids_NW: Tensor, mask_NW: Tensor, at_N: Tensor) -> Tensor:
        """log p(y_i = . | y_-i) of one position of each sentence, (N, V): masked, and alone in reaching the head."""
        rows, n = torch.arange(len(ids_NW), device=ids_NW.device), len(self.before)
        inside = ids_NW.clone()
        inside[rows, at_N] = self.tokenizer.mask_token_id
        lists = [self.before + row[m].tolist() + self.after for row, m in zip(inside, mask_NW, strict=True)]
        ids, attention = padded(lists, next(self.model.parameters()).device)

        def pick(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][rows.to(args[0].device), at_N.to(args[0].device) + n][:, None],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            with evaluating(self.model):
                logits = self.model(input_ids=ids, attention_mask=attention.long()).logits[:, 0]
        finally:
            hook.remove()
        return at_least_float32(logits).log_softmax(-1).to(ids_NW.device)


def gibbs(
    masked: MaskedLM, ids_NW: Tensor, mask_NW: Tensor, free_NW: Tensor, uniform_NL: Tensor, words_V: Tensor, stale: bool
) -> Tensor:
    """One sweep: every free position redrawn from the masked LM's conditional (words only), temperature 1.

    Args:
        uniform_NL: in [0, 1), by the place among a row's free positions. stale: all from the ids before the sweep
            (one batch of masked copies), else left to right.
    """
    place = free_NW.cumsum(1) - 1
    steps = [free_NW] if stale else [free_NW & (place == j) for j in range(int(free_NW.sum(1).max()))]
    now = ids_NW.clone()
    for chosen in steps:
        before, (row, at) = now.clone(), chosen.nonzero(as_tuple=True)
        for some in torch.arange(len(row), device=row.device).split(_TOGETHER) if len(row) else ():
            r, a = row[some], at[some]
            p = words_only(masked.logps(before[r], mask_NW[r], a)[:, : len(words_V)], words_V)
            now[r, a] = inverse_cdf(p.log(), uniform_NL[r, place[r, a]])
    return now


def masked_embeddings(
    masked: MaskedLM, ids_NW: Tensor, mask_NW: Tensor, free_NW: Tensor, words_V: Tensor, table: Tensor
) -> Tensor:
    """e_bar of the free positions, row by row from left to right, (F, D)."""
    row, at = free_NW.nonzero(as_tuple=True)
    parts = [table[:0]]
    for r, a in zip(row.split(_TOGETHER), at.split(_TOGETHER), strict=True) if len(row) else ():
        p = words_only(masked.logps(ids_NW[r], mask_NW[r], a)[:, : len(words_V)], words_V)
        parts.append(expected_embeddings(p, table))
    return torch.cat(parts)


def translated(masked: MaskedLM, lm: LM, table: Tensor) -> tuple[Tensor, Tensor]:
    """The verifier's embeddings of another tokenizer's tokens (the mean over the LM's tokens of each piece), and which
    of its ids are words."""
    words = torch.tensor([i not in masked.tokenizer.all_special_ids for i in range(len(masked.tokenizer))])
    names = masked.tokenizer.convert_ids_to_tokens(list(range(len(words))))
    texts = [masked.tokenizer.convert_tokens_to_string([name]) for name in names]
    inner = [name.startswith("##") or text[:1].isspace() for name, text in zip(names, texts, strict=True)]
    texts = [text.removeprefix("##") if i else f" {text}" for text, i in zip(texts, inner, strict=True)]
    rows = [lm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    out = torch.stack([table[row].mean(0) if row else torch.zeros_like(table[0]) for row in rows])
    return out, words.to(table.device) & torch.tensor([bool(row) for row in rows], device=table.device)


def retokenized(
    masked: MaskedLM, lm: LM, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences as the other tokenizer cuts them: ids (N, W), mask, and what begins behind the fixed part of each.

    Args:
        rows: ids of the fixed part (prefix, candidate) and of the look-ahead.
    """
    view, lists, free = byte_view(lm.tokenizer), [], []
    for fixed, ahead in rows:
        parts = [b"".join(view.pieces(tuple(part))).decode("utf8", "replace") for part in (fixed, ahead)]
        found = masked.tokenizer("".join(parts), add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in found["offset_mapping"]], int)
        lists.append(found["input_ids"])
        free.append((starts >= len(parts[0])).astype(int).tolist())
    ids, mask = padded(lists, lm.device)
    return ids, mask, padded(free, lm.device)[0].bool() & mask
