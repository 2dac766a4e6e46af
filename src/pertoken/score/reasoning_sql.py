"""Reasoning-SQL — partial rewards of text-to-SQL: execution, judge, schema linking, n-grams, syntax, format.

Pourreza, Talaei, Sun, Wan, Li, Mirhoseini, Saberi, Arik, "Reasoning-SQL: Reinforcement Learning with SQL Tailored
Partial Rewards for Reasoning-Enhanced Text-to-SQL", 2025, arXiv 2503.23157. The query is the last ```sql block of the
answer (all of it without one). With S the column and table names of a query and G_n its set of n-grams of words:

    R = 3 [rows equal as sets] (else the judge's number in [0, 2])
        + |S_gold n S_pred| / |S_gold|  +  |G_2(gold) n G_2(pred)| / |G_2(gold) u G_2(pred)|
        + [the query runs]  +  format (at most 0.5)

As credit, a name of the gold query stands where the answer writes it, an n-gram on its words, a tag on its tag, the
penalty on the text after the answer, execution, judge and syntax on the whole query: the tokens of a wrong column or
join earn less than their neighbours. The sum is R.

Differs from the authors' code: names and SELECT are compared whatever their case, the query is run as it is written,
syntax asks for one read-only statement, and format is not below 0; ``compat=True`` gives the release's numbers, except
that what is no query (PRAGMA, writes) is never run and has syntax 0. Queries end after a number of steps; seconds are a
net under it. The judge's number is cut to [0, 2].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..core.credit import Credit, laid_out
from ..core.sandbox import SQLLimits, SQLResult, run_sql
from ..core.trace import Trace, byte_offsets
from ._sql import (
    Part,
    aliases,
    cleaned,
    extract,
    format_parts,
    format_score,
    has_select,
    ngram_similarity,
    ngrams,
    parse,
    same_rows,
    schema_items,
    schema_linking,
)

Judge = Callable[[str, str, str, str], float]


@dataclass(frozen=True, kw_only=True)
class SQLWeights:
    """What each reward is multiplied with; 0 leaves one out (all but execution 0: the execution-only baseline)."""

    execution: float = 3.0
    """For equal rows (the release has 2 in its variant without a judge)."""
    judge: float = 1.0
    """Of the judge's number in [0, 2]."""
    schema: float = 1.0
    ngram: float = 1.0
    syntax: float = 1.0
    format: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v >= 0 for v in vars(self).values()):
            raise ValueError(f"{self}: every weight is finite and 0 or more")


@dataclass(frozen=True, kw_only=True)
class ReasoningSQL:
    """Scorer of answers with a SQL query, against a gold query and its database."""

    weights: SQLWeights = field(default_factory=SQLWeights)
    """Weights of the rewards."""
    judge: Judge | None = None
    """(question, schema, gold, predicted) -> a number in [0, 2], asked when a SELECT's rows differ; none: 0."""
    schema_mode: Literal["recall", "jaccard"] = "recall"
    """Schema linking as the release computes it, or by the union as the paper words it."""
    n: int = 2
    """Words of an n-gram."""
    compat: bool = False
    """The release's numbers (see the module)."""
    limits: SQLLimits = field(default_factory=SQLLimits)
    """What a query may cost."""
    level: Literal["token", "sequence"] = "token"

    columns: ClassVar[dict[str, str]] = {"sql": "the gold query", "database": "path of the row's SQLite file"}

    def __post_init__(self) -> None:
        if self.n < 1 or self.level not in ("token", "sequence") or self.schema_mode not in ("recall", "jaccard"):
            raise ValueError("n is 1 or more, level token or sequence, schema_mode recall or jaccard")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]``: execution, judge, schema, ngram, syntax, format, weighted;
        ``meta["gold"]``: ok, empty, or why the gold query fails; ``judge_failed``: 1 if its answer is no number.

        Raises:
            ValueError: a row without a gold query or database.
        """
        golds: dict[tuple[str, str], SQLResult] = {}
        return [self._score(trace, golds) for trace in items]

    def _score(self, trace: Trace, golds: dict[tuple[str, str], SQLResult]) -> Credit:
        gold, database = (self._column(trace, name) for name in self.columns)
        text = trace.raw_text
        start, end = extract(text)
        sql, w = text[start:end], self.weights
        key = (gold, database)
        if key not in golds:
            golds[key] = self._run(database, gold)
        selects = has_select(sql, self.compat)
        same = selects and same_rows(golds[key], self._run(database, sql))
        ask = self.judge if selects and not same else None
        judged, failed = (0.0, 0) if ask is None else _judged(ask, trace, gold, sql)
        scores = {
            "execution": w.execution * same,
            "judge": w.judge * judged,
            "schema": w.schema * schema_linking(gold, sql, self.schema_mode, self.compat),
            "ngram": w.ngram * ngram_similarity(gold, sql, self.n),
            "syntax": w.syntax * self._runs(database, sql),
            "format": w.format * format_score(text, self.compat),
        }
        spans = [(start, end, scores[name]) for name in ("execution", "judge", "syntax")]
        spans += [(start + a, start + b, v) for a, b, v in self._named(gold, sql, scores["schema"])]
        spans += [(start + a, start + b, v) for a, b, v in self._grams(gold, sql, scores["ngram"])]
        if self.compat or scores["format"]:
            spans += [(a, b, w.format * v) for a, b, v in format_parts(text)]
        at, found = byte_offsets(text), golds[key]
        meta: dict[str, Any] = {"parts": scores, "gold": found.kind or ("ok" if found.rows else "empty")}
        meta |= {"judge_failed": failed, "scale": "0 to 6.5: execution 3, schema, ngram and syntax 1, format 0.5"}
        named = {"kind": "reward", "method": "reasoning-sql", "version": 1, "meta": meta}
        return laid_out(trace, [(at[a], at[b], v) for a, b, v in spans], sum(scores.values()), self.level, **named)

    def _column(self, trace: Trace, name: str) -> str:
        value = trace.meta.get(name)
        if not isinstance(value, str) or not value.strip() or (name == "database" and not Path(value).is_file()):
            raise ValueError(f"row {trace.meta.get('row', '?')}: column {name} is {value!r}; give {self.columns[name]}")
        return value

    def _run(self, database: str, sql: str, limits: SQLLimits | None = None) -> SQLResult:
        return run_sql(database, cleaned(sql) if self.compat else sql, limits or self.limits)

    def _runs(self, database: str, sql: str) -> bool:
        found = self._run(database, sql, SQLLimits(**{**vars(self.limits), "rows": 1}))
        return found.ok or (self.compat and found.error in ("the query is empty", "this is no query"))

    def _named(self, gold: str, sql: str, amount: float) -> list[Part]:
        """Schema linking, shared by the gold names and by the places where the query writes each."""
        tree, other = (parse(gold), parse(sql)) if amount else (None, None)
        if tree is None or other is None:
            return []
        shared = schema_items(tree, not self.compat) & schema_items(other, not self.compat)
        seen = [(m.span(), m.group() if self.compat else m.group().lower()) for m in re.finditer(r"\w+", sql)]
        out = [(0, len(sql), amount)] if not shared else []
        for name in sorted(shared):
            places = [span for span, word in seen if word == name] or [(0, len(sql))]
            out += [(*span, amount / len(shared) / len(places)) for span in places]
        return out

    def _grams(self, gold: str, sql: str, amount: float) -> list[Part]:
        """The shared n-grams' amount on their words; on the whole query where rendering it again made the n-gram."""
        if not amount:
            return []
        tree, shared = parse(sql), sorted(ngrams(gold, self.n) & ngrams(sql, self.n))
        gone = aliases(tree)
        seen = [(m.span(), m.group().lower()) for m in re.finditer(r"\w+", sql)]
        seen = [(span, word) for span, word in seen if word not in gone]
        out: list[Part] = []
        for gram in shared:
            starts = range(len(seen) - self.n + 1)
            places = [i for i in starts if tuple(word for _, word in seen[i : i + self.n]) == gram]
            spans = [span for i in places for span, _ in seen[i : i + self.n]] or [(0, len(sql))]
            out += [(*span, amount / len(shared) / len(spans)) for span in spans]
        return out


def _judged(judge: Judge, trace: Trace, gold: str, sql: str) -> tuple[float, int]:
    """The judge's number, cut to [0, 2], and 0; or 0 and 1 for what is no number or a judge that fails."""
    try:
        value = float(judge(str(trace.meta.get("question", "")), str(trace.meta.get("schema", "")), gold, sql))
    except Exception:  # whatever a judge's client raises: an answer without a judgment earns none, and is counted
        return 0.0, 1
    return (min(2.0, max(0.0, value)), 0) if math.isfinite(value) else (0.0, 1)
