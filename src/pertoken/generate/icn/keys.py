"""The keys of the vocabulary: their clusters, and the probe for tokens that rank high only because their key resembles
that of a top token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.cache import ArrayCache, key_of, remember
from ...core.lm import LM


def keys(lm: LM) -> np.ndarray:
    """k_v: rows of the output matrix, (V, H) in float32. A bias, scale or soft cap of the logits is not in them."""
    with lm.active() as causal:
        return causal.get_output_embeddings().weight.detach().float().cpu().numpy()


def cluster_keys(lm: LM, clusters: int = 1024, seed: int = 0, *, cache: ArrayCache | None = None) -> np.ndarray:
    """Cluster (V,) of each key by (mini-batch) k-means: euclidean, rows as they are. A function of the matrix alone,
    kept on disk.

    Raises:
        ValueError: fewer keys than clusters.
        ImportError: scikit-learn is not installed.
    """
    rows = keys(lm)
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters={clusters} of {len(rows)} keys; give a number from 1 to that")

    def compute(missing: Sequence[int]) -> list[np.ndarray]:
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError as error:
            raise ImportError("clusters of keys need scikit-learn: pip install 'pertoken[classifiers]'") from error
        size = min(len(rows), max(4096, 4 * clusters))
        means = MiniBatchKMeans(clusters, random_state=seed, batch_size=size, n_init=1, max_iter=20)
        return [means.fit_predict(rows).astype(np.int32) for _ in missing]

    shelf = (cache or ArrayCache()).context({"weights": lm.identity()["weights"], "icn-clusters": 1})
    return remember(shelf, [0], lambda _: key_of((), (), clusters, seed), compute)[0]


@dataclass(frozen=True)
class Probed:
    """A first token of a prompt, and the answer that it begins.

    Attributes:
        rank: from 1. token, text: id and string. cluster: of its key; main: one of those of the first K tokens.
        answer: what stood between the quotes; right: by the judge.
    """

    rank: int
    token: int
    text: str
    cluster: int
    main: bool
    answer: str
    right: bool


def probed_rows(
    ranked: Sequence[tuple[int, str, str]], clusters_V: np.ndarray, first: int, judge: Callable[[str], bool]
) -> list[Probed]:
    """The table of one prompt.

    Args:
        ranked: id, string and answer of each probed token, from the likeliest.
        first: K: the clusters of so many tokens are the main ones.
    """
    main = {int(clusters_V[token]) for token, _, _ in ranked[:first]}
    return [
        Probed(i + 1, token, text, c := int(clusters_V[token]), c in main, answer, bool(answer and judge(answer)))
        for i, (token, text, answer) in enumerate(ranked)
    ]


def correlation_table(tables: Sequence[Sequence[Probed]], first: int) -> dict[str, Any]:
    """Precision of middle-ranked tokens (ranks K+1..N) in main clusters and in others, pooled as counts over prompts.

    Returns:
        ``in`` and ``out``: ``tokens``, ``right``, ``precision``, ``mean_rank``, ``share`` (of the middle); and
        ``difference`` = precision out - in. NaN for what has no token.
    """
    middle = [row for rows in tables for row in rows[first:]]
    out: dict[str, Any] = {}
    for name, inside in (("in", True), ("out", False)):
        rows = [row for row in middle if row.main == inside]
        n, right = len(rows), sum(row.right for row in rows)
        out[name] = {
            "tokens": n,
            "right": right,
            "precision": right / n if n else np.nan,
            "mean_rank": float(np.mean([row.rank for row in rows])) if n else np.nan,
            "share": n / len(middle) if middle else np.nan,
        }
    return out | {"difference": out["out"]["precision"] - out["in"]["precision"]}


def permutation_p(tables: Sequence[Sequence[Probed]], first: int, draws: int = 10_000, seed: int = 0) -> float:
    """One-sided p-value of the difference of precisions out - in: which middle tokens lie in main clusters is permuted
    within each prompt. (1 + draws that differ as much) / (1 + draws); NaN if one side has no token."""
    parts = [
        (np.array([r.right for r in rows[first:]], bool), np.array([r.main for r in rows[first:]], bool))
        for rows in tables
    ]
    inside, total = sum(int(m.sum()) for _, m in parts), sum(len(m) for _, m in parts)
    rights = sum(int(r.sum()) for r, _ in parts)
    if not 0 < inside < total:
        return float("nan")
    # the difference falls with the number of right tokens inside, so that number decides; its sum over prompts is
    # drawn from each prompt's hypergeometric distribution, which is what permuting its labels gives
    observed = sum(int((r & m).sum()) for r, m in parts)
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws, int)
    for r, m in parts:
        if len(m):
            drawn += rng.hypergeometric(int(r.sum()), int((~r).sum()), int(m.sum()), draws)
    assert rights >= observed
    return float((1 + (drawn <= observed).sum()) / (1 + draws))


def mean_precision(right: Sequence[bool], k: int) -> float:
    """map@k as the authors compute it: the mean over all i <= k of the precision of the first i answers (not the
    textbook's average precision); of fewer than k answers, over those there are; 0 of none."""
    seen = np.asarray(right[:k], np.float64)
    return float((seen.cumsum() / np.arange(1, len(seen) + 1)).mean()) if len(seen) else 0.0


def normalised(answer: str) -> str:
    """For comparisons: without case, and white space once."""
    return " ".join(answer.casefold().split())


def unit_rows(rows_VH: np.ndarray) -> np.ndarray:
    """Rows of length 1, for cosines."""
    return rows_VH / np.maximum(np.linalg.norm(rows_VH, axis=1, keepdims=True), 1e-12)
