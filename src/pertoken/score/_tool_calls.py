"""Tool calls in an answer: one JSON object a line between <tool_call> tags, and where the parts of each stand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.json_spans import Span, members

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A predicted call, and where in the text its parts stand (characters)."""

    data: dict[str, Any]
    span: Span
    name: Span
    keys: Mapping[str, Span]
    values: Mapping[str, Span]


def block(text: str) -> Span:
    """Where the lines of calls stand: after the first opening tag, up to the next tag of either kind (or the end, where
    the only closing tag stands before: what the release's splits leave).

    Raises:
        ValueError: a tag is missing.
    """
    start = text.index(OPEN) + len(OPEN)
    text.index(CLOSE)
    return start, min((at for at in (text.find(OPEN, start), text.find(CLOSE, start)) if at >= 0), default=len(text))


def parse_calls(text: str) -> list[dict[str, Any]]:
    """The calls of an answer, one JSON value a line. Raises ValueError: no block, or a line that is no JSON."""
    start, end = block(text)
    return [json.loads(line) for line in text[start:end].strip().split("\n")]


def calls_with_spans(text: str) -> list[Call]:
    """The calls of an answer whose lines are JSON objects with a name, each with where its parts stand."""
    start, end = block(text)
    inner = text[start:end]
    at = start + len(inner) - len(inner.lstrip())
    out = []
    for line in inner.strip().split("\n"):
        first = at + len(line) - len(line.lstrip())
        top = members(text, first)
        at_parameters = top["parameters"][1][0] if "parameters" in top else None
        inside = {} if at_parameters is None or text[at_parameters] != "{" else members(text, at_parameters)
        keys, values = ({k: v[i] for k, v in inside.items()} for i in (0, 1))
        out.append(Call(json.loads(line), (first, at + len(line.rstrip())), top["name"][1], keys, values))
        at += len(line) + 1
    return out
