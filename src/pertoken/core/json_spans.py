"""Where the parts of a JSON object stand in the text that holds it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue]

Span = tuple[int, int]


def members(text: str, start: int) -> dict[str, tuple[Span, Span]]:
    """Of the JSON object that begins at character `start`: key -> where key and value stand.

    Raises:
        ValueError, IndexError: it is no JSON object.
    """
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    out: dict[str, tuple[Span, Span]] = {}
    at = space.match(text, start + 1).end()  # type: ignore[union-attr]
    while text[at] == '"':
        key, end = scanstring(text, at + 1)
        key_span = (at, end)
        at = space.match(text, space.match(text, end).end() + 1).end()  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, at)
        out[key] = (key_span, (at, end))
        at = space.match(text, end).end()  # type: ignore[union-attr]
        at = space.match(text, at + 1).end() if text[at] == "," else at  # type: ignore[union-attr]
    return out


def objects(text: str) -> Iterator[tuple[int, int, dict]]:
    """The JSON objects in a text, left to right, none inside another: (start, end, object)."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield at, end, value
        at = text.find("{", end)
