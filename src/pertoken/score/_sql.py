"""The scores of a generated SQL query as plain functions of texts and rows: where it stands, its names, its n-grams."""

from __future__ import annotations

import re
from typing import Any

from ..core.sandbox import SQLResult

Part = tuple[int, int, float]


def extract(text: str) -> tuple[int, int]:
    """Where the query stands in an answer: start and end, in characters."""
    blocks = list(re.finditer(r"```sql(.*?)```", text, re.DOTALL))
    start, end = blocks[-1].span(1) if blocks else (0, len(text))
    inner = text[start:end]
    if not blocks:
        return start, end
    return start + len(inner) - len(inner.lstrip()), start + max(len(inner.rstrip()), len(inner) - len(inner.lstrip()))


def parse(sql: str) -> Any:
    """The query's tree, None for what does not parse (or nests so deep that SQLite would refuse it).

    Raises:
        ImportError: sqlglot is not there.
    """
    try:
        import sqlglot
    except ImportError as error:
        raise ImportError("reasoning-sql needs the package sqlglot: pip install 'pertoken[sql]'") from error
    deep = most = 0
    for char in sql:
        deep += (char == "(") - (char == ")")
        most = max(most, deep)
    if most > 50 or len(sql) > 20_000:
        return None
    try:
        return sqlglot.parse_one(sql, read="sqlite")
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
        return None


def has_select(sql: str, compat: bool = False) -> bool:
    """Whether the word SELECT is in a query; `compat`: in capitals."""
    return "SELECT" in (sql if compat else sql.upper())


def schema_items(tree: Any, fold: bool = True) -> set[str]:
    """Names of columns and tables anywhere in a tree; `fold`: in small letters, without the * of t.* and tables that
    are functions (off: the release's set, where these are the names ``*`` and the empty one)."""
    from sqlglot import exp

    names = {c.alias_or_name for c in tree.find_all(exp.Column)} | {t.name for t in tree.find_all(exp.Table)}
    return {n.lower() for n in names if n and n != "*"} if fold else names


def schema_linking(gold: str, predicted: str, mode: str = "recall", compat: bool = False) -> float:
    """|S_gold n S_pred| / |S_gold| (recall) or by the union (jaccard), in [0, 1]; 0 for what does not parse.

    A gold query without a name: 1 (`compat`: 0, the release catches its division by zero).
    """
    tree, other = parse(gold), parse(predicted)
    if tree is None or other is None or not has_select(predicted, compat):
        return 0.0
    a, b = schema_items(tree, not compat), schema_items(other, not compat)
    if not a:
        return float(not compat and (mode == "recall" or not b))
    return len(a & b) / len(a if mode == "recall" else a | b)


def words(sql: str) -> list[str]:
    """Words of a query as it is rendered again, in small letters, without aliases and AS; raw ones (without AS) if it
    does not parse, or is too deep to be rendered."""
    tree = parse(sql)
    try:
        said = sql if tree is None else tree.sql(dialect="sqlite")
    except RecursionError:
        said, tree = sql, None
    gone = aliases(tree)
    return [w for w in re.findall(r"\w+", said.lower()) if w not in gone]


def aliases(tree: Any) -> set[str]:
    """The names that AS gives to tables and expressions, and the word itself; of no tree, the word alone."""
    from sqlglot import exp

    found = () if tree is None else tree.find_all(exp.Alias, exp.Table)
    return {"as"} | {a.alias.lower() for a in found if a.alias}


def ngrams(sql: str, n: int = 2) -> set[tuple[str, ...]]:
    """The set of n-grams of `words`."""
    kept = words(sql)
    return {tuple(kept[i : i + n]) for i in range(len(kept) - n + 1)}


def ngram_similarity(gold: str, predicted: str, n: int = 2) -> float:
    """Jaccard index of the sets of n-grams, in [0, 1]; 0 for two empty ones."""
    a, b = ngrams(gold, n), ngrams(predicted, n)
    return len(a & b) / len(a | b) if a | b else 0.0


def format_parts(text: str) -> list[Part]:
    """Amounts of the format score (count_xml) on character spans; they have no lower bound."""
    parts = [
        (text.index(tag), text.index(tag) + len(tag), 0.125)
        for tag in ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
        if text.count(tag) == 1
    ]
    if text.count("\n<answer>\n") == 1:
        rest = len(text.rpartition("\n</answer>\n")[2])
        parts.append((len(text) - rest, len(text), -0.001 * rest))
    if text.count("\n</answer>") == 1:
        rest = len(text.rpartition("\n</answer>")[2])
        parts.append((len(text) - rest, len(text), -0.001 * (rest - 1)))
    return parts


def format_score(text: str, compat: bool = False) -> float:
    """At most 0.5; not below 0 unless `compat`."""
    total = sum(amount for *_, amount in format_parts(text))
    return total if compat else max(0.0, total)


def same_rows(gold: SQLResult, predicted: SQLResult) -> bool:
    """Equal as sets of rows (order and number of times do not count), and not empty."""
    return gold.ok and predicted.ok and bool(gold.rows) and set(gold.rows) == set(predicted.rows)


def cleaned(sql: str) -> str:
    """The query as the release runs it: on one line, double quotes made single, without backslashes before quotes."""
    return re.sub(r"\\+'", "'", sql.replace("\n", " ").replace('"', "'"))
