"""Options as JSON: what has an identity is described by it."""

from dataclasses import dataclass

from pertoken.core.describe import describe
from tests import tiny


@dataclass(frozen=True)
class Large:
    """Data that would fill a record."""

    values: tuple[int, ...]

    def identity(self):
        return {"sum": sum(self.values)}


def test_what_has_an_identity_is_described_by_it():
    assert describe(Large((1, 2, 3))) == {"sum": 6} == describe({"data": Large((6,))})["data"]
    assert describe(Large) == "Large"  # the class itself has none
    lm = tiny.lm(0)
    assert describe(lm) == lm.identity() and describe(lm)["name"] == "tiny-0"
