"""What correctness has to do with a word's cut: correlations, bins, shared errors, biases, and a logistic slope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Graded:
    """A question and what was made of it; `prediction` is None where no number was read."""

    question_idx: int
    task: str
    word: str
    character: str | None
    gold: int
    prediction: int | None

    @property
    def correct(self) -> bool:
        """Whether it is the number."""
        return self.prediction == self.gold


def pearson(x: Sequence[float | None], y: Sequence[bool]) -> float:
    """r over the pairs with an x; NaN if either is constant."""
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if a is not None]
    if not pairs:
        return math.nan
    a, b = np.array(pairs).T
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def binned(x: Sequence[float | None], y: Sequence[bool]) -> dict[float, tuple[float, float, int]]:
    """Of each value: accuracy, its standard error sqrt(p (1 - p) / n), n. Values without an error are kept."""
    out = {}
    for value in sorted({float(v) for v in x if v is not None}):
        right = [b for a, b in zip(x, y, strict=True) if a is not None and float(a) == value]
        p = float(np.mean(right))
        out[value] = (p, math.sqrt(p * (1 - p) / len(right)), len(right))
    return out


def overlap(a: Sequence[Graded], b: Sequence[Graded]) -> float:
    """Jaccard index of the questions that two models get wrong; 0 if neither gets any wrong."""
    wrong = [{g.question_idx for g in some if not g.correct} for some in (a, b)]
    union = wrong[0] | wrong[1]
    return len(wrong[0] & wrong[1]) / len(union) if union else 0.0


def mixed_case(g: Graded) -> bool:
    """Whether both cases matter: of the asked letter (index tasks), of any letters (counting tasks)."""
    if g.task.startswith("find"):
        assert g.character is not None
        return g.character.lower() in g.word and g.character.upper() in g.word
    return any(c.islower() for c in g.word) and any(c.isupper() for c in g.word)


def counting_bias(graded: Sequence[Graded]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of prediction - gold over wrong but read answers with gold above 0."""
    off = [g.prediction - g.gold for g in graded if g.prediction is not None and not g.correct and g.gold]
    return (float(np.mean(off)) if off else math.nan), (float(np.std(off, ddof=1)) if len(off) > 1 else math.nan)


def analyse(graded: Sequence[Graded], cuts: Sequence[Any]) -> dict[str, Any]:
    """Of each task: ``pearson`` and ``bins`` of each feature, ``mixed_case`` (accuracy where cases are mixed, and
    elsewhere; NaN for none), ``bias``.

    Raises:
        ValueError: not one cut a grade.
    """
    if len(graded) != len(cuts):
        raise ValueError(f"{len(cuts)} cuts for {len(graded)} grades; give one each")
    out: dict[str, Any] = {}
    for task in dict.fromkeys(g.task for g in graded):
        rows = [(g, asdict(cut)) for g, cut in zip(graded, cuts, strict=True) if g.task == task]
        right = [g.correct for g, _ in rows]
        columns: Mapping[str, list[Any]] = {name: [row[name] for _, row in rows] for name in rows[0][1]}
        mixed = [[g.correct for g, _ in rows if mixed_case(g) == flag] for flag in (True, False)]
        out[task] = {
            "pearson": {name: pearson(x, right) for name, x in columns.items()},
            "bins": {name: binned(x, right) for name, x in columns.items()},
            "mixed_case": tuple(float(np.mean(m)) if m else math.nan for m in mixed),
            "bias": counting_bias([g for g, _ in rows]),
        }
    return out


def over_models(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each task and feature, the mean of ``pearson`` over the models' analyses (`analyse`), without those that are
    NaN; NaN if all are."""
    out: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(task for one in found for task in one):
        given = [one[task]["pearson"] for one in found if task in one]
        known = {name: [r[name] for r in given if not math.isnan(r[name])] for name in given[0]}
        out[task] = {name: float(np.mean(some)) if some else math.nan for name, some in known.items()}
    return out


def logistic_slope(
    x: Sequence[float], y: Sequence[bool], controls: Sequence[Sequence[float]] = (), steps: int = 100
) -> tuple[float, float, float]:
    """Slope of log-odds on x beside other columns, and its 95 % interval (Wald, Newton's method).

    Raises:
        ValueError: a column that is constant or not finite, or classes that the columns separate (the slope has no
            maximum).
    """
    columns = np.column_stack([x, *controls]).astype(np.float64)
    mean, scale = columns.mean(0), columns.std(0)
    if not np.isfinite(columns).all():
        raise ValueError("a column holds a value that is not finite; leave those questions out")
    # in standard deviations from the mean, so that no unit makes the equations ill-conditioned
    table = np.column_stack([np.ones(len(columns)), (columns - mean) / np.where(scale > 0, scale, 1.0)])
    target, b = np.asarray(y, np.float64), np.zeros(table.shape[1])
    if np.linalg.matrix_rank(table) < table.shape[1]:
        raise ValueError("a column is constant or follows from the others; leave it out")
    for _ in range(steps):
        p = 1 / (1 + np.exp(-table @ b))
        hessian = (table * (p * (1 - p))[:, None]).T @ table
        if np.linalg.cond(hessian) > 1e12 or np.abs(b).max() > 50:
            raise ValueError("the columns separate right from wrong, so the slope has no maximum; take more questions")
        step = np.linalg.solve(hessian, table.T @ (target - p))
        b = b + step
        if np.abs(step).max() < 1e-10:
            break
    else:
        raise ValueError(f"no maximum within {steps} steps; take more questions, or more steps")
    slope, error = b[1] / scale[0], math.sqrt(np.linalg.inv(hessian)[1, 1]) / scale[0]
    return float(slope), float(slope - 1.959964 * error), float(slope + 1.959964 * error)
