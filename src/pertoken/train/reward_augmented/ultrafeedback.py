"""Scored pairs of rows like UltraFeedback's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ...core.examples import DataReport, Example

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def scored_pairs(
    rows: Sequence[Mapping[str, Any]], *, seed: int = 0, leave_out: Collection[str] = (), worse_aspects: bool = False
) -> tuple[list[Example], DataReport]:
    """Pairs of rows like UltraFeedback's (step 1): the best completion against a uniformly random other one.

    Args:
        rows: ``instruction``, ``source`` and ``completions``, each with ``response``, ``overall_score`` and
            ``annotations`` (aspect -> ``Rating``).
        seed: of the draws.
        leave_out: prompts of a benchmark (TruthfulQA's questions); rows whose source is truthful_qa are left out
            anyway.
        worse_aspects: keep pairs whose chosen response has the lower mean of the four aspects.

    Returns:
        Pairs with overall `scores` and the four `aspects`, and the report of all rows.

    Raises:
        ValueError: no row left.
    """
    rng, out, report = np.random.default_rng(seed), [], DataReport()
    for i, row in enumerate(rows):
        if row.get("source") == "truthful_qa" or row["instruction"] in leave_out:
            report.skipped.setdefault("of the benchmark that is left out", []).append(i)
            continue
        rated = [(c, found) for c in row["completions"] if (found := _ratings(c)) is not None]
        best = max(range(len(rated)), key=lambda k: rated[k][1][0], default=0)
        others = [k for k in range(len(rated)) if rated[k][0]["response"] != rated[best][0]["response"]]
        if not others:
            report.refuse("fewer than two different completions with all ratings", i)
            continue
        (w, chosen), (lo, rejected) = rated[best], rated[others[int(rng.integers(len(others)))]]
        if not worse_aspects and np.mean(chosen[1:]) < np.mean(rejected[1:]):
            report.skipped.setdefault("the chosen response has the lower mean of aspects", []).append(i)
            continue
        aspects = {name: (chosen[k], rejected[k]) for k, name in enumerate(ASPECTS, 1)}
        pair = {"responses": (w["response"], lo["response"]), "scores": (chosen[0], rejected[0]), "aspects": aspects}
        out.append(Example(prompt=row["instruction"], source=str(row.get("source", "")), row=i, **pair))
    report.kept = len(out)
    report.some_kept("the rows")
    return out, report


def _ratings(completion: Mapping[str, Any]) -> tuple[float, ...] | None:
    """(overall score, the four ratings), or None where one is missing ("N/A")."""
    said = completion.get("annotations") or {}
    try:
        found = [float(completion["overall_score"]), *(float(said[name]["Rating"]) for name in ASPECTS)]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(found) if all(map(math.isfinite, found)) else None
