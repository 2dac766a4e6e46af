"""Differentiable verifiers: the log-odds that a text has an attribute, from the embeddings of its tokens.

    phi_a(y) = sigmoid(head(emb(y_1), ..., emb(y_T)))

`Verifier` is a small trainable head on the frozen token embeddings of a language model (the method SPC steps along its
gradient; its classifier must read the LM's own tokens). Pooling skips padding; without position embeddings any length
is read. Texts and labels in, safetensors out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.lm import LM
from ..core.packing import evaluating

Pool = Literal["mean", "attention"]
_PROBES = 64


class Differentiable(Protocol):
    """What SPC asks of a verifier."""

    fingerprint: str
    """Of the tokenizer whose ids it reads (`ByteView.fingerprint`)."""
    embedding: Tensor
    """(V, d), one row an id."""

    def __call__(self, embeds_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """Log-odds (N,) of the attribute; what the mask leaves out is padding. Rows must not touch each other."""
        ...


@dataclass(frozen=True, kw_only=True)
class VerifierOptions:
    """Shape and training of a verifier."""

    pool: Pool = "mean"
    """Mean over the tokens, or a self-attention layer (each token reads the others) before it."""
    width: int = 0
    """Units of a hidden layer after pooling (0: the head is linear in the mean)."""
    dropout: float = 0.1
    """Of pooled features, in training."""
    lr: float = 1e-2
    """Adam's, with a cosine to 0."""
    weight_decay: float = 1e-2
    """AdamW's."""
    epochs: int = 30
    """Passes over the texts."""
    batch: int = 64
    """Texts a step."""
    longest: int = 128
    """Tokens of a text that are read in training; of a longer one, the first."""
    sharpness: float = 1.0
    """Factor of the log-odds once it is trained: above 1 phi comes nearer to its verdict (0 or 1), and p phi steers
    harder; the verdicts stay."""
    prefixes: bool = False
    """Learn from every prefix of a text with the text's label (FUDGE's classifier), one drawn anew in each epoch."""

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "attention"):
            raise ValueError(f"pool={self.pool!r} is not one of mean, attention")
        counts = min(self.epochs, self.batch, self.longest) >= 1 and self.width >= 0
        rates = all(0 < x < math.inf for x in (self.lr, self.sharpness)) and 0 <= self.weight_decay < math.inf
        if not (counts and rates and 0 <= self.dropout < 1):
            raise ValueError(f"{self}: counts >= 1, weight_decay >= 0, dropout < 1, lr and sharpness > 0 are needed")


class Verifier(nn.Module):
    """A head on frozen token embeddings.

    Args:
        lm: whose embeddings and tokenizer it reads; the embeddings are neither trained nor saved.
        pool, width, dropout: as in `VerifierOptions`.
    """

    scale: Tensor
    probes: Tensor
    sharpness: Tensor

    def __init__(self, lm: LM, *, pool: Pool = "mean", width: int = 0, dropout: float = 0.1, seed: int = 0):
        super().__init__()
        self.fingerprint, self.pool, self.width = lm.view.fingerprint, pool, width
        table = lm.causal.get_input_embeddings().weight.detach()
        self.embedding = table.to(torch.promote_types(table.dtype, torch.float32))
        size, wide = self.embedding.shape[1], self.embedding.dtype
        self.dropout = nn.Dropout(dropout)
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global state
            torch.manual_seed(seed)
            self.query = nn.Linear(size, 64, bias=False) if pool == "attention" else None
            self.key = nn.Linear(size, 64, bias=False) if pool == "attention" else None
            self.value = nn.Linear(size, size, bias=False) if pool == "attention" else None
            self.hidden = nn.Linear(size, width) if width else None
            self.out = nn.Linear(width or size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("scale", self.embedding.std())
        self.register_buffer("sharpness", torch.tensor(1.0))
        self.register_buffer("probes", _probes(self.embedding))
        self.to(device=self.embedding.device, dtype=wide)

    def forward(self, embeds_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        """Log-odds (N,); a text without a token has those of the bias."""
        x = embeds_NTD
        if self.query is not None and self.key is not None and self.value is not None:
            x = x / self.scale
            scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(64)
            scores = scores.masked_fill(~mask_NT[:, None, :], torch.finfo(scores.dtype).min)
            x = (x + scores.softmax(-1) @ self.value(x)) * self.scale
        count = mask_NT.sum(1, keepdim=True).clamp(min=1) * self.scale
        pooled = self.dropout(torch.where(mask_NT[..., None], x, 0.0).sum(1) / count)
        if self.hidden is not None:
            pooled = torch.tanh(self.hidden(pooled))
        return self.out(pooled)[:, 0] * self.sharpness

    def read(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, T, d) and mask (N, T) of id rows, padded on the right."""
        ids, mask = padded(rows, self.embedding.device)
        return self.embedding[ids], mask

    @torch.no_grad()
    def log_odds(self, rows: Sequence[Sequence[int]], batch: int = 256) -> np.ndarray:
        """Log-odds (N,), float64, of texts as ids (special ones left out), in evaluation mode."""
        with evaluating(self):
            parts = [self(*self.read(rows[i : i + batch])).double().cpu() for i in range(0, len(rows), batch)]
        return torch.cat(parts).numpy() if parts else np.zeros(0)

    def save(self, path: str | Path) -> Path:
        """One safetensors file, the embeddings left out."""
        from safetensors.torch import save_file

        how = {"fingerprint": self.fingerprint, "pool": self.pool, "width": str(self.width)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, metadata=how | {"what": "verifier"})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, lm: LM) -> Verifier:
        """What `save` wrote, on the model that it was trained on.

        Raises:
            ValueError: no verifier there; another vocabulary, or other embeddings.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                how, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"no verifier at {str(path)!r} ({error}); save one with Verifier.save") from error
        if how.get("what") != "verifier":
            raise ValueError(f"{str(path)!r} holds no verifier; save one with Verifier.save")
        check_vocabulary(how["fingerprint"], lm)
        made = cls(lm, pool=cast(Pool, how["pool"]), width=int(how["width"]))
        here, there = made.probes, weights["probes"].to(made.probes)
        if here.shape != there.shape or not torch.allclose(here, there, atol=1e-2 * float(there.std()), rtol=1e-2):
            raise ValueError(
                f"the verifier at {str(path)!r} was trained on other embeddings than {lm.name or 'the model'} has; "
                "train it again on this one"
            )
        made.load_state_dict(weights)
        return made.eval()


def train_verifier(
    lm: LM,
    texts: Sequence[str],
    labels: Sequence[int],
    options: VerifierOptions | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Verifier:
    """Fit a verifier by cross-entropy to labelled texts.

    Args:
        texts, labels: 1 has the attribute, 0 has it not; both must occur.
        progress: called after each epoch with its number.

    Raises:
        ValueError: lengths that disagree, other labels, one class only, or a text without a token.
    """
    options = options or VerifierOptions()
    if len(texts) != len(labels) or set(labels) != {0, 1}:
        raise ValueError(f"{len(texts)} texts, {len(labels)} labels {sorted(set(labels))}: give one each, 0s and 1s")
    rows = [lm.view.pieces_of_text(text)[0][: options.longest] for text in texts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"text {i} has no token; leave it out")
    made = Verifier(lm, pool=options.pool, width=options.width, dropout=options.dropout, seed=seed)
    target = torch.tensor(labels, dtype=made.embedding.dtype, device=made.embedding.device)
    rng = np.random.default_rng(seed)
    steps = options.epochs * math.ceil(len(rows) / options.batch)
    adam = torch.optim.AdamW(made.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    made.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
        torch.manual_seed(seed)
        for epoch in range(options.epochs):
            order = rng.permutation(len(rows))
            for chosen in (order[i : i + options.batch] for i in range(0, len(order), options.batch)):
                some = [rows[i] for i in chosen]
                if options.prefixes:
                    some = [row[: int(rng.integers(1, len(row) + 1))] for row in some]
                loss = F.binary_cross_entropy_with_logits(made(*made.read(some)), target[torch.from_numpy(chosen)])
                adam.zero_grad()
                loss.backward()
                adam.step()
                schedule.step()
            if progress:
                progress(epoch)
    made.sharpness.fill_(options.sharpness)
    return made.requires_grad_(False).eval()


def check_vocabulary(fingerprint: str, lm: LM) -> None:
    """Refuse a verifier that reads other tokens.

    Raises:
        ValueError: it does.
    """
    if fingerprint != lm.view.fingerprint:
        raise ValueError(
            f"the verifier reads the tokens of another tokenizer ({fingerprint}) than {lm.name or 'the model'} "
            f"({lm.view.fingerprint}); train one on this model's embeddings (train_verifier)"
        )


def padded(rows: Sequence[Sequence[int]], device: Any = None) -> tuple[Tensor, Tensor]:
    """Ids (N, T) padded on the right with 0, and the mask of what is there; T is at least 1."""
    width = max([len(row) for row in rows] + [1])
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
    mask = torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), mask.to(device)


def _probes(table: Tensor) -> Tensor:
    """Rows by which embeddings are known again, float32."""
    return table[torch.linspace(0, len(table) - 1, min(_PROBES, len(table)), device=table.device).long()].float()
