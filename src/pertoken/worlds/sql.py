"""A shop's database and questions about it, from templates; corruptions of known kinds; and real databases.

Four tables, a few hundred rows, made from a seed. A template asks one question for many values; levels are filter,
join, aggregate, group and nested. Pairs are split by template (test questions are of forms that were never seen) and,
within the training templates, by value (development). Real ones: `real_pairs` reads the databases that PERTOKEN_DATA
holds.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.data import Example
from ._tiny_lm import cached_folder

SCHEMA = """CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT, city TEXT, age INTEGER);
CREATE TABLE product (id INTEGER PRIMARY KEY, title TEXT, category TEXT, price INTEGER);
CREATE TABLE purchase (id INTEGER PRIMARY KEY, customer_id INTEGER, product_id INTEGER, quantity INTEGER, month TEXT);
CREATE TABLE review (id INTEGER PRIMARY KEY, customer_id INTEGER, product_id INTEGER, stars INTEGER);"""
CITIES = ("Oslo", "Lima", "Rome", "Kyiv", "Cairo", "Quito", "Riga", "Bern")
CATEGORIES = ("tea", "books", "tools", "toys", "shoes", "music")
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jo", "Kim", "Lea")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun")


@dataclass(frozen=True)
class Pair:
    """A question and its query.

    Attributes:
        level: filter, join, aggregate, group or nested. template: which of them it is of. database: the file.
    """

    question: str
    sql: str
    level: str
    template: int
    database: str

    def example(self, row: int = 0) -> Example:
        """A prompt whose columns are what `reasoning-sql` asks for."""
        prompt = f"{SCHEMA}\n\nQuestion: {self.question}\nAnswer with one SQLite query."
        extra = {"sql": self.sql, "database": self.database, "question": self.question, "schema": SCHEMA}
        return Example(prompt=prompt, kind="prompt", row=row, extra=extra)


TEMPLATES: tuple[tuple[str, str, str, tuple[tuple[Any, ...], ...]], ...] = (
    ("filter", "Which customers live in {0}?", "SELECT name FROM customer WHERE city = '{0}'", (CITIES,)),
    ("filter", "How old are the customers called {0}?", "SELECT age FROM customer WHERE name = '{0}'", (NAMES,)),
    (
        "filter",
        "Which products of the category {0} cost more than {1}?",
        "SELECT title FROM product WHERE category = '{0}' AND price > {1}",
        (CATEGORIES, (5, 10, 15, 20, 25, 30)),
    ),
    (
        "join",
        "What did customers from {0} buy in {1}?",
        "SELECT DISTINCT p.title FROM purchase AS b JOIN product AS p ON b.product_id = p.id JOIN customer AS c "
        "ON b.customer_id = c.id WHERE c.city = '{0}' AND b.month = '{1}'",
        (CITIES, MONTHS),
    ),
    (
        "join",
        "Which products did {0} give {1} stars?",
        "SELECT DISTINCT p.title FROM review AS r JOIN product AS p ON r.product_id = p.id JOIN customer AS c "
        "ON r.customer_id = c.id WHERE c.name = '{0}' AND r.stars = {1}",
        (NAMES, (1, 2, 3, 4, 5)),
    ),
    ("aggregate", "How many customers live in {0}?", "SELECT COUNT(*) FROM customer WHERE city = '{0}'", (CITIES,)),
    (
        "aggregate",
        "What is the average price of {0}?",
        "SELECT AVG(price) FROM product WHERE category = '{0}'",
        (CATEGORIES,),
    ),
    (
        "aggregate",
        "How many pieces of {0} were sold in {1}?",
        "SELECT SUM(b.quantity) FROM purchase AS b JOIN product AS p ON b.product_id = p.id "
        "WHERE p.category = '{0}' AND b.month = '{1}'",
        (CATEGORIES, MONTHS),
    ),
    (
        "group",
        "Which cities have more than {0} customers older than {1}?",
        "SELECT city FROM customer WHERE age > {1} GROUP BY city HAVING COUNT(*) > {0}",
        ((1, 2, 3, 4), (20, 30, 40, 50, 60)),
    ),
    (
        "group",
        "Which products have an average of at least {0} stars from customers in {1}?",
        "SELECT p.title FROM review AS r JOIN product AS p ON r.product_id = p.id JOIN customer AS c "
        "ON r.customer_id = c.id WHERE c.city = '{1}' GROUP BY p.id HAVING AVG(r.stars) >= {0}",
        ((2, 3, 4), CITIES),
    ),
    (
        "nested",
        "Which customers from {0} are older than the average customer?",
        "SELECT name FROM customer WHERE city = '{0}' AND age > (SELECT AVG(age) FROM customer)",
        (CITIES,),
    ),
    (
        "nested",
        "Which products of the category {0} were never bought in {1}?",
        "SELECT title FROM product WHERE category = '{0}' AND id NOT IN "
        "(SELECT product_id FROM purchase WHERE month = '{1}')",
        (CATEGORIES, MONTHS),
    ),
)
TEST_TEMPLATES = (1, 6, 8, 11)  # one of each level but join, whose other form has many values


def database(seed: int = 0, folder: str | os.PathLike | None = None) -> Path:
    """The shop's SQLite file, made once and cached."""

    def build(path: Path) -> None:
        rng = np.random.default_rng(seed)
        pick = lambda some, n: [str(x) for x in rng.choice(some, n)]
        connection = sqlite3.connect(path / "shop.sqlite")
        connection.executescript(SCHEMA)
        n, m, k = 80, 60, 400
        ages = rng.integers(18, 80, n).tolist()
        people = [(i, *row) for i, row in enumerate(zip(pick(NAMES, n), pick(CITIES, n), ages, strict=True))]
        kinds, prices = pick(CATEGORIES, m), rng.integers(2, 40, m).tolist()
        goods = [(i, f"{kind} no. {i}", kind, price) for i, (kind, price) in enumerate(zip(kinds, prices, strict=True))]
        who, what, how = (rng.integers(0, top, k).tolist() for top in (n, m, 5))
        bought = [
            (i, a, b, 1 + c, d) for i, (a, b, c, d) in enumerate(zip(who, what, how, pick(MONTHS, k), strict=True))
        ]
        who, what, how = (rng.integers(0, top, k).tolist() for top in (n, m, 5))
        said = [(i, a, b, 1 + c) for i, (a, b, c) in enumerate(zip(who, what, how, strict=True))]
        for table, rows in (("customer", people), ("product", goods), ("purchase", bought), ("review", said)):
            connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
        connection.commit()
        connection.close()

    return cached_folder("shop", [SCHEMA, seed, 1], build, folder) / "shop.sqlite"


def pairs(seed: int = 0, folder: str | os.PathLike | None = None) -> list[Pair]:
    """All question and query pairs of the shop."""
    path = str(database(seed, folder))
    return [
        Pair(question.format(*values), sql.format(*values), level, number, path)
        for number, (level, question, sql, slots) in enumerate(TEMPLATES)
        for values in itertools.product(*slots)
    ]


def split(every: list[Pair]) -> dict[str, list[Pair]]:
    """train and dev (of the same templates, other values), and test (of templates that neither has)."""
    out: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    for i, pair in enumerate(every):
        out["test" if pair.template in TEST_TEMPLATES else "dev" if i % 5 == 0 else "train"].append(pair)
    return out


def real_pairs() -> list[Pair]:
    """Queries on the real databases of PERTOKEN_DATA, each of which runs and returns rows.

    Raises:
        ValueError: it is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds text_to_sql/")
    root = Path(folder) / "text_to_sql"
    with gzip.open(root / "executable.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Pair(r["question"] or "", r["sql"], "real", -1, str(root / f"{r['db']}.sqlite")) for r in rows if r["rows"]]


def columns_of(path: str) -> dict[str, list[str]]:
    """Columns of each table of a database."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = [r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {t: [r[1] for r in connection.execute(f'PRAGMA table_info("{t}")')] for t in tables}
    finally:
        connection.close()


def corrupted(pair: Pair) -> dict[str, str]:
    """The query with one mistake of each kind that it can have: no_where, column, table, syntax.

    Raises:
        ImportError: sqlglot is not installed.
    """
    import sqlglot
    from sqlglot import exp

    known = columns_of(pair.database)

    def changed(change: Callable[[Any], bool]) -> Iterator[str]:
        tree = sqlglot.parse_one(pair.sql, read="sqlite")
        if change(tree):
            yield tree.sql(dialect="sqlite")

    def no_where(tree: Any) -> bool:
        where = tree.find(exp.Where)
        if where is not None:
            where.pop()
        return where is not None

    def other_column(tree: Any) -> bool:
        for column in tree.find_all(exp.Column):
            names = [n for t in known.values() if column.name.lower() in map(str.lower, t) for n in t]
            other = next((n for n in names if n.lower() != column.name.lower()), None)
            if other is not None:
                column.this.set("this", other)
                return True
        return False

    def other_table(tree: Any) -> bool:
        table = tree.find(exp.Table)
        other = next((t for t in known if table is not None and t.lower() != table.name.lower()), None)
        if table is None or other is None:
            return False
        table.this.set("this", other)
        return True

    made = {"no_where": no_where, "column": other_column, "table": other_table}
    out = {name: sql for name, change in made.items() for sql in changed(change)}
    return out | {"syntax": pair.sql.replace("FROM", "FORM", 1).replace("from", "form", 1)}
