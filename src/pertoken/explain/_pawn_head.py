"""The trained part of PAWN: the network, its loss, training, judging, and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.lm import LM
from ..core.record import read_json, write_json
from ._detection import METRICS, Signals

POSITIONS = 512


class MLP(nn.Module):
    """Linear, `depth` - 1 residual blocks, Linear; GELU before each Linear but the first."""

    def __init__(self, inputs: int, outputs: int, depth: int = 3, width: int = 256):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        x = self.first(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(F.gelu(x)))
        return self.last(F.gelu(x))


class PAWNHead(nn.Module):
    """The trained part.

    Args:
        hidden: H of the language model. features: F. gates: G, a divisor of F.

    Raises:
        ValueError: gates that do not divide features; an unknown branch.
    """

    def __init__(
        self,
        hidden: int,
        *,
        branch: str = "pawn",
        features: int = 256,
        gates: int = 256,
        depth: int = 3,
        drop: float = 0.15,
    ):
        super().__init__()
        if features % gates or branch not in ("pawn", "metrics", "hidden"):
            raise ValueError(f"gates={gates} must divide features={features}; branch={branch!r}: pawn, metrics, hidden")
        self.branch, self.features, self.drop = branch, features, drop
        if branch == "hidden":
            self.states = MLP(2 * hidden + 1, features, 2 * depth)
        else:
            self.metrics = MLP(len(METRICS), features, depth)
        if branch == "pawn":
            self.gate = MLP(2 * hidden + 1, gates, depth)
        self.out = MLP(features, 1, depth)

    def forward(self, metrics_NTM: Tensor, states_NTS: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N,), and weights (N, T) that sum to 1 (mean over gates).

        Args:
            metrics_NTM: of METRICS. states_NTS: [h_i; h_{i+1}; i/512]. mask_NT: real positions, at least one a text.
        """
        kept_NT = self._dropped(mask_NT) if self.training else mask_NT
        if self.branch == "pawn":
            gates_NTG = self.gate(states_NTS).masked_fill(~kept_NT[..., None], -torch.inf).softmax(1)
        else:
            gates_NTG = (kept_NT / kept_NT.sum(1, keepdim=True))[..., None].to(metrics_NTM)
        values_NTF = self.states(states_NTS) if self.branch == "hidden" else self.metrics(metrics_NTM)
        values_NTF = torch.where(kept_NT[..., None], values_NTF, 0.0)
        tiled = gates_NTG.repeat(1, 1, self.features // gates_NTG.shape[-1])
        return self.out((tiled * values_NTF).sum(1))[:, 0], gates_NTG.mean(-1)

    def _dropped(self, mask_NT: Tensor) -> Tensor:
        """The mask without a share of its tokens; drawn again for texts that would lose all of them."""
        kept = mask_NT & (torch.rand(mask_NT.shape, device=mask_NT.device) >= self.drop)
        while not (kept.any(1) | ~mask_NT.any(1)).all():
            again = mask_NT & (torch.rand(mask_NT.shape, device=mask_NT.device) >= self.drop)
            kept = torch.where(kept.any(1, keepdim=True), kept, again)
        return kept


def pawn_loss(logit_N: Tensor, machine_N: Tensor, smoothing: float = 0.2, w_pos: float = 1.0) -> Tensor:
    """L: a mean over texts (not over weights)."""
    y = machine_N.to(logit_N) * (1 - smoothing) + smoothing / 2
    return -(w_pos * y * F.logsigmoid(logit_N) + (1 - y) * F.logsigmoid(-logit_N)).mean()


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the head is trained."""

    lr: float = 1e-3
    epochs: int = 5
    batch: int = 128
    weight_decay: float = 0.01
    smoothing: float = 0.2
    w_pos: float = 1.0
    """Weight of machine texts (human by machine texts balances them)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.epochs < 1 or self.batch < 1 or not 0 <= self.smoothing < 1 or self.w_pos <= 0:
            raise ValueError(f"{self}: lr and w_pos above 0, epochs and batch 1 or more, smoothing in [0, 1)")


def padded(signals: Sequence[Signals]) -> tuple[Tensor, Tensor, Tensor]:
    """Metrics, states and mask of texts, padded behind."""
    return _batch(_tensors(signals, torch.device("cpu")))


def _tensors(signals: Sequence[Signals], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Metrics and states of each text, moved once."""
    move = lambda a: torch.from_numpy(np.asarray(a, np.float32)).to(device)
    return [(move(s.metrics), move(s.hidden)) for s in signals]


def _batch(texts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    metrics = nn.utils.rnn.pad_sequence([m for m, _ in texts], batch_first=True)
    hidden = nn.utils.rnn.pad_sequence([h for _, h in texts], batch_first=True)
    i = torch.arange(metrics.shape[1], device=metrics.device)
    mask = i < torch.tensor([len(m) for m, _ in texts], device=metrics.device)[:, None]
    places = (i / POSITIONS).expand(len(texts), -1)[..., None]
    states = torch.cat([hidden[:, :-1], hidden[:, 1:], places], 2)
    return metrics, torch.where(mask[..., None], states, 0.0), mask


def fit_pawn(
    signals: Sequence[Signals],
    machine: Sequence[bool],
    how: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    **head: Any,
) -> PAWNHead:
    """Train a head on labelled texts' signals (AdamW, cosine, clipping at 1).

    Args:
        device: where it is trained, and stays; all signals are moved there at once.

    Raises:
        ValueError: not one label a text, one class only, or a text without a scored token.
    """
    how = how or Training()
    labels = torch.tensor(list(machine), dtype=torch.bool)
    if len(labels) != len(signals) or labels.all() or not labels.any():
        raise ValueError(f"{len(labels)} labels for {len(signals)} texts: give one each, of both classes")
    if not all(len(s.metrics) for s in signals):
        raise ValueError("a text has no scored token; leave it out")
    rng, where = np.random.default_rng(how.seed), torch.device(device)
    texts, labels = _tensors(signals, where), labels.to(where)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if where.type == "cuda" else []):
        torch.manual_seed(how.seed)
        model = PAWNHead(signals[0].hidden.shape[1], **head).train().to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        batches = math.ceil(len(signals) / how.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * batches)
        for _ in range(how.epochs):
            for rows in np.array_split(rng.permutation(len(signals)), batches):
                logits, _ = model(*_batch([texts[i] for i in rows]))
                pawn_loss(logits, labels[torch.from_numpy(rows).to(where)], how.smoothing, how.w_pos).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model.eval()


@torch.no_grad()
def judge(head: PAWNHead, signals: Sequence[Signals], batch: int = 64) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (N,), NaN for a text without a scored token, and each text's token weights (T,)."""
    logits, weights = np.full(len(signals), np.nan), [np.zeros(len(s.metrics)) for s in signals]
    scored, device = [i for i, s in enumerate(signals) if len(s.metrics)], next(head.parameters()).device
    for start in range(0, len(scored), batch):
        rows = scored[start : start + batch]
        found, a = head.eval()(*_batch(_tensors([signals[i] for i in rows], device)))
        for row, logit, w in zip(rows, found.tolist(), a.cpu(), strict=True):
            logits[row], weights[row] = logit, w[: len(weights[row])].double().numpy()
    return logits, weights


def save_head(head: PAWNHead, folder: str | Path, lm: LM) -> Path:
    """Weights as safetensors, and what they belong to."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in head.state_dict().items()}, folder / "pawn.safetensors")
    hidden = (
        (head.states if head.branch == "hidden" else head.gate).first.in_features // 2
        if head.branch != "metrics"
        else 1
    )
    shape = {"branch": head.branch, "features": head.features, "depth": len(head.out.blocks) + 1, "hidden": hidden}
    gates = head.gate.last.out_features if head.branch == "pawn" else 1
    return write_json(
        folder / "pawn.json", {**shape, "gates": gates, "metrics": METRICS, "model": lm.identity()}
    ).parent


def load_head(folder: str | Path, lm: LM) -> PAWNHead:
    """What `save_head` wrote.

    Raises:
        ValueError: it was trained on another model's signals, or on other metrics.
    """
    from safetensors.torch import load_file

    told = read_json(Path(folder) / "pawn.json")
    if told["model"] != lm.identity() or tuple(told["metrics"]) != METRICS:
        raise ValueError(
            f"the head in {folder} was trained on the signals of another model; load that one, or train anew"
        )
    shape = {name: told[name] for name in ("branch", "features", "gates", "depth")}
    head = PAWNHead(told["hidden"], **shape)
    head.load_state_dict(load_file(Path(folder) / "pawn.safetensors"))
    return head.eval()
