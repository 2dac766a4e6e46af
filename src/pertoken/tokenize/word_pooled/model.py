"""The word-pooled model end to end, and the GPT over units, pieces or words it is measured against: the same blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import END, MORE, PAD


class Block(nn.Module):
    """Pre-norm self-attention and a feed-forward layer of 4 d with GELU."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NSD: Tensor, keys_NS: Tensor | None = None) -> Tensor:
        """Causal; with `keys_NS` (True: may be looked at) bidirectional over those."""
        n, s, d = x_NSD.shape
        q, k, v = self.qkv(self.before(x_NSD)).view(n, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if keys_NS is None else keys_NS[:, None, None, :]
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, is_causal=mask is None)
        x_NSD = x_NSD + F.dropout(self.out(mixed.transpose(1, 2).reshape(n, s, d)), drop)
        return x_NSD + F.dropout(self.down(F.gelu(self.up(self.between(x_NSD)))), drop)


def _blocks(n: int, width: int, heads: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(Block(width, heads, dropout) for _ in range(n))


def _wide(logits: Tensor) -> Tensor:
    """Float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _start(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Saved(nn.Module):
    """A model that is saved with the arguments that make it."""

    config: dict[str, Any]

    def save(self, path: str | Path, meta: Mapping[str, str] | None = None) -> None:
        """One safetensors file; `meta` beside the arguments in its header."""
        from safetensors.torch import save_file

        header = {**(meta or {}), "config": json.dumps(self.config), "class": type(self).__name__}
        save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, path, header)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """The model of a file of `save`, in evaluation mode.

        Raises:
            ValueError: another class's file.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("class") != cls.__name__:
                raise ValueError(
                    f"{path} holds a {header.get('class')}, not a {cls.__name__}: load it by its own class"
                )
            model = cls(**json.loads(header["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model.eval()


class WordPooledLM(Saved):
    """B batch, t words, c0 units of a row (END included), p prefix slots, d width, V units.

    Args:
        vocabulary: V. row: c0. words: longest context in words (BOS included). compat: ``reference``: PAD is
            END, and the loss is over padding, too.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        row: int,
        words: int,
        prefix: int = 4,
        width: int = 512,
        layers: int = 8,
        heads: int = 8,
        spelling_layers: int = 2,
        spelling_heads: int = 4,
        dropout: float = 0.1,
        compat: str = "",
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.prefix, self.row, self.words, self.vocabulary = prefix, row, words, vocabulary
        self.compat, self.end = compat, PAD if compat == "reference" else END
        self.units = nn.Embedding(vocabulary + prefix, width)  # prefix ids are V .. V+p-1
        self.places = nn.Embedding(prefix + row, width)  # of the encoder and of the spelling decoder
        self.word_places = nn.Embedding(words * prefix, width)
        self.encoder = _blocks(spelling_layers, width, spelling_heads, dropout)
        self.main = _blocks(layers, width, heads, dropout)
        self.speller = _blocks(spelling_layers, width, spelling_heads, dropout)
        self.encoder_norm, self.main_norm, self.speller_norm = (nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)
        _start(self)

    def encode(self, ids_BtC: Tensor) -> Tensor:
        """Word vectors [B, t, p, d]: prefixes and real units (END included) see each other, padding is seen by none."""
        b, t, c = ids_BtC.shape
        slots = torch.arange(self.vocabulary, self.vocabulary + self.prefix, device=ids_BtC.device)
        ids = torch.cat([slots.expand(b * t, -1), ids_BtC.reshape(b * t, c)], 1)
        x = self.units(ids) + self.places.weight[: self.prefix + c]
        for block in self.encoder:
            x = block(x, ids != PAD)
        return self.encoder_norm(x[:, : self.prefix]).view(b, t, self.prefix, -1)

    def context(self, ids_BtC: Tensor) -> Tensor:
        """What the words up to and with each say of the next: [B, t, p, d].

        Raises:
            ValueError: more words than the model has places for.
        """
        b, t, _ = ids_BtC.shape
        if t > self.words:
            raise ValueError(f"{t} words, but the model has places for {self.words}: give the last ones")
        x = self.encode(ids_BtC).reshape(b, t * self.prefix, -1) + self.word_places.weight[: t * self.prefix]
        for block in self.main:
            x = block(x)
        return self.main_norm(x).view(b, t, self.prefix, -1)

    def spell(self, context_NpD: Tensor, ids_NC: Tensor) -> Tensor:
        """Log-probs [N, C+1, V] of each unit of N words, given the ones before it; PAD's is minus infinity, unless it
        is END. `ids_NC`: the units so far, padding after them."""
        x = torch.cat([context_NpD, self.units(ids_NC)], 1) + self.places.weight[: self.prefix + ids_NC.shape[1]]
        for block in self.speller:
            x = block(x)
        logits = _wide(self.head(self.speller_norm(x[:, self.prefix - 1 :])))
        if self.end != PAD:
            logits = logits.index_fill(-1, torch.tensor([PAD], device=logits.device), -torch.inf)
        return logits.log_softmax(-1)

    def forward(self, ids_BwC: Tensor) -> Tensor:
        """Log-probs [B, w-1, c0, V] of the units of words 2..w of blocks of w words."""
        b, w, c = ids_BwC.shape
        context = self.context(ids_BwC[:, :-1]).flatten(0, 1)
        return self.spell(context, ids_BwC[:, 1:, :-1].reshape(-1, c - 1)).view(b, w - 1, c, -1)

    def loss(self, ids_BwC: Tensor) -> Tensor | None:
        """Mean cross-entropy over real units and the one END of each word; ``reference``: over all c0 places, its
        padding included. None: nothing to predict (fewer than two words)."""
        targets = ids_BwC[:, 1:]
        counts = (targets != PAD) | (self.end == PAD)
        if not counts.any():
            return None
        nats = -self(ids_BwC).gather(-1, targets[..., None])[..., 0]
        return torch.where(counts, nats, 0.0).sum() / counts.sum()

    @torch.no_grad()
    def word_logps(self, ids_BwC: Tensor) -> Tensor:
        """Log-probability [B, w-1] of the rows 2..w given those before: of their units and their end (0 of a row that
        is all padding)."""
        targets = ids_BwC[:, 1:]
        logp = self(ids_BwC).gather(-1, targets[..., None])[..., 0]
        counts = (targets != PAD) | (self.end == PAD)
        return torch.where(counts, logp, 0.0).sum(-1)

    @torch.no_grad()
    def generate(
        self, ids_wC: Tensor, n: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Append n rows to a text of w rows (its last `words` are the context): [w + n, c0].

        Args:
            temperature: 0 is greedy. generator: needed above 0.

        Raises:
            ValueError: no row to begin with, or no generator.
        """
        if not len(ids_wC) or (temperature > 0 and generator is None):
            raise ValueError("give at least one row (the BOS word), and a generator if temperature is above 0")
        for _ in range(n):
            context = self.context(ids_wC[None, -self.words :])[:, -1]
            row = torch.full((1, self.row), PAD, device=ids_wC.device)
            for place in range(self.row):
                logp = self.spell(context, row[:, :place])[0, -1]
                if temperature > 0:
                    chosen = torch.multinomial((logp / temperature).softmax(-1), 1, generator=generator)[0]
                else:
                    chosen = logp.argmax()
                row[0, place] = chosen
                if int(chosen) == self.end or (self.end != PAD and int(chosen) == MORE):
                    break
            ids_wC = torch.cat([ids_wC, row])
        return ids_wC


class GPT(Saved):
    """The baseline, p = 0: a causal model over ids, 0 is padding and 1 begins a text; neither is ever predicted."""

    def __init__(
        self, *, vocabulary: int, places: int, width: int = 512, layers: int = 8, heads: int = 8, dropout: float = 0.1
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.units, self.places = nn.Embedding(vocabulary, width), nn.Embedding(places, width)
        self.main, self.norm = _blocks(layers, width, heads, dropout), nn.LayerNorm(width)
        _start(self)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Log-probs [B, T, V] of the next id; embeddings are the head, too.

        Raises:
            ValueError: more ids than places.
        """
        if ids_BT.shape[1] > self.places.num_embeddings:
            raise ValueError(f"{ids_BT.shape[1]} ids, but the model has {self.places.num_embeddings} places")
        x = self.units(ids_BT) + self.places.weight[: ids_BT.shape[1]]
        for block in self.main:
            x = block(x)
        logits = _wide(F.linear(self.norm(x), self.units.weight))
        return logits.index_fill(-1, torch.tensor([0, 1], device=logits.device), -torch.inf).log_softmax(-1)

    def loss(self, ids_BT: Tensor) -> Tensor | None:
        """Mean cross-entropy of ids 2..T that are not padding; None: there is none."""
        targets = ids_BT[:, 1:]
        if not (targets > 0).any():
            return None
        return F.nll_loss(self(ids_BT[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=0)
