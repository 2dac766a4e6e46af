"""Dynamic reward scaling (DR-IRL): how much an example counts, from its hardness and from the model's response to it.

delta_i = 1 - W_i,   W_i = (1/K) sum_k max_l cos( Phi(S^k), Phi(St^l) )        S: generated, St: demonstration
alphaD_i = sigmoid(delta_i) / sigmoid(mean_i delta_i)
G_i = R(demonstration) - R(generated),   M_i = 1[ (G_i - mean G)^2 <= tau ],   Gp = sum M G / sum M
alphaM = sigmoid(Gp) / sigmoid(mean G)                 alpha_i = alphaD_i alphaM, means within a category
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.embed import Encode

_ENDS = re.compile(r"[.!?;:\n\r\x0b\x0c\x85\u2028\u2029。．｡！？；：…]+")


def clauses(text: str) -> list[str]:
    """Pieces between . ! ? ; : line breaks and their CJK forms, stripped, without empty ones; no end: the whole."""
    return [piece for piece in (part.strip() for part in _ENDS.split(text)) if piece]


def matching(table_KL: np.ndarray) -> float:
    """W of a table of cosines: for each generated clause (row) the best demonstration clause, averaged; 0 if empty."""
    return float(table_KL.max(1).mean()) if table_KL.size else 0.0


def similarity(
    generated: Sequence[str], demonstrations: Sequence[str], encode: Encode, symmetric: bool = False
) -> tuple[np.ndarray, int]:
    """W of each generated text against its demonstration, and how many had no clause on a side (W = 0).

    Args:
        encode: texts -> (N, H); a clause without direction (a zero vector) has cosine 0.
        symmetric: the mean of W both ways: a copy of one clause of several is then no perfect match.
    """
    parts = [(clauses(a), clauses(b)) for a, b in zip(generated, demonstrations, strict=True)]
    texts = list(dict.fromkeys(clause for pair in parts for side in pair for clause in side))
    place = {text: i for i, text in enumerate(texts)}
    vectors_NH = np.asarray(encode(texts), np.float64) if texts else np.zeros((0, 1))
    size = np.linalg.norm(vectors_NH, axis=-1, keepdims=True)
    unit_NH = vectors_NH / np.where(size > 0, size, 1.0)
    found = []
    for said, wanted in parts:
        a, b = (unit_NH[[place[c] for c in side]] for side in (said, wanted))
        table_KL = np.clip(a @ b.T, -1.0, 1.0)
        found.append((matching(table_KL) + matching(table_KL.T)) / 2 if symmetric else matching(table_KL))
    return np.array(found), sum(not (a and b) for a, b in parts)


def data_hardness(delta_N: np.ndarray) -> np.ndarray:
    """alphaD of a category's prompts: sigmoid(delta) / sigmoid(mean delta)."""
    delta_N = np.asarray(delta_N, np.float64)
    return _sigmoid(delta_N) / _sigmoid(delta_N.mean())


def responsiveness(gap_N: np.ndarray, tau: float | None = None) -> tuple[float, int]:
    """alphaM of a category, and how many gaps its mask removed.

    Args:
        gap_N: R(demonstration) - R(generated).
        tau: largest squared distance from the mean that is kept; None: (2 standard deviations, ddof 0)^2. A tau that
            removes every gap leaves the unfiltered mean: alphaM = 1, and all of them are counted as removed.

    Raises:
        ValueError: a gap that is not finite.
    """
    gap_N = np.asarray(gap_N, np.float64)
    if not np.isfinite(gap_N).all():
        raise ValueError(f"gap {int(np.flatnonzero(~np.isfinite(gap_N))[0])} is not finite; look at the reward model")
    mean = gap_N.mean()
    kept_N = (gap_N - mean) ** 2 <= ((2 * gap_N.std()) ** 2 if tau is None else tau)
    removed = int((~kept_N).sum())
    filtered = gap_N[kept_N].mean() if removed and kept_N.any() else mean
    return float(_sigmoid(filtered) / _sigmoid(mean)), removed


def scaled(values: Tensor, alpha_N: Tensor) -> Tensor:
    """What an example counts by alpha: advantages (N, T) of GRPO-S and PPO-S, after every normalisation; losses (N,)
    of DPO-S (a batch's mean still divides by the number of examples)."""
    alpha_N = alpha_N.detach().to(values)
    return torch.mul(values, alpha_N if values.ndim == 1 else alpha_N[:, None])


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))
