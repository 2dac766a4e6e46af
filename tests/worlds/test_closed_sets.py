"""The closed sets are large enough, and know one thing by one name."""

from pertoken.worlds.closed_sets import DEVELOPMENT, GIVEN, SETS, members, name_of


def test_sets():
    assert len(SETS) == 10 and set(GIVEN) == {*SETS, *DEVELOPMENT} and not set(SETS) & set(DEVELOPMENT)
    for name in (*SETS, *DEVELOPMENT):
        found = members(name)
        assert len(found) >= 20 and not found & {name_of(g) for g in GIVEN[name]}
        assert all(name_of(n) == n for n in found)
    assert len(members("states of the USA")) == 48 and len(members("chemical elements")) == 116
    assert len(members("capitals of the states of the USA")) == 48 and len(members("counties of Ireland")) == 30
    assert len(members("Greek letters")) == 22 and len(members("letters of the NATO alphabet")) == 24


def test_names():
    assert name_of("  Aluminium ") == "aluminum" and name_of("New  York") == "new york"
