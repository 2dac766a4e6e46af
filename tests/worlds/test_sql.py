"""The shop: enough pairs, every gold query runs, splits do not overlap, corruptions are what they say."""

import pytest

from pertoken.core.sandbox import run_sql
from pertoken.worlds.sql import TEMPLATES, corrupted, database, pairs, real_pairs, split


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return pairs(folder=tmp_path_factory.mktemp("shop"))


def test_enough_pairs_that_all_run(every):
    assert len(every) >= 300 and len({p.question for p in every}) == len(every)
    found = [run_sql(p.database, p.sql) for p in every]
    assert all(f.ok for f in found)
    assert sum(bool(f.rows) for f in found) > 0.8 * len(every)
    assert {p.level for p in every} == {"filter", "join", "aggregate", "group", "nested"}


def test_splits(every):
    parts = split(every)
    assert sum(map(len, parts.values())) == len(every) and all(len(p) >= 20 for p in parts.values())
    templates = {name: {p.template for p in some} for name, some in parts.items()}
    assert not templates["test"] & (templates["train"] | templates["dev"])
    assert templates["train"] | templates["test"] == set(range(len(TEMPLATES)))


def test_the_file_is_made_once_and_is_a_function_of_its_seed(tmp_path):
    one = database(0, tmp_path)
    stamp = one.stat().st_mtime_ns
    assert database(0, tmp_path) == one and one.stat().st_mtime_ns == stamp
    assert (
        run_sql(one, "SELECT * FROM purchase").rows
        == run_sql(database(0, tmp_path / "b"), "SELECT * FROM purchase").rows
    )
    assert database(1, tmp_path) != one


def test_corruptions(every):
    for pair in every[::17]:
        made = corrupted(pair)
        assert set(made) == {"no_where", "column", "table", "syntax"} - (
            {"no_where"} if "WHERE" not in pair.sql else set()
        )
        assert all(sql != pair.sql for sql in made.values())
        assert run_sql(pair.database, made["syntax"]).kind == "error"


def test_an_example_has_what_the_reward_asks_for(every):
    example = every[0].example(3)
    assert example.row == 3 and {"sql", "database", "question", "schema"} <= example.extra.keys()


def test_real_databases(monkeypatch):
    import os

    if not os.environ.get("PERTOKEN_DATA"):
        monkeypatch.delenv("PERTOKEN_DATA", raising=False)
        with pytest.raises(ValueError, match="PERTOKEN_DATA"):
            real_pairs()
        pytest.skip("the real databases are in the folder that PERTOKEN_DATA names, which is not set")
    found = real_pairs()
    assert len(found) > 100 and all(run_sql(p.database, p.sql).rows for p in found[::10])
