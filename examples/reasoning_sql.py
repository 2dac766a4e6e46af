"""Partial rewards of SQL on corrupted gold queries: is the gold query first, and do they vary where execution does not?

The specification measures on GeoQuery, which the folder of PERTOKEN_DATA does not hold; here on the 185 queries that
run on its three real databases (without them: on the generated shop), and on the shop. Each gold query has up to four
corruptions: its WHERE dropped, a wrong column, a wrong table, broken syntax. Bounds: the summed reward ranks gold above
a corruption in at least 98 % of cases (a corruption that keeps the same rows may tie in execution), and in at least 95
% of the groups made only of corruptions the reward varies, where execution alone is constant in at least 80 %.

    python examples/reasoning_sql.py            about a minute
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import tyro

from pertoken.core.lm import load
from pertoken.results import save_result
from pertoken.score.reasoning_sql import ReasoningSQL, SQLWeights
from pertoken.worlds.sql import Pair, corrupted, pairs, real_pairs

ONLY_EXECUTION = SQLWeights(judge=0.0, schema=0.0, ngram=0.0, syntax=0.0, format=0.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    shop: int = 150
    """Pairs of the generated shop (every second or third of them)."""
    model: str = "smollm2"
    """Whose tokens carry the credit."""
    save: bool = False
    """Write results/reasoning-sql.json."""


def measure(some: list[Pair], lm: object) -> dict[str, float]:
    """Shares, in per cent, over queries whose gold one returns rows."""
    ranked, varies, constant = [], [], []
    for pair in some:
        answers = [pair.sql, *corrupted(pair).values()]
        traces = [
            lm.trace("?", f"<answer>\n```sql\n{a}\n```\n</answer>\n", sql=pair.sql, database=pair.database)  # type: ignore[attr-defined]
            for a in answers
        ]
        credits = ReasoningSQL().score(traces)
        if credits[0].meta["gold"] != "ok":
            continue
        totals = np.array([c.reduce() for c in credits])
        alone = np.array([c.reduce() for c in ReasoningSQL(weights=ONLY_EXECUTION).score(traces)])
        ranked += (totals[0] > totals[1:]).tolist()
        varies.append(bool(np.ptp(totals[1:]) > 1e-9))
        constant.append(bool(np.ptp(alone[1:]) < 1e-9))
    return {
        "gold above": float(np.mean(ranked)),
        "varies": float(np.mean(varies)),
        "constant": float(np.mean(constant)),
    } | {
        "queries": float(len(varies)),
        "cases": float(len(ranked)),
    }


def main(options: Options) -> None:
    """Run it and print the table."""
    lm, shop = load(options.model), pairs()
    worlds = {"shop": shop[:: max(1, len(shop) // options.shop)]}
    if os.environ.get("PERTOKEN_DATA"):
        worlds = {"real databases": real_pairs()} | worlds
    else:
        print("PERTOKEN_DATA is not set: only the generated shop")
    print(f"{'':<18}{'queries':>8}{'gold above a corruption':>25}{'reward varies':>15}{'execution constant':>20}")
    found = {name: measure(some, lm) for name, some in worlds.items()}
    for name, f in found.items():
        print(f"{name:<18}{f['queries']:8.0f}{f['gold above']:25.1%}{f['varies']:15.1%}{f['constant']:20.1%}")
    first, main_figures = next(iter(found.items()))
    if options.save:
        f = main_figures
        save_result(
            "reasoning-sql",
            metric="share of corruptions that score below their gold query",
            value=f["gold above"],
            interval=None,
            baseline="",
            baseline_value=None,
            bound="at least 0.98; groups of corruptions: the reward varies in 0.95, execution is constant in 0.8",
            reached=f["gold above"] >= 0.98 and f["varies"] >= 0.95 and f["constant"] >= 0.8,
            world=f"{first}, {f['queries']} gold queries, {f['cases']} corruptions (GeoQuery is not there)",
            seeds=[],
            notes="Deterministic. A corruption that returns the same rows ties in execution.",
            rows=[
                {"metric": f"{what}, {name}", "value": figures[key]}
                for name, figures in found.items()
                for key, what in (
                    ("gold above", "gold above a corruption"),
                    ("varies", "groups of corruptions in which the reward varies"),
                    ("constant", "groups of corruptions in which execution alone is constant"),
                )
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
