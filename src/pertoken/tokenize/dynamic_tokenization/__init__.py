"""Dynamic tokenization — frequent neighbours of a batch become new tokens of an existing model, on the fly.

Feher, Vulić, Minixhofer, "Retrofitting (Large) Language Models with Dynamic Tokenization", ACL 2025, arXiv 2411.18553.

    up to M times: (a, b) = the most frequent valid pair of neighbours in the batch (of equals, the first met);
                   every occurrence, left to right, becomes the token ab

A pair is valid if (1) ab has no space, line break or tab after its first character, unless it has nothing else and is
not exactly two line breaks; (2) by `boundary`, ab as text is one piece of the base pre-tokenizer (``pretokens``), of a
split at white space (``word``), that and no punctuation joins on the right but "-" (``word_hyphen``), or anything
(``sentence``); special tokens never merge; (3) bytes that are no text (but for ``sentence``) lie inside one character.
M = 0 gives the base tokens, M without limit one token a pre-token. Merges depend on the batch: `Merged.steps` replays.

Embeddings of new tokens: `embeddings`. Generation over a million tokens by an index: `vocabulary`. Task adaptation of
the model (LoRA, merged into it): `Retrofitted.adapt`.

Differs from the authors' code: (3), where they allow any merge (``compat="reference"``); special tokens are blocked by
name, not by how the pre-tokenizer cuts them; counts are kept up to date, not made afresh (the same merges).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.head import Head, log_probs
from .._adaptation import Asked, adapted
from .._hypernetwork import Hypernetwork
from .._index import Index
from .embeddings import Embeddings, backbone, distill, reproduce
from .merging import Boundary, Merged, Rule, Symbols, boundaries, merge, merges_for, replay
from .vocabulary import Draw, Vocabulary, generate, grow

__all__ = [
    "Boundary",
    "Draw",
    "DynamicTokenization",
    "Embeddings",
    "Hypernetwork",
    "Index",
    "Merged",
    "Retrofitted",
    "Symbols",
    "Vocabulary",
    "distill",
    "generate",
    "grow",
    "merge",
    "merges_for",
    "replay",
    "reproduce",
]


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
    hypernetwork: Any = None
    """What predicts embeddings of new tokens, a `Hypernetwork` or its file; None: FVT, the mean of the parts."""
    predict_base: bool = False
    """Base tokens get predicted embeddings, too."""
    cache: int = 5000
    """Predicted embeddings that are kept."""
    compat: Literal["paper", "reference"] = "paper"
    """``reference``: parts of characters merge with anything."""

    def __post_init__(self) -> None:
        if (self.merges is not None and self.merges < 0) or not 0 <= self.reduction <= 1 or self.cache < 0:
            raise ValueError(
                f"{self}: merges must be 0 or more (or None), reduction lie between 0 and 1, cache 0 or more"
            )

    def rule(self, symbols: Symbols) -> Boundary:
        """Which neighbours may merge; keep it, as it remembers its answers."""
        return Boundary(symbols, self.boundary, self.compat == "reference")

    def merge(self, rows: Sequence[Sequence[int]], boundary: Boundary) -> Merged:
        """Merge a batch of base ids (with their special tokens, without padding). With `per_example`, ``steps`` are
        those of one row after the other, and ``lengths`` only before and after."""
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

    def pieces(self, texts: Sequence[str], tokenizer: Any) -> list[list[bytes]]:
        """Bytes of the tokens of each text; the texts are one batch, padding and specials left out."""
        symbols = Symbols(tokenizer)
        cut = [symbols.view.pieces_of_text(text) for text in texts]
        starts = self.merge([ids for ids, _ in cut], self.rule(symbols)).starts
        return [
            [b"".join(said[a:b]) for a, b in pairwise([*some, len(said)])]
            for (_, said), some in zip(cut, starts, strict=True)
        ]

    def on(self, model: Any, tokenizer: Any) -> Retrofitted:
        """These options at work on a transformers model (of an `LM`: its ``causal``) and its tokenizer."""
        return Retrofitted(model, tokenizer, self)


class Retrofitted:
    """A model, causal or an encoder, that reads merged tokens. The model itself is not changed.

    Attributes:
        symbols, boundary, embeddings: what the parts of the method share.
    """

    def __init__(self, model: Any, tokenizer: Any, options: DynamicTokenization):
        net = options.hypernetwork
        if isinstance(net, str | Path):
            net = Hypernetwork.load(net).to(model.device)
        self.model, self.options, self.symbols = model, options, Symbols(tokenizer)
        self.boundary = options.rule(self.symbols)
        how = {"predict_base": options.predict_base, "cache": options.cache}
        self.embeddings = Embeddings(model, self.symbols, net, **how)

    def merge(self, rows: Sequence[Sequence[int]]) -> Merged:
        """Merge a batch of base ids."""
        return self.options.merge(rows, self.boundary)

    @torch.no_grad()
    def hidden(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last hidden states (N, T, H) of rows of symbols, and the mask (N, T); padding is on the right."""
        embedded, mask = self.embeddings.inputs(rows)
        return backbone(self.model, embedded, mask), mask

    @torch.no_grad()
    def prefill(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Tensor, Tensor]:
        """A cache that has read rows of symbols, padded on the left; the mask (N, T), the last hidden states (N, H).

        Raises:
            ValueError: an empty row.
        """
        from transformers import DynamicCache

        if not all(rows):
            raise ValueError("a prompt without a token: nothing predicts the next one; begin it with BOS")

        embedded, mask = self.embeddings.inputs(rows, left=True)
        cache = DynamicCache(config=self.model.config)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        told = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": places}
        out = self.model.base_model(**told, cache=cache, use_cache=True)
        return cache, mask, out.last_hidden_state[:, -1]

    @torch.no_grad()
    def nats(self, rows: Sequence[Sequence[int]], read: Merged, shared: Merged | None = None) -> tuple[float, int]:
        """Nats of the base tokens that follow shared boundaries, and the bytes of those tokens.

        What is compared is the next base token after each boundary of `shared`: the same tokens, however the text
        before them was read, so that nats a byte of two ways of reading differ by nothing else. Special tokens are not
        counted, nor is the first token of a row.

        Args:
            rows: base ids. read: how the model reads them (`merge` with M = 0: as the base model does).
            shared: boundaries, each of which `read` must have too; default: those of `read`.

        Raises:
            ValueError: a boundary that `read` lacks.
        """
        asked = boundaries(rows, read, self.symbols, shared)
        if not asked:
            return 0.0, 0
        hidden, _ = self.hidden(read.rows)
        where, place, ids = (torch.tensor(x, device=hidden.device) for x in zip(*asked, strict=True))
        found = log_probs(hidden[where, place], ids, Head(self.model), (), contextlib.nullcontext, 256)["logp"]
        return -float(found.double().sum()), sum(len(self.symbols.piece(token)) for _, _, token in asked)

    def adapt(
        self,
        rows: Sequence[Sequence[int]],
        *,
        reduction: float | None = None,
        rank: int = 8,
        steps: int = 200,
        batch: int = 32,
        lr: float = 3e-4,
        seed: int = 0,
    ) -> tuple[Retrofitted, list[float]]:
        """Adapt the model to texts of a task as it reads them here; the hypernetwork stays.

        The loss is what `nats` scores, a mean over boundaries: it does not depend on how the text behind is merged.

        Args:
            rows: base ids. reduction: share of the possible reduction in each batch (the paper: 0.5 or 0.75); None: M
                is drawn from 0 to the limit. rank: of LoRA.

        Returns:
            An adapted copy, to be read at any M; the losses, nats a boundary.

        Raises:
            ValueError: nothing to predict; a share out of range.
        """
        usable = [row for row in rows if any(not self.symbols.special(i) for i in row[1:])]
        if not usable or (reduction is not None and not 0 <= reduction <= 1):
            raise ValueError(f"{len(usable)} texts with a next token, reduction={reduction}: give texts, and 0 to 1")

        def batches() -> Iterator[Asked]:
            rng, order = np.random.default_rng((seed, 3)), list[int]()
            for _ in range(steps):
                while len(order) < min(batch, len(usable)):
                    order.extend(rng.permutation(len(usable)).tolist())
                some = [usable[i] for i in order[:batch]]
                del order[:batch]
                curve = merge(some, self.boundary).lengths
                drawn = int(rng.integers(len(curve)))
                read = merge(some, self.boundary, drawn if reduction is None else merges_for([curve], reduction))
                if asked := boundaries(some, read, self.symbols):  # else each text is one token now
                    with torch.no_grad():
                        embedded, mask = self.embeddings.inputs(read.rows)
                    rows, places, ids = (torch.tensor(x, device=mask.device) for x in zip(*asked, strict=True))
                    yield embedded, mask, rows, places, ids

        model, losses = adapted(self.model, batches(), rank=rank, lr=lr)
        options = dataclasses.replace(self.options, hypernetwork=self.embeddings.hypernetwork)
        return options.on(model, self.symbols.tokenizer), losses
