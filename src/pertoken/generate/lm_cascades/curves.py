"""How deferral rules are compared: curves of quality against the share that is deferred, their areas, and thresholds.

A rule gives each of N examples a score, higher is deferred earlier. q1, q2 (N,) are the qualities of the small and the
large model's answers on one scale; d = q2 - q1 is the gain of deferring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


def deferral_curve(score_N: Any, q1_N: Any, q2_N: Any) -> np.ndarray:
    """Mean quality (N+1,) at deferral rates 0, 1/N, ..., 1: the largest scores first, equal ones as they come.

    Raises:
        ValueError: lengths that disagree, no example, a score or a quality that is NaN (`usable` says which are not).
    """
    score, q1, q2 = (np.asarray(x, np.float64) for x in (score_N, q1_N, q2_N))
    if not (score.shape == q1.shape == q2.shape and score.ndim == 1 and len(score)):
        raise ValueError(f"scores {score.shape} and qualities {q1.shape}, {q2.shape}: give one of each an example")
    if np.isnan(score).any() or not (np.isfinite(q1).all() and np.isfinite(q2).all()):
        raise ValueError("a score or a quality is NaN; leave that example out of all curves alike (usable(q1, q2))")
    order = np.argsort(-score, kind="stable")
    return (q1.sum() + np.concatenate([[0.0], np.cumsum((q2 - q1)[order])])) / len(score)


def usable(q1_N: Any, q2_N: Any) -> np.ndarray:
    """bool (N,): both qualities are known."""
    return np.isfinite(np.asarray(q1_N, np.float64)) & np.isfinite(np.asarray(q2_N, np.float64))


def area(curve: np.ndarray) -> float:
    """Trapezoid area under a deferral curve over rates 0 to 1: a quality."""
    return float((curve[1:] + curve[:-1]).sum() / 2 / (len(curve) - 1))


@dataclass(frozen=True)
class Standing:
    """How a rule does: its area, % gain over deferring at random, and its share of what an oracle gains over that
    (NaN if the oracle gains nothing)."""

    area: float
    gain: float
    oracle_share: float


def standings(scores: Mapping[str, Any], q1_N: Any, q2_N: Any) -> tuple[dict[str, Standing], int]:
    """Every rule on the same examples, with ``random`` (the straight line) and ``oracle`` (sorted by d).

    Returns:
        By name, and the number of examples that were left out because a quality is NaN.
    """
    keep = usable(q1_N, q2_N)
    q1, q2 = np.asarray(q1_N, np.float64)[keep], np.asarray(q2_N, np.float64)[keep]
    areas = {name: area(deferral_curve(np.asarray(s)[keep], q1, q2)) for name, s in scores.items()}
    chance, best = float(q1.mean() + q2.mean()) / 2, area(deferral_curve(q2 - q1, q1, q2))
    areas |= {"random": chance, "oracle": best}
    room = best - chance

    def standing(a: float) -> Standing:
        share = (a - chance) / room if room > 1e-12 else math.nan
        return Standing(a, 100 * (a / chance - 1) if chance else math.nan, share)

    return {name: standing(a) for name, a in areas.items()}, int((~keep).sum())


def threshold_for(score_N: Any, budget: float) -> float:
    """tau such that s > tau holds for a share `budget` of calibration scores: their (1 - budget)-quantile; -inf for a
    budget of 1, because the least score does not exceed itself.

    Raises:
        ValueError: a budget outside of [0, 1], no scores, or NaN among them.
    """
    score = np.asarray(score_N, np.float64)
    if not 0 <= budget <= 1 or not len(score) or np.isnan(score).any():
        raise ValueError(
            f"a budget of {budget} and {len(score)} scores: give a share from 0 to 1, and scores without NaN"
        )
    if budget == 1:
        return -math.inf
    infinite = bool(np.isinf(score).any())  # between which nothing can be interpolated
    return float(np.quantile(score, 1 - budget, method="higher" if infinite else "linear"))
