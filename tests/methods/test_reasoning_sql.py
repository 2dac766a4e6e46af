"""Reasoning-SQL's rewards by hand, its identities, and where the parts stand."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false

import sqlite3

import numpy as np
import pytest

from pertoken.core.trace import Trace
from pertoken.score._sql import cleaned, extract, format_score, ngram_similarity, schema_linking, words
from pertoken.score.reasoning_sql import ReasoningSQL, SQLWeights

pytest.importorskip("sqlglot", reason="pip install 'pertoken[sql]'")

GOLD = "SELECT c.name FROM customer AS c JOIN city AS t ON c.city_id = t.id WHERE t.name = 'Oslo'"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE city (id INTEGER, name TEXT); CREATE TABLE customer (name TEXT, age INTEGER, city_id INTEGER);"
        "INSERT INTO city VALUES (1, 'Oslo'), (2, 'Rome');"
        "INSERT INTO customer VALUES ('Ann', 30, 1), ('Ann', 31, 1), ('Bo', 40, 1), ('Cy', 50, 2);"
    )
    connection.close()
    return str(path)


def answer(sql, end="\n"):
    return f"<reasoning>\nwell\n</reasoning>\n<answer>\n```sql\n{sql}\n```\n</answer>{end}"


def trace_of(text, database, gold=GOLD, **meta) -> Trace:
    """One token a byte."""
    pieces = tuple(bytes([b]) for b in text.encode())
    given = {"sql": gold, "database": database, "row": 3} | meta
    ids = {"prompt_ids": (), "prompt_pieces": (), "completion_ids": tuple(range(len(pieces)))}
    return Trace(**ids, completion_pieces=pieces, tokenizer="bytes", meta=given)


def parts(sql, database, gold=GOLD, whole=False, **options):
    text = sql if whole else answer(sql)
    (credit,) = ReasoningSQL(**options).score([trace_of(text, database, gold)])
    assert credit.values.sum() == pytest.approx(sum(credit.meta["parts"].values()), abs=1e-12)
    return credit.meta["parts"]


def test_gold_has_everything(database):
    assert parts(GOLD, database) == pytest.approx(
        {"execution": 3, "judge": 0, "schema": 1, "ngram": 1, "syntax": 1, "format": 0.5}
    )


def test_by_hand(database):
    """S_gold: name, city_id, id, customer, city. The wrong query names name, id, customer, city: 4 of 5, and of the
    union of {name, city_id, id, customer, city, age} 5 with age."""
    wrong = GOLD.replace("c.city_id = t.id", "c.age = t.id")
    got = parts(wrong, database)
    assert (got["execution"], got["syntax"], got["schema"]) == (0, 1, pytest.approx(4 / 5))
    assert schema_linking(GOLD, wrong, "jaccard") == pytest.approx(4 / 6)
    # words: select name from customer join city on city_id id where name oslo, 11 bigrams; (on, city_id), (city_id, id)
    # become (on, age), (age, id): 9 shared of 13
    assert got["ngram"] == pytest.approx(9 / 13)
    assert ngram_similarity("SELECT a FROM t", "SELECT a FROM t", 9) == 0.0  # no n-gram at all


def test_rows_are_compared_as_sets(database):
    gold = "SELECT name FROM customer"
    for sql in (
        "SELECT DISTINCT name FROM customer",
        "SELECT name FROM customer ORDER BY age DESC",
        "select name from customer",
    ):
        assert parts(sql, database, gold)["execution"] == 3
    assert parts("SELECT age, name FROM customer", database, "SELECT name, age FROM customer")["execution"] == 0
    empty = "SELECT name FROM customer WHERE age > 99"
    (credit,) = ReasoningSQL().score([trace_of(answer(empty), database, empty)])
    assert credit.meta["parts"]["execution"] == 0 and credit.meta["gold"] == "empty"
    small = parts("select name from customer", database, gold, compat=True)
    assert (small["execution"], small["schema"], small["syntax"]) == (0, 0, 1)


def test_names_and_aliases():
    renamed = GOLD.replace("c.", "q.").replace("AS c", "AS q").replace("t.", "u.").replace("AS t", "AS u")
    assert ngram_similarity(GOLD, renamed) == 1.0
    assert schema_linking("SELECT Name FROM T", "SELECT name FROM t") == 1.0
    assert schema_linking("SELECT Name FROM T", "SELECT name FROM t", compat=True) == 0.0
    assert schema_linking("SELECT 1", "SELECT 2") == 1.0 and schema_linking("SELECT 1", "SELECT (") == 0.0
    assert schema_linking("SELECT COUNT(*) FROM t", "SELECT t.* FROM t") == 1.0


def test_syntax_and_attacks(database):
    for sql in ("", "  ", "DROP TABLE city", "SELECT 1; SELECT 2", "SELECT nothing FROM city", "SELECT " + "(" * 400):
        assert parts(sql, database)["syntax"] == 0, sql
        assert parts(sql, database)["execution"] == 0
    assert parts(" ", database, whole=True, compat=True)["syntax"] == 1
    loop = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert parts(loop, database)["syntax"] == 0


def test_quotes_become_single_only_under_compat(database):
    gold = "SELECT name FROM customer"
    assert parts('SELECT "name" FROM customer', database, gold)["execution"] == 3
    assert parts('SELECT "name" FROM customer', database, gold, compat=True)["execution"] == 0


def test_compat_cleans_every_query_that_it_runs(database):
    """The release's execute_sql cleans the gold query, and what the syntax is judged by, too."""
    gold = 'SELECT "name" FROM customer'
    assert parts("SELECT 'name'", database, gold, compat=True)["execution"] == 3  # the literal, not the column
    assert parts("SELECT 'name'", database, gold)["execution"] == 0
    assert cleaned("SELECT\n\\\\'a\\\"") == "SELECT 'a'"  # any run of backslashes before a quote
    broken = "SELECT name FROM customer WHERE name = \\'Ann\\'"
    assert parts(broken, database)["syntax"] == 0 and parts(broken, database, compat=True)["syntax"] == 1
    quoted = 'SELECT name FROM customer WHERE name = "Ann\'s"'
    assert parts(quoted, database)["syntax"] == 1 and parts(quoted, database, compat=True)["syntax"] == 0


def test_compat_counts_the_star_of_a_table_and_fails_without_names():
    gold, named = "SELECT t.* FROM t", "SELECT a FROM t"
    assert schema_linking(gold, named) == 1.0 and schema_linking(gold, named, compat=True) == 0.5
    assert schema_linking(gold, gold, compat=True) == 1.0
    assert schema_linking("SELECT COUNT(*) FROM t", named, compat=True) == 1.0
    assert schema_linking("SELECT 1", "SELECT 2", compat=True) == 0.0


def test_words_of_what_does_not_parse_or_is_too_deep():
    assert words("SELEC a AS b FROM (") == ["selec", "a", "b", "from"]
    deep = "SELECT a" + ".b" * 3000
    assert len(words(deep)) == 3002 and ngram_similarity(deep, deep) == 1.0


def test_format():
    assert format_score(answer("x")) == pytest.approx(0.5)
    bare = answer("x", end="")
    assert format_score(bare) == pytest.approx(0.5 - 0.001 * len(bare) + 0.001)
    late = answer("x") + "y" * 1000  # 1000 characters after the closing form, 1001 after the tag
    assert format_score(late, compat=True) == pytest.approx(0.5 - 1.0 - 1.0)
    assert format_score(late) == 0.0 and format_score("") == 0.0


def test_the_last_block_is_the_query():
    text = "```sql\nSELECT 1\n``` and ```sql  SELECT 2 ```"
    assert text[slice(*extract(text))] == "SELECT 2"
    assert extract("SELECT 3 ") == (0, 9) and extract("") == (0, 0)
    blank = "a ```sql   ``` b"
    assert blank[slice(*extract(blank))] == ""


def test_judge_is_asked_only_when_rows_differ(database):
    asked = []

    def judge(question, schema, gold, predicted):
        asked.append((question, schema, gold, predicted))
        return 1.5

    assert parts(GOLD, database, judge=judge)["judge"] == 0 and not asked
    assert parts("SELECT age FROM customer", database, judge=judge)["judge"] == 1.5
    assert asked == [("", "", GOLD, "SELECT age FROM customer")]
    assert parts("SELECT 1", database, judge=lambda *_: 9)["judge"] == 2

    for none in ("", "I cannot say", "DROP TABLE city"):  # no SELECT: 0, and nobody is asked
        assert parts(none, database, judge=judge)["judge"] == 0 and len(asked) == 1
    assert parts("select age from customer", database, judge=judge, compat=True)["judge"] == 0 and len(asked) == 1
    assert parts("SELECT nothing FROM customer", database, judge=judge)["judge"] == 1.5  # one that fails is judged

    for bad in (lambda *_: "good", lambda *_: float("nan"), lambda *_: 1 / 0):
        (credit,) = ReasoningSQL(judge=bad).score([trace_of(answer("SELECT 1"), database)])
        assert credit.meta["judge_failed"] == 1 and credit.meta["parts"]["judge"] == 0


def test_a_wrong_column_earns_less_than_its_neighbours(database):
    text = answer(GOLD.replace("c.city_id = t.id", "c.age = t.id"))
    (credit,) = ReasoningSQL().score([trace_of(text, database)])
    of = lambda word: credit.values[text.index(word) : text.index(word) + len(word)].mean()
    assert of("age") < min(of("customer"), of("city AS"), of("SELECT"))
    assert credit.values[text.index("</answer>") : text.index("</answer>") + 9].sum() > 0
    assert not np.any(credit.values[text.index("well") : text.index("well") + 4])


def test_weights_leave_parts_out(database):
    only = SQLWeights(schema=0, ngram=0, syntax=0, format=0)
    assert sum(parts(GOLD, database, weights=only).values()) == 3
    assert sum(parts("SELECT name FROM customer", database, weights=only).values()) == 0
    assert parts(GOLD, database, weights=SQLWeights(execution=2.0))["execution"] == 2


def test_faults_of_the_user(database):
    for meta, what in (({"sql": ""}, "column sql"), ({"database": "none.sqlite"}, "column database")):
        with pytest.raises(ValueError, match=f"row 3: {what}"):
            ReasoningSQL().score([trace_of("x", **{"database": database} | meta)])
    with pytest.raises(ValueError, match="every weight"):
        SQLWeights(ngram=-1)
    with pytest.raises(ValueError, match="n is 1"):
        ReasoningSQL(n=0)
