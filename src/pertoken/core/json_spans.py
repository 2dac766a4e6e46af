"""Where the parts of a JSON object stand in the text that holds it, and what a JSON schema says of a tool."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

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


def tool_schema(tool: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and parameters of a tool, whose schema is flat, ``{"name", "parameters"}``, or nested as OpenAI's,
    ``{"type": "function", "function": {"name", "parameters"}}``. The parameters come as an object's schema, with
    ``properties``, also where the tool names them at once.

    Raises:
        ValueError: it has no name, or parameters that are no object.
    """
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    parameters = (inner.get("parameters") if isinstance(inner, Mapping) else None) or {}
    if not isinstance(name, str) or not name or not isinstance(parameters, Mapping):
        raise ValueError(f'{tool!r} describes no tool; write {{"name": ..., "parameters": {{...}}}}')
    if parameters.get("type") != "object" and "properties" not in parameters:
        return name, {"properties": parameters}
    properties = parameters.get("properties") or {}
    if not isinstance(properties, Mapping):
        raise ValueError(f'{name}: properties={properties!r} describe no parameters; write {{"name": {{...}}, ...}}')
    return name, {**parameters, "properties": properties}
