"""One Bradley-Terry fit: strengths of items from comparisons, with standard errors.

    P(i beats j) = sigmoid(theta_i - theta_j),  sum theta = 0

maximum likelihood with soft labels and weights, ridge or Firth's penalty (Firth, Biometrika 1993), by Newton's method.
Comparisons that do not determine the strengths are refused, and the items that they leave open are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths of items, natural-log odds with sum 0: P(i beats j) = sigmoid(scores_i - scores_j).

    Attributes:
        scores_N: the strengths. covariance_NN: their covariance (inverse information on the plane of sum 0).
        names: of the items.
    """

    scores_N: np.ndarray
    covariance_NN: np.ndarray
    names: tuple[Any, ...]

    @property
    def errors_N(self) -> np.ndarray:
        """Standard errors of the strengths (as deviations from the mean item)."""
        return np.sqrt(np.diag(self.covariance_NN))

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """scores_i - scores_j and its standard error."""
        c = self.covariance_NN
        return float(self.scores_N[i] - self.scores_N[j]), math.sqrt(max(0.0, c[i, i] + c[j, j] - 2 * c[i, j]))


def fit_bradley_terry(
    pairs_B2: np.ndarray | Sequence[tuple[int, int]],
    *,
    labels_B: np.ndarray | Sequence[float] | None = None,
    weights_B: np.ndarray | Sequence[float] | None = None,
    names: Sequence[Any] | None = None,
    ridge: float = 0.0,
    firth: bool = False,
) -> BradleyTerry:
    """Fit strengths by penalised maximum likelihood (Newton's method, steps halved where they overshoot).

    Args:
        pairs_B2: (first, second) indices of items.
        labels_B: probability in [0, 1] that the first beats the second (a tie: 0.5); default 1.
        weights_B: how often each comparison was made; default 1.
        names: of the N items; default: their numbers, up to the largest that occurs.
        ridge: subtracts ridge / 2 sum scores^2 from the log-likelihood.
        firth: adds half the log-determinant of the information (Jeffreys' prior; Firth 1993): finite without ridge.

    Raises:
        ValueError: items that no chain of comparisons joins to the rest, or that always (never) won against it where
            neither ridge nor firth keeps their strength finite; names them. Labels outside of [0, 1].
    """
    pairs = np.asarray(pairs_B2, np.int64).reshape(-1, 2)
    if not len(pairs) or (pairs[:, 0] == pairs[:, 1]).any() or pairs.min() < 0:
        raise ValueError("give at least one comparison, each of two different items, numbered from 0")
    n = len(names) if names is not None else int(pairs.max()) + 1
    names = tuple(names if names is not None else range(n))
    y = np.ones(len(pairs)) if labels_B is None else np.asarray(labels_B, np.float64)
    w = np.ones(len(pairs)) if weights_B is None else np.asarray(weights_B, np.float64)
    if pairs.max() >= n or y.shape != (len(pairs),) or w.shape != y.shape:
        raise ValueError(f"{len(pairs)} comparisons of items up to {pairs.max()}: give as many labels, weights, names")
    if not (((y >= 0) & (y <= 1)).all() and (w > 0).all() and np.isfinite(w).all() and 0 <= ridge < np.inf):
        raise ValueError("labels are probabilities in [0, 1], weights above 0, and ridge is finite and not negative")
    _check_connected(pairs, y, names, finite=bool(ridge or firth))
    first, second = pairs.T
    plane = np.full((n, n), 1.0 / n)

    def laplacian(v: np.ndarray) -> np.ndarray:
        out = np.zeros((n, n))
        for a, b, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
            np.add.at(out, (a, b), sign * v)
        return out

    def state(scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Objective, score, information and curvature (+ ridge) at some strengths."""
        x = scores[first] - scores[second]
        p = 0.5 * (1 + np.tanh(0.5 * x))
        v = w * p * (1 - p)
        info = curve = laplacian(v)
        pull = w * (y - p)
        value = float((w * (y * -np.logaddexp(0, -x) + (1 - y) * -np.logaddexp(0, x))).sum())
        if firth:
            cov = np.linalg.inv(info + plane)  # of a difference, what the plane adds cancels
            hat = v * (cov[first, first] + cov[second, second] - 2 * cov[first, second])
            pull = pull + hat * (0.5 - p)
            curve = laplacian((w + hat) * p * (1 - p))  # by the information alone, sparse data would oscillate
            value += 0.5 * float(np.linalg.slogdet(info + plane)[1])
        grad = np.bincount(first, pull, n) - np.bincount(second, pull, n) - ridge * scores
        own = ridge * np.eye(n)
        return value - 0.5 * ridge * float(scores @ scores), grad, info + own, curve + own

    scores = np.zeros(n)
    value, grad, info, curve = state(scores)
    for _ in range(500):
        step = np.linalg.solve(curve + plane, grad)
        step -= step.mean()
        for halving in range(60):
            new = state(scores + step * 0.5**halving)
            if new[0] >= value - 1e-12 * abs(value):
                break
        scores, (value, grad, info, curve) = scores + step * 0.5**halving, new
        if np.abs(step).max() < 1e-9:
            break
    else:
        raise ValueError("the Bradley-Terry fit did not settle in 500 steps; add a ridge of 0.01 or more")
    return BradleyTerry(scores, np.linalg.inv(info + plane) - plane / (1 + ridge), names)


def _check_connected(pairs: np.ndarray, y: np.ndarray, names: tuple[Any, ...], finite: bool) -> None:
    wins = np.concatenate([pairs[y > 0], pairs[y < 1][:, ::-1]])
    apart = _outside_largest(np.concatenate([wins, wins[:, ::-1]]), len(names))
    if apart:
        raise ValueError(f"no chain of comparisons joins {_named(apart, names)} to the other items; compare them, too")
    apart = [] if finite else _outside_largest(wins, len(names))
    if apart:
        raise ValueError(
            f"{_named(apart, names)} won (or lost) everything against the rest, so that no finite strength fits; "
            "set ridge or firth, or compare more"
        )


def _outside_largest(edges: np.ndarray, n: int) -> list[int]:
    """Items outside of the largest strongly connected part, in order (Kosaraju's two passes)."""
    onward: list[list[int]] = [[] for _ in range(n)]
    back: list[list[int]] = [[] for _ in range(n)]
    for i, j in edges.tolist():
        onward[i].append(j)
        back[j].append(i)

    def visit(start: int, graph: list[list[int]], seen: set[int]) -> list[int]:
        """What can be reached from `start` and was not seen, in the order in which it is left."""
        seen.add(start)
        left, stack = [], [(start, iter(graph[start]))]
        while stack:
            node, following = stack[-1]
            for other in following:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(graph[other])))
                    break
            else:
                left.append(node)
                stack.pop()
        return left

    seen: set[int] = set()
    order = [node for start in range(n) if start not in seen for node in visit(start, onward, seen)]
    seen = set()
    parts = [visit(start, back, seen) for start in reversed(order) if start not in seen]
    largest = set(max(parts, key=len))
    return [i for i in range(n) if i not in largest]


def _named(items: list[int], names: tuple[Any, ...]) -> str:
    return ", ".join(str(names[i]) for i in items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
