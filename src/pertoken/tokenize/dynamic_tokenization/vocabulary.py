"""A very large vocabulary: grown from the base one, its rows predicted, read by longest match, written by an index.

    logit(t | h) = h . O[t] + bias[t]          for the candidates of an approximate index, computed exactly (and scaled
                                               or capped, where the model does that to its logits)
    next input = E[drawn token]

Grown: BPE goes on over words of a text until the size is reached, all base tokens kept. The index is
`Index`, by the dot product (the paper's: by the cosine, which misses long vectors). EOS is always a candidate.

Differs from the authors' code: FAISS for ScaNN; their index script normalises the wrong object, and their
repetition penalty hits every candidate (here: tokens already used).
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.decode import generators
from ...core.head import Head
from .._index import Index
from .embeddings import Embeddings
from .merging import Boundary, Symbols, merge


def pretokens(text: str, symbols: Symbols) -> list[list[int]]:
    """Base ids of each pre-token of a text.

    Raises:
        ValueError: a slow tokenizer.
    """
    backend = getattr(symbols.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a slow tokenizer shows no pre-tokens; load it with use_fast=True")
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [[token.id for token in backend.model.tokenize(piece)] for piece in pieces if piece]


def grow(texts: Sequence[str], boundary: Boundary, size: int, least: int = 1) -> list[int]:
    """Go on with BPE on texts: all base tokens (specials too), then new ones in the order of their merges.

    Args:
        size: tokens in all; fewer if the texts hold no more. least: occurrences that a merge needs.
    """
    symbols = boundary.symbols
    counts = Counter(tuple(ids) for text in texts for ids in pretokens(text, symbols))
    base = sorted(set(symbols.tokenizer.get_vocab().values()))
    merged = merge([*counts], boundary, max(0, size - len(base)), weights=[*counts.values()], least=least)
    made = (symbols.of(a + b) for a, b in merged.steps)
    return [*base, *dict.fromkeys(s for s in made if s >= symbols.base)]


class Vocabulary:
    """Tokens with their rows. `ids` are symbols, a place is a row of `inputs`, `outputs` (n, H) and `bias` (n,)."""

    def __init__(self, ids: Sequence[int], embeddings: Embeddings, batch: int = 5000):
        self.ids, self.embeddings, self.symbols = list(ids), embeddings, embeddings.symbols
        with torch.no_grad():
            parts = [self._rows(self.ids[i : i + batch]) for i in range(0, len(self.ids), batch)]
        self.inputs, self.outputs, self.bias = (torch.cat([part[k] for part in parts]) for k in range(3))
        self.place = {symbol: k for k, symbol in enumerate(self.ids)}
        self._of = {self.symbols.piece(s): s for s in reversed(self.ids) if not self.symbols.special(s)}
        self._longest = max(map(len, self._of), default=0)

    def _rows(self, some: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        new = [self.embeddings.new(s) for s in some]
        kept = self.embeddings.fvt([(s,) if not n else (0,) for s, n in zip(some, new)])
        if not any(new):
            return kept
        made = self.embeddings.predict([self.embeddings.parts(s) for s, n in zip(some, new) if n])
        where = torch.tensor(new, device=kept[0].device)
        for x, y in zip(kept, made):
            x[where] = y.to(x.dtype)
        return kept

    def encode(self, ids: Sequence[int]) -> list[int]:
        """Base ids (a prompt, its special tokens in place) read anew: within each pre-token the longest match first."""
        out: list[int] = []
        said: list[int] = []
        for i in [*ids, None]:
            if i is not None and not self.symbols.special(i):
                said.append(i)
                continue
            try:
                text = b"".join(self.symbols.view.pieces(said, at_start=True)).decode("utf-8")
            except UnicodeDecodeError:
                out += said  # it was cut within a character: these tokens stay
            else:
                for word in pretokens(text, self.symbols) if text else ():
                    out += self._longest_first(b"".join(map(self.symbols.piece, word)))
            said = []
            out += [] if i is None else [i]
        return out

    def _longest_first(self, piece: bytes) -> list[int]:
        out, start = [], 0
        while start < len(piece):
            ends = range(min(len(piece), start + self._longest), start, -1)
            end = next((e for e in ends if piece[start:e] in self._of), None)
            if end is None:
                return list(self.embeddings.parts(self.symbols.of(piece)))
            out.append(self._of[piece[start:end]])
            start = end
        return out


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a token is drawn from the candidates."""

    neighbours: int = 20
    """Candidates of the index."""
    eos_bias: float = 0.0
    """Added to the logit of EOS."""
    repetition: float = 1.1
    """Divides (below 0: multiplies) the logits of tokens that were used."""
    temperature: float = 1.0
    """0 takes the likeliest."""
    top_k: int = 10
    min_p: float = 0.1
    """Least probability, as a share of the likeliest one's."""

    def __post_init__(self) -> None:
        low = min(self.neighbours - 1, self.temperature, self.top_k, self.min_p)
        if low < 0 or self.min_p > 1 or self.repetition <= 0:
            raise ValueError(
                f"{self}: neighbours must be 1 or more, temperature and top_k 0 or more, min_p lie between 0 and 1, "
                "repetition above 0"
            )

    def probabilities(self, logits: np.ndarray, used: np.ndarray, eos: np.ndarray) -> np.ndarray:
        """Probabilities (C,) of candidates: logits (C,), whether each was used, whether it is EOS."""
        logits = logits.astype(np.float64) + self.eos_bias * eos
        logits = np.where(used, np.where(logits > 0, logits / self.repetition, logits * self.repetition), logits)
        if self.temperature == 0:
            return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
        logits = logits / self.temperature
        p = np.exp(logits - logits.max())
        kept = np.argsort(-p, kind="stable")[: self.top_k or len(p)]
        p = np.where(np.isin(np.arange(len(p)), kept) & (p >= self.min_p), p, 0.0)
        return p / p.sum()


@torch.no_grad()
def generate(
    reader: Any,
    vocabulary: Vocabulary,
    index: Index,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    most: int = 64,
    draw: Draw | None = None,
    seed: int = 0,
    stream: Callable[[int, str], None] | None = None,
) -> list[tuple[list[int], str]]:
    """Draw a continuation of each prompt, over the whole vocabulary.

    Args:
        reader: a `Retrofitted` causal model. prompts: rows of symbols (`Vocabulary.encode`, merged, or base ids).
        stop: base ids that end a text, EOS first. most: tokens.
        stream: called with the prompt's place and text as it is complete (never with a part of a character).

    Returns:
        Symbols (with what ended it) and text, each; bytes at the end that make no character are not in the text.
    """
    how, words, symbols = draw or Draw(), vocabulary, vocabulary.symbols
    head = Head(reader.model)
    ends = np.array([words.place[s] for s in stop], np.int64)
    draws = [generators(seed, i, 1)[0] for i in range(len(prompts))]
    used = [{words.place[s] for s in prompt if s in words.place} for prompt in prompts]
    out: list[tuple[list[int], list[str]]] = [([], []) for _ in prompts]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    cache, mask, hidden = reader.prefill(prompts)
    open_rows, places = set(range(len(prompts))), np.zeros(len(prompts), np.int64)
    for step in range(most):
        found, _ = index.search(hidden, how.neighbours)
        states = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1).float().cpu().numpy()
        for i in sorted(open_rows):
            some = np.array(list(dict.fromkeys([*found[i][found[i] >= 0].tolist(), *ends.tolist()])))
            logits = head.finished(torch.from_numpy(index.vectors[some] @ states[i])).numpy()
            p = how.probabilities(logits, np.isin(some, [*used[i]]), some == ends[0])
            drawn = np.searchsorted(p.cumsum(), draws[i].random(), side="right")
            places[i] = some[min(int(drawn), int(np.flatnonzero(p)[-1]))]
            used[i].add(int(places[i]))
            symbol = words.ids[places[i]]
            out[i][0].append(symbol)
            text = decoders[i].decode(symbols.piece(symbol))
            out[i][1].append(text)
            if stream and text:
                stream(i, text)
            if symbol in stop:
                open_rows.discard(i)
        if not open_rows or step == most - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)  # rows that ended go on unseen
        embedded = words.inputs[torch.from_numpy(places).to(hidden.device)][:, None]
        told = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        hidden = reader.model.base_model(**told, cache=cache, use_cache=True).last_hidden_state[:, -1]
    return [(some, "".join(texts)) for some, texts in out]
