"""Nearest neighbours of hidden states among output embeddings: the largest logits without computing all.

Neighbours of (h, 1) are sought among (O[t], bias[t]). ``dot`` adds the one dimension that makes all these vectors as
long as the longest, so that near means a large logit; ``cosine`` cuts them to length 1, which misses long ones. Logits
of what is found are exact.

States of a model lie in few directions, and lists made without them part rows in directions that no state asks for.
With a sample of states, S their second moment, neighbours of S^-1/2 (h, 1) are sought among S^1/2 (O[t] - mean): the
same order of logits, and far more is found in as many lists.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor


class Index:
    """Finds the rows of a vocabulary with the largest logits.

    Args:
        outputs: output rows (n, H). bias: (n,).
        kind: ``exhaustive`` (exact), ``ivf`` (inverted lists) or ``hnsw`` (a graph), by FAISS.
        metric: ``dot`` or ``cosine``. states: a sample (n, H) of what is going to be asked (for dot).
        lists, probes: of ivf. links, effort: of hnsw (M, ef). seed: of the lists.

    Raises:
        ValueError: an unknown kind or metric.
        ImportError: FAISS is missing.
    """

    def __init__(
        self,
        outputs: Tensor,
        bias: Tensor,
        kind: Literal["exhaustive", "ivf", "hnsw"] = "exhaustive",
        *,
        metric: Literal["dot", "cosine"] = "dot",
        states: Tensor | None = None,
        lists: int = 1000,
        probes: int = 20,
        links: int = 16,
        effort: int = 200,
        seed: int = 0,
    ):
        if kind not in ("exhaustive", "ivf", "hnsw") or metric not in ("dot", "cosine"):
            raise ValueError(f"kind={kind!r}, metric={metric!r}: give exhaustive, ivf or hnsw; dot or cosine")
        self.kind = kind
        self.vectors = torch.cat([outputs, bias[:, None]], 1).float().cpu().numpy()
        if kind == "exhaustive":
            return
        rows, self._turn = self.vectors, None
        if states is not None and metric == "dot":
            half, self._turn = _roots(_with_one(states))
            rows = (rows - rows.mean(0)) @ half
        size = np.linalg.norm(rows, axis=1, keepdims=True)
        longest = np.maximum(size.max(), 1e-30)
        unit = rows / (np.maximum(size, 1e-30) if metric == "cosine" else longest)
        extra = np.sqrt(np.maximum(0, 1 - np.square(size / longest))) * (metric == "dot")
        unit = np.ascontiguousarray(np.concatenate([unit, extra], 1), np.float32)
        try:
            import faiss
        except ImportError as error:
            raise ImportError("an index that is not exhaustive needs an extra: pip install pertoken[index]") from error
        width = unit.shape[1]
        if kind == "ivf":
            self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
            self._index.cp.seed, self._index.cp.max_points_per_centroid = seed + 1, 64
            self._index.train(unit)
            self._index.nprobe = probes
        else:
            self._index = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = self._index.hnsw.efSearch = effort
        self._index.add(unit)

    def probes(self, n: int) -> None:
        """Look into n lists (ivf)."""
        self._index.nprobe = n

    def search(self, hidden: Tensor, n: int = 20, candidates: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The n places of the largest logits (Q, n) of states (Q, H), and those logits, exact, the largest first.

        Args:
            candidates: of the index, from which n are taken by exact logits; at least n. A place that an index does not
                find is -1, its logit -inf.
        """
        query = _with_one(hidden)
        n = min(n, len(self.vectors))
        if self.kind == "exhaustive":
            logits = query @ self.vectors.T
            found = np.argpartition(-logits, n - 1, 1)[:, :n]
            exact = np.take_along_axis(logits, found, 1)
        else:
            wanted = min(max(n, candidates), len(self.vectors))
            unit = query if self._turn is None else query @ self._turn
            unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
            unit = np.ascontiguousarray(np.concatenate([unit, np.zeros((len(unit), 1), np.float32)], 1))
            found = self._index.search(unit, wanted)[1]
            exact = np.einsum("qnd,qd->qn", self.vectors[found], query)
            exact = np.where(found >= 0, exact, -np.inf)
        order = np.argsort(-exact, 1, kind="stable")[:, :n]
        return np.take_along_axis(found, order, 1), np.take_along_axis(exact, order, 1)


def _with_one(hidden: Tensor) -> np.ndarray:
    """(h, 1) of each state."""
    states = hidden.float().cpu().numpy()
    return np.concatenate([states, np.ones((len(states), 1), np.float32)], 1)


def _roots(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root of the states' second moment and its inverse; a thousandth of the mean is added to every direction, as the
    sample may have none of some."""
    moment = states.T.astype(np.float64) @ states / len(states)
    values, vectors = np.linalg.eigh(moment + 1e-3 * moment.trace() / len(moment) * np.eye(len(moment)))
    half, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    return half.astype(np.float32), inverse.astype(np.float32)
