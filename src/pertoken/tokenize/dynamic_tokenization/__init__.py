"""Dynamic tokenization — frequent neighbours of a batch become new tokens of an existing model, on the fly.

Feher, Vulić, Minixhofer, "Retrofitting (Large) Language Models with Dynamic Tokenization", ACL 2025, arXiv 2411.18553.

    up to M times: (a, b) = the most frequent valid pair of neighbours in the batch (of equals, the first met);
                   every occurrence, left to right, becomes the token ab

A pair is valid if (1) ab has no space, line break or tab after its first character, unless it has nothing else and is
not exactly two line breaks; (2) by `boundary`, ab as text is one piece of the base pre-tokenizer (``pretokens``), of a
split at white space (``word``), that and no punctuation joins on the right but "-" (``word_hyphen``), or anything
(``sentence``); special tokens never merge; (3) bytes that are no text (but for ``sentence``) lie inside one character.
M = 0 gives the base tokens, M without limit one token a pre-token. Merges depend on the batch: `Merged.steps` replays.

Embeddings of new tokens: `embeddings`. Generation over a million tokens by an index: `vocabulary`.

Differs from the authors' code: (3), where they allow any merge (``compat="reference"``); special tokens are blocked by
name, not by how the pre-tokenizer cuts them; counts are kept up to date, not made afresh (the same merges).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .merging import Boundary, Merged, Rule, Symbols, merge, merges_for, replay

__all__ = ["Boundary", "DynamicTokenization", "Merged", "Symbols", "merge", "merges_for", "replay"]


@dataclass(frozen=True, kw_only=True)
class DynamicTokenization:
    """Options of dynamic tokenization."""

    merges: int | None = None
    """M, merges a batch; None: as many as `reduction` needs."""
    reduction: float = 0.5
    """Share of the possible reduction of the number of tokens, from 0 (base tokens) to 1 (no valid pair is left)."""
    boundary: Rule = "pretokens"
    """What a merged token may not cross."""
    per_example: bool = False
    """Count, and merge M times, within each row instead of the batch."""
    compat: Literal["paper", "reference"] = "paper"
    """``reference``: parts of characters merge with anything."""

    def __post_init__(self) -> None:
        if (self.merges is not None and self.merges < 0) or not 0 <= self.reduction <= 1:
            raise ValueError(f"{self}: merges must be 0 or more (or None), reduction lie between 0 and 1")

    def rule(self, symbols: Symbols) -> Boundary:
        """Which neighbours may merge; keep it, as it remembers its answers."""
        return Boundary(symbols, self.boundary, self.compat == "reference")

    def merge(self, rows: Sequence[Sequence[int]], boundary: Boundary) -> Merged:
        """Merge a batch of base ids (with their special tokens, without padding)."""
        if self.per_example:
            alone = dataclasses.replace(self, per_example=False)
            found = [alone.merge([row], boundary) for row in rows]
            steps = tuple(step for one in found for step in one.steps)
            before, after = (sum(one.lengths[end] for one in found) for end in (0, -1))
            return Merged([one.rows[0] for one in found], [one.starts[0] for one in found], steps, (before, after))
        merges = self.merges
        if merges is None:
            merges = merges_for([merge(rows, boundary).lengths], self.reduction)
        return merge(rows, boundary, merges)

    def calibrated(self, batches: Sequence[Sequence[Sequence[int]]], boundary: Boundary) -> DynamicTokenization:
        """These options with the M that reaches `reduction` on average over batches, for batches like them."""
        curves = [merge(rows, boundary).lengths for rows in batches]
        return dataclasses.replace(self, merges=merges_for(curves, self.reduction))

    def encode(self, texts: Sequence[str], symbols: Symbols, **options: Any) -> list[list[int]]:
        """Base ids of texts; `options` are the tokenizer's (``truncation``, ``max_length``)."""
        return [list(ids) for ids in symbols.tokenizer(list(texts), **options)["input_ids"]]
