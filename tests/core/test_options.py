"""Choices by name: a misspelt one is refused, whatever else the dataclass holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from pertoken.core.options import known_values


@dataclass(frozen=True, kw_only=True)
class Some:
    how: Literal["left", "right"] = "left"
    number: int = 0
    anything: Any = None
    known: ClassVar[dict[str, str]] = {}


def test_a_choice_is_one_of_its_field():
    known_values(Some(how="right", number=7, anything=["x"]))
    for bad in ("lef", None, ["left"]):
        with pytest.raises(ValueError, match="is not one of left, right"):
            known_values(Some(how=bad))  # type: ignore[arg-type]
