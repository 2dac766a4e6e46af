"""Adaptive rejection sampling of one token, with an unbiased weight: the arithmetic of AWRS, without a model.

Next-token weights p (sum 1), a Boolean check f. Each estimator draws a token x and a weight w such that

    E[w 1(x = v)] = p(v) f(v)   for every v,   so   E[w] = Z = sum_v p(v) f(v).

Tokens are visited in Gumbel order (decreasing log p_v + Gumbel noise), which is sampling without replacement. `Pool`
draws that order one token at a time from the cumulated weights and needs no noise for tokens that are never visited.
R is the mass rejected so far; w is returned as its log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

Check = Callable[[int], bool]
GEOMETRIC_FROM = 2 / 3  # above, the geometric estimator makes fewer calls: 1 + 2 (1 - p) / p < 2
DEAD = -math.inf


class Draw(NamedTuple):
    """A token and the log of its weight; a token of -1, with -inf, is none: the particle dies."""

    token: int
    logw: float


NONE = Draw(-1, DEAD)


class Source(Protocol):
    """Where estimators draw from: tokens not rejected yet."""

    rest: float
    """1 - R, their mass."""

    def draw(self) -> int:
        """One of them, in proportion to its weight; -1 if no mass is left. It stays in the pool."""
        ...

    def weight(self, token: int) -> float:
        """p of a token that was not rejected."""
        ...

    def reject(self, token: int) -> None:
        """Take it out."""
        ...

    def phantoms(self) -> float:
        """Draws with replacement that hit a rejected token before one hits another: Geometric(1 - R) - 1."""
        ...


class Pool:
    """Weights (V,), which it owns and changes, and a generator.

    Sums are made anew whenever half of the mass is gone, so that 1 - R is exact to rounding however small it gets.
    """

    def __init__(self, weights: np.ndarray, rng: np.random.Generator):
        self.p, self.rng = weights, rng
        self.total = self._sum()
        self.rest = 1.0 if self.total > 0 else 0.0

    def _sum(self) -> float:
        self.cumulated = torch.from_numpy(self.p).cumsum(0).numpy()  # a third of numpy's time
        self.base = self.left = float(self.cumulated[-1]) if len(self.p) else 0.0
        return self.base

    def draw(self) -> int:
        if self.rest <= 0:
            return -1
        while True:
            token = int(self.cumulated.searchsorted(self.rng.random() * self.base, "right"))
            if token < len(self.p) and self.p[token] > 0:  # else one rejected since the sums were made
                return token

    def weight(self, token: int) -> float:
        return float(self.p[token]) / self.total

    def reject(self, token: int) -> None:
        self.left -= float(self.p[token])
        self.p[token] = 0.0
        if self.left < 0.5 * self.base:
            self._sum()
        self.rest = self.left / self.total

    def phantoms(self) -> float:
        if not 0 < self.rest < 1:
            return 0.0
        found = math.log(1.0 - self.rng.random()) / math.log1p(-self.rest)
        return float(math.floor(min(found, 1e300)))  # at 1 - R below 1e-307 the quotient is no number of doubles


def two_rounds(pool: Source, check: Check) -> Draw:
    """The paper's estimator: w = (1 - R1) / (n + 1), R1 the mass that the first round rejected, n the tokens that both
    rounds did."""
    token, n = _first(pool, check, math.inf)
    if token < 0:
        return NONE
    kept = pool.rest
    _, more = _first(pool, check, math.inf)
    return Draw(token, math.log(kept) - math.log1p(n + more))


def recursive(pool: Source, check: Check, max_rejects: float = math.inf) -> Draw:
    """One round, by E[f] = p(x) f(x) + (1 - p(x)) E[f | not x]: w = prod (1 - q_i) over the rejected, which is 1 - R,
    times q of the accepted token if the next in the order is not accepted."""
    token, n = _first(pool, check, max_rejects)
    if token < 0:
        return NONE
    kept, own = pool.rest, pool.weight(token)
    if n == max_rejects - 1:  # one try was left
        return Draw(token, math.log(kept))
    pool.reject(token)
    following = pool.draw()
    return Draw(token, math.log(kept if following < 0 or check(following) else own))


def geometric(pool: Source, check: Check, max_rejects: float = math.inf, max_accepts: int = 2) -> Draw:
    """Sampling with replacement, simulated: w = min(m - 1, a) / (a + r - 1) with a accepts and r rejects, phantoms
    included (Rao-Blackwell on the negative binomial)."""
    first, a, r = -1, 0, 0.0
    while a < max_accepts and r < max_rejects:
        if pool.rest < 1:
            r += pool.phantoms()
            if r >= max_rejects:
                break
        token = pool.draw()
        if token < 0:
            break
        if check(token):
            a, first = a + 1, token if a == 0 else first
        else:
            pool.reject(token)
            r += 1
    if a == 0:
        return NONE
    return Draw(first, math.log(min(max_accepts - 1, a)) - math.log(a + min(r, max_rejects) - 1))


def first_accepted(pool: Source, check: Check, max_rejects: float = math.inf) -> Draw:
    """Locally constrained decoding: weight 1, which is not proper."""
    token, _ = _first(pool, check, max_rejects)
    return NONE if token < 0 else Draw(token, 0.0)


def _first(pool: Source, check: Check, max_rejects: float) -> tuple[int, int]:
    """The first accepted token (-1: none), and how many were rejected before it."""
    n = 0
    while n < max_rejects:
        token = pool.draw()
        if token < 0:
            break
        if check(token):
            return token, n
        pool.reject(token)
        n += 1
    return -1, n


def estimate(
    weights: np.ndarray,
    check: Check,
    rng: np.random.Generator,
    *,
    estimator: str = "auto",
    max_accepts: int = 2,
    max_rejects: float = math.inf,
    proper_weights: bool = True,
) -> Draw:
    """A token and its weight from weights (V,), float64, normalised or not (w is relative to their sum); `weights` is
    changed.

    Args:
        check: asked at most once a token.
        estimator: ``two-round``, ``recursive``, ``geometric``; ``auto``: geometric with more than two accepts or a
            token of at least 2/3, else recursive.
    """
    known: dict[int, bool] = {}

    def cached(token: int) -> bool:
        if token not in known:
            known[token] = check(token)
        return known[token]

    peak = float(weights.max(initial=0.0))
    pool = Pool(weights, rng)
    if not proper_weights:
        return first_accepted(pool, cached, max_rejects)
    if estimator == "two-round":
        return two_rounds(pool, cached)
    if estimator == "geometric" or (estimator == "auto" and (max_accepts > 2 or peak >= GEOMETRIC_FROM * pool.total)):
        return geometric(pool, cached, max_rejects, max_accepts)
    return recursive(pool, cached, max_rejects)
