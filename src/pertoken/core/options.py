"""What options of dataclasses may be."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def known_values(options: Any) -> None:
    """Refuse what a dataclass's fields of type `Literal` do not name: a misspelt choice is no other choice.

    Raises:
        ValueError: a value is none of its field's.
    """
    for name, hint in get_type_hints(type(options)).items():
        if get_origin(hint) is Literal and getattr(options, name) not in get_args(hint):
            raise ValueError(f"{name}={getattr(options, name)!r} is not one of {', '.join(map(str, get_args(hint)))}")
