"""Learned deferral rules: the gain of deferring, from features of the small model's answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from .curves import area, deferral_curve, usable

FEWEST = 5
"""Examples on which the large model must be better, in each part of the training split; below, nothing is learned."""
TARGETS = ("min-max", "rank")


def targets(gain_N: Any, how: str = "min-max") -> np.ndarray:
    """Gains of the training split as targets in [0, 1]: ``min-max`` (d - min) / (max - min), or ``rank``
    (average rank - 1) / (n - 1).

    Raises:
        ValueError: another name.
    """
    if how not in TARGETS:
        raise ValueError(f"target={how!r} is not one of {', '.join(TARGETS)}")
    gain = np.asarray(gain_N, np.float64)
    if how == "min-max":
        return (gain - gain.min()) / max(float(np.ptp(gain)), 1e-300)
    _, place, count = np.unique(gain, return_inverse=True, return_counts=True)
    return ((np.cumsum(count) - (count - 1) / 2)[place] - 1) / max(len(gain) - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a post-hoc rule is learned."""

    kind: Literal["mlp", "logistic"] = "mlp"
    """g: two hidden layers of `width` with ReLU, or none."""
    target: Literal["min-max", "rank"] = "min-max"
    """How d becomes a target in [0, 1]."""
    predict: Literal["gain", "wrong"] = "gain"
    """d = q2 - q1, or -q1 alone (an ablation: is the small model wrong?)."""
    width: int = 32
    """Units of a hidden layer."""
    epochs: int = 200
    """At most."""
    patience: int = 20
    """Epochs without a larger area on the held-out fifth of the training split."""
    rate: float = 1e-3
    """Adam's."""
    decay: float = 1e-4
    """Adam's weight decay."""
    batch: int = 64
    """Examples of a step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One g each, whose outputs are averaged."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "logistic") or self.predict not in ("gain", "wrong"):
            raise ValueError(f"kind={self.kind!r}, predict={self.predict!r}: mlp or logistic, gain or wrong")
        if self.target not in TARGETS:
            raise ValueError(f"target={self.target!r} is not one of {', '.join(TARGETS)}")
        counts = min(self.width, self.epochs, self.patience, self.batch, len(self.seeds)) >= 1
        if not (counts and 0 < self.rate < math.inf and 0 <= self.decay < math.inf):
            raise ValueError(
                f"{self}: width, epochs, patience and batch >= 1, a seed or more, rate > 0 and decay >= 0 are needed"
            )

    def fit(self, phi_ND: np.ndarray, q1_N: Any, q2_N: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Train g by the cross-entropy of sigmoid(g(phi)) and the target.

        Args:
            phi_ND: features of the training split; rows with NaN (empty answers) and NaN qualities are left out.

        Returns:
            The arrays of `predict_with`, and what is known of the training; None, with a warning, where the large model
            is (almost) never better: there is nothing to learn.
        """
        keep = usable(q1_N, q2_N) & np.isfinite(phi_ND).all(1)
        phi, q1, q2 = phi_ND[keep].astype(np.float64), np.asarray(q1_N, float)[keep], np.asarray(q2_N, float)[keep]
        gain = q2 - q1 if self.predict == "gain" else -q1
        held = max(1, len(phi) // 5)
        splits = [np.random.default_rng((seed, 5)).permutation(len(phi)) for seed in self.seeds]
        fewest = min(int((q2 > q1)[part].sum()) for s in splits for part in (s[:held], s[held:]))
        if fewest < FEWEST or not np.ptp(gain):
            warnings.warn(
                f"the large model is better on {int((q2 > q1).sum())} of {len(phi)} examples, too few to learn when; "
                "a fixed quantile rule is used",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        mean, spread = phi.mean(0), phi.std(0)
        varies = spread > 1e-12 * np.maximum(1.0, np.abs(mean))
        scale = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0)
        layers, epochs, areas = self._train((phi - mean) * scale, targets(gain, self.target), q1, q2, splits, held)
        arrays = {"mean": mean, "scale": scale, **{f"layer{k}": w for k, w in enumerate(layers)}}
        told = {"examples": len(phi), "left_out": int((~keep).sum()), "best_epochs": epochs, "held_out_areas": areas}
        return arrays, asdict(self) | told

    def _train(
        self, x_ND: np.ndarray, t_N: np.ndarray, q1: np.ndarray, q2: np.ndarray, splits: list[np.ndarray], held: int
    ) -> tuple[list[np.ndarray], list[int], list[float]]:
        """Weights of all members, (E, in + 1, out) a layer: each from its own seed, stopped by its own fifth."""
        widths = [x_ND.shape[1], *((self.width, self.width) if self.kind == "mlp" else ()), 1]
        chance = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        layers = [
            torch.stack([(torch.rand(a + 1, b, generator=g, dtype=torch.float64) * 2 - 1) / a**0.5 for g in chance])
            for a, b in pairwise(widths)
        ]
        for layer in layers:
            layer.requires_grad_(True)
        adam = torch.optim.Adam(layers, lr=self.rate, weight_decay=self.decay)
        x, t = torch.from_numpy(x_ND), torch.from_numpy(t_N)
        validation, training = (
            np.stack([s[:held] for s in splits]),
            torch.from_numpy(np.stack([s[held:] for s in splits])),
        )
        best, best_at = np.full(len(splits), -math.inf), np.zeros(len(splits), int)
        kept = [layer.detach().clone() for layer in layers]
        for epoch in range(1, self.epochs + 1):
            order = torch.stack([rows[torch.randperm(len(rows), generator=g)] for rows, g in zip(training, chance)])
            for some in order.split(self.batch, 1):
                loss = torch.nn.functional.binary_cross_entropy_with_logits(_net(layers, x[some]), t[some])
                adam.zero_grad()
                (loss * len(splits)).backward()  # a sum over members: each learns as if it were alone
                adam.step()
            with torch.no_grad():
                said = _net(layers, x[torch.from_numpy(validation)]).numpy()
            for m, rows in enumerate(validation):
                found = area(deferral_curve(said[m], q1[rows], q2[rows]))
                if epoch - best_at[m] <= self.patience and found > best[m]:  # else it has stopped, or is no better
                    best[m], best_at[m] = found, epoch
                    for mine, layer in zip(kept, layers, strict=True):
                        mine[m] = layer.detach()[m]
            if (epoch - best_at >= self.patience).all():
                break
        return [layer.numpy() for layer in kept], best_at.tolist(), best.tolist()


def _net(layers: Sequence[torch.Tensor], x_END: torch.Tensor) -> torch.Tensor:
    """Logits (E, N)."""
    for k, layer in enumerate(layers):
        x_END = torch.baddbmm(layer[:, -1:], torch.relu(x_END) if k else x_END, layer[:, :-1])
    return x_END[..., 0]


def predict_with(arrays: Mapping[str, np.ndarray], phi_ND: np.ndarray) -> np.ndarray:
    """s (N,) = mean over members of sigmoid(g(phi)); +inf (defer) where a feature is NaN: an empty answer."""
    layers = [torch.from_numpy(arrays[f"layer{k}"]) for k in range(len(arrays) - 2)]
    x = (np.nan_to_num(phi_ND.astype(np.float64)) - arrays["mean"]) * arrays["scale"]
    said = _net(layers, torch.from_numpy(x).expand(len(layers[0]), -1, -1)).sigmoid().mean(0).numpy()
    return np.where(np.isfinite(phi_ND).all(1), said, math.inf)
