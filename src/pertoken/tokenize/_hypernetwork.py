"""A small hypernetwork: embedding rows of a token that a model does not have, from the rows of its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor, Tensor]  # input (N, H), output (N, H), bias (N,)


class Hypernetwork(nn.Module):
    """A transformer of two layers over the parts, pooled. `scale` is s, the root mean square of the model's rows."""

    def __init__(
        self, hidden: int, scale: float, *, sources: int = 1, width: int = 256, heads: int = 4, parts: int = 6
    ):
        super().__init__()
        self.config = dict(hidden=hidden, scale=scale, sources=sources, width=width, heads=heads, parts=parts)
        self.hidden, self.scale, self.parts = hidden, scale, parts
        self.enter = nn.Linear(sources * hidden, width)
        self.place = nn.Parameter(torch.zeros(parts, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, 2 * hidden + 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    @classmethod
    def fresh(cls, model: Any, seed: int = 0, **sizes: int) -> Hypernetwork:
        """An untrained one for a model."""
        source, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        tied = head is None or head.weight is source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scale = float(source.detach().float().square().mean().sqrt())
            return cls(source.shape[1], scale, sources=1 if tied else 2, **sizes).to(source.device)

    def forward(self, parts_NKE: Tensor, mask_NK: Tensor) -> Rows:
        """What to add to the means. Parts are rows side by side; `mask_NK` is True where there is one."""
        x = self.enter(parts_NKE.float() / self.scale) + self.place[: parts_NKE.shape[1]]
        x = self.encoder(x, src_key_padding_mask=~mask_NK)
        pooled = torch.where(mask_NK[..., None], x, 0).sum(1) / mask_NK.sum(1, keepdim=True)
        found = self.scale * self.leave(pooled)
        return found[:, : self.hidden], found[:, self.hidden : -1], found[:, -1]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; its shape is in the metadata."""
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, {"config": json.dumps(self.config)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Hypernetwork:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("config")
            if config is None:
                raise ValueError(f"{path} is no hypernetwork; give a file that Hypernetwork.save wrote")
            made = cls(**json.loads(config))
            made.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        return made
