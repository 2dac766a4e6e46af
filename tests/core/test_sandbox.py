"""Attacks on the sandbox: what writes, attaches, loops or floods is refused or stopped, and nothing is changed."""

import hashlib
import sqlite3
import time

import pytest

from pertoken.core.sandbox import SQLLimits, run_sql


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "shop ?#%.sqlite"  # a name that a URI could misread
    connection = sqlite3.connect(path)
    connection.executescript(
        "BEGIN; CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);"
        + "".join(f"INSERT INTO item VALUES ({i}, 'thing {i}', {i}.5);" for i in range(300))
        + "COMMIT;"
    )
    connection.close()
    return path


def digest(path):
    """Of the file, and the names beside it."""
    return hashlib.sha256(path.read_bytes()).hexdigest(), sorted(p.name for p in path.parent.iterdir())


def test_queries_run(database):
    found = run_sql(database, "SELECT name, price FROM item WHERE id < 2 ORDER BY id;")
    assert found.ok and found.rows == (("thing 0", 0.5), ("thing 1", 1.5)) and found.columns == ("name", "price")
    assert run_sql(database, "WITH a AS (SELECT 1 AS x) SELECT x FROM a").rows == ((1,),)
    assert run_sql(
        database, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<5) SELECT sum(i) FROM n"
    ).rows == ((15,),)
    assert run_sql(database, "select count(*), upper('é'), NULL from item").rows == ((300, "é", None),)
    many = run_sql(database, "SELECT id FROM item", SQLLimits(rows=10))
    assert many.ok and many.truncated and len(many.rows) == 10
    assert not run_sql(database, "SELECT id FROM item", SQLLimits(rows=300)).truncated


ATTACKS = {
    "refused": [
        "INSERT INTO item VALUES (999, 'x', 1)",
        "UPDATE item SET price = 0",
        "DELETE FROM item",
        "DROP TABLE item",
        "CREATE TABLE x (a)",
        "CREATE TEMP TABLE x AS SELECT * FROM item",
        "ALTER TABLE item RENAME TO x",
        "ATTACH DATABASE '{folder}/new.sqlite' AS new",
        "VACUUM INTO '{folder}/copy.sqlite'",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(item)",
        "SELECT load_extension('x')",
        "SELECT 1; DROP TABLE item",
        "SELECT 1; SELECT 2",
        "BEGIN",
        "ANALYZE",
        "REINDEX item",
        "SELECT randomblob(1000)",
        "WITH d AS (SELECT 1) DELETE FROM item",
        "INSERT INTO item SELECT * FROM item RETURNING id",
        "",
        "  \n ",
        "-- nothing",
        ";",
    ],
    "stopped": [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
        "SELECT count(*) FROM item a, item b, item c, item d",
        "SELECT a.name FROM item a, item b, item c ORDER BY a.name || b.name || c.name",
    ],
    "flood": [
        "SELECT replace(hex(printf('%.*c', 90000, 'x')), '7', 'yyyyyyyyyy')",
        "SELECT group_concat(a.name || b.name) FROM item a, item b",
        "SELECT printf('%.*c', 90000, 'x') FROM item",
        "SELECT a.id FROM item a, item b ORDER BY printf('%.*c', 90000, 'x') || a.id || b.id",
        "SELECT DISTINCT printf('%.*c', 90000, 'x') || a.id || b.id || c.id FROM item a, item b, item c",
    ],
    "error": [
        "SELEC 1",
        "SELECT writefile('{folder}/x', 'a')",
        "SELECT nothing FROM item",
        "SELECT * FROM nowhere",
        "SELECT 'open",
        "SELECT \x00",
        "SELECT '\ud800'",
        "SELECT " + "(" * 500 + "1" + ")" * 500,
        "SELECT " + ", ".join(["1"] * 300),
        "SELECT 1" + " UNION SELECT 1" * 50,
        "SELECT max(" + ", ".join(["1"] * 100) + ")",
        "SELECT name LIKE '" + "%a" * 400 + "' FROM item",
    ],
}


@pytest.mark.parametrize("kind, sql", [(kind, sql) for kind, some in ATTACKS.items() for sql in some])
def test_attacks(database, kind, sql):
    before = digest(database)
    found = run_sql(database, sql.format(folder=database.parent) if "{folder}" in sql else sql)
    assert not found.ok and found.error and not found.rows
    assert found.kind == kind, found
    assert digest(database) == before


def test_a_query_that_is_too_long(database):
    found = run_sql(database, "SELECT '" + "x" * 30_000 + "'")
    assert (found.kind in ("flood", "error") and "large" in found.error) or "big" in found.error


def test_the_budget_counts(database):
    sql = "SELECT count(*) FROM item a, item b"
    assert run_sql(database, sql).ok
    assert run_sql(database, sql, SQLLimits(steps=2000)).kind == "stopped"


def test_few_but_slow_instructions_are_stopped_too(database):
    """A search of a long string is one instruction of the virtual machine."""
    slow = "instr(printf('%.*c', 20000, 'a'), printf('%.*c', 9000, 'a') || 'b' || x.id)"
    start = time.monotonic()
    found = run_sql(database, f"SELECT count(*) FROM item, item x WHERE {slow}", SQLLimits(seconds=0.1))
    assert found.kind == "stopped" and "seconds" in found.error and time.monotonic() - start < 5
    with pytest.raises(ValueError, match="seconds above 0"):
        SQLLimits(seconds=0)


def test_faults_of_the_user(tmp_path, database):
    with pytest.raises(ValueError, match="there is no database"):
        run_sql(tmp_path / "none.sqlite", "SELECT 1")
    (tmp_path / "text.sqlite").write_text("this is no database at all, just some words " * 50)
    with pytest.raises(ValueError, match="no SQLite database"):
        run_sql(tmp_path / "text.sqlite", "SELECT * FROM item")
    with pytest.raises(ValueError, match="1 or more"):
        SQLLimits(steps=0)
