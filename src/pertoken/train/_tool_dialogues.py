"""Tool-use dialogues: which turns are worth imitating, tools as signatures, and where an answer names a tool."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.examples import DataReport, Example
from ..core.json_spans import members, objects, tool_schema

Turn = Mapping[str, Any]
OUTPUT_ROLES = ("function", "tool")
ERRORS = (
    "is not defined",
    "positional argument",
    "unexpected keyword",
    "'related_searches'",
    "ConnectionError",
    '"error":',
    "not supported",
    "Invalid API call",
    "Response error",
    "Object of type SerpResults is not JSON serializable",
    "400 Client Error",
    "'error'",
    "slice indices must be integers or None or have an __index__ method",
    "connection error",
)
"""What the release takes for an error in a tool's output. Two of them come to the bare word, so that an output which
speaks of errors for good reasons counts as one, too."""
_DROPPED = re.compile("[^\u4e00-\u9fa5^a-z^A-Z^0-9]")  # the ^ between the ranges are the release's, and survive


def normalised(text: str) -> str:
    """Letters (of ASCII and common Chinese), digits and ^, in lower case: what error texts are compared in."""
    return _DROPPED.sub("", text).lower()


def looks_like_error(output: str, errors: Sequence[str] = ERRORS) -> bool:
    """Whether a tool's output holds one of the error texts.

    Raises:
        ValueError: an error text of which nothing is left when normalised (it would be found everywhere).
    """
    wanted = [normalised(e) for e in errors]
    if not all(wanted):
        raise ValueError(f"error text {errors[wanted.index('')]!r} has no letter or digit; leave it out")
    return any(e in normalised(output) for e in wanted)


def kept_turns(messages: Sequence[Turn], errors: Sequence[str] | None = ERRORS) -> tuple[list[int], dict[str, int]]:
    """Assistant turns to imitate, by their place in the dialogue, and how many were dropped for which reason.

    The last message is kept if it is the assistant's. A turn before is kept if a tool's output follows that does not
    look like an error; errors=(): if any output follows; errors=None: every turn is kept.
    """
    kept, dropped = [], {"its call failed": 0, "no tool output follows": 0}
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        after = messages[place + 1] if place + 1 < len(messages) else None
        if after is None or errors is None:
            kept.append(place)
        elif after["role"] not in OUTPUT_ROLES:
            dropped["no tool output follows"] += 1
        elif looks_like_error(after["content"], errors):
            dropped["its call failed"] += 1
        else:
            kept.append(place)
    return kept, dropped


def last_replies(
    examples: Sequence[Example], errors: Sequence[str] | None = ERRORS
) -> tuple[list[Example], DataReport]:
    """Dialogues as one example a kept turn: all that was said before is its prompt (failed calls, too), and it alone
    is the response. Examples whose response is one text are kept as they are.

    Args:
        examples: of kind sft, the dialogue cut anywhere between prompt and response.
        errors: see `kept_turns`.
    """
    out, report = [], DataReport()
    for example in examples:
        (response,) = example.responses
        if isinstance(response, str):
            out.append(example)
            report.kept += 1
            continue
        prompt = ({"role": "user", "content": example.prompt},) if isinstance(example.prompt, str) else example.prompt
        messages = (*prompt, *response)
        kept, dropped = kept_turns(messages, errors)
        for place in kept:
            if place >= len(prompt):
                before = tuple(dict(m) for m in messages[:place])
                said = (messages[place]["content"],)
                out.append(dataclasses.replace(example, prompt=before, responses=said, scores=None))
        report.kept += 1
        for reason, number in dropped.items():
            report.noted.setdefault(f"turns not imitated: {reason}", []).extend([example.row] * number)
    report.noted = {reason: rows for reason, rows in report.noted.items() if rows}
    return out, report


def tool_names(given: Any, row: Any = "?") -> list[str]:
    """Names of the tools at hand: a list of names or of JSON schemas (flat, or OpenAI's), or a mapping by name.

    Raises:
        ValueError: anything else, or none.
    """
    listed = list(given) if isinstance(given, Mapping | list | tuple) else []
    try:
        names = [tool if isinstance(tool, str) else tool_schema(tool)[0] for tool in listed]
    except ValueError:
        names = []
    if not names or not all(names):
        raise ValueError(
            f"row {row}: column tools must be the tools at hand: [names], [schemas with a name] or {{name: ...}}"
        )
    return names


def names_called(answer: str, tools: Sequence[str]) -> list[tuple[int, int, str]]:
    """Which tools an answer calls, and where it names them, in characters: JSON objects with a name and parameters (or
    arguments), or ``name(...)`` at the beginning of a line. Nothing: it calls none.

    Raises:
        ValueError: a called tool is not among `tools`.
    """
    found = []
    for start, _, value in objects(answer):
        if isinstance(value.get("name"), str) and ("parameters" in value or "arguments" in value):
            a, b = members(answer, start)["name"][1]
            found.append((a + 1, b - 1, value["name"]))
    if not found:
        known = "|".join(re.escape(name) for name in sorted(tools, key=len, reverse=True))
        line = re.compile(rf"^[ \t]*(?:({known})\(|([A-Za-z_][\w.]*)\(.*\)\s*$)", re.MULTILINE)
        found = [(*m.span(m.lastindex or 0), m[m.lastindex or 0]) for m in line.finditer(answer)]
    for *_, name in found:
        if name not in tools:
            raise ValueError(f"the called tool {name!r} is not among the tools at hand ({', '.join(tools)})")
    return found


def signatures(tools: Sequence[Mapping[str, Any]]) -> str:
    """JSON schemas (flat, or OpenAI's) as Python signatures, the form in which TL-Training shows tools to the model.

    Raises:
        ValueError: one without a name.
    """
    out = []
    for tool in tools:
        name, parameters = tool_schema(tool)
        required, known = parameters.get("required") or [], parameters["properties"]
        ordered = [*(p for p in required if p in known), *(p for p in known if p not in required)]
        head = [f"{p}: {known[p].get('type', 'Any')}" + ("" if p in required else " = None") for p in ordered]
        told = [f"    {p} ({known[p].get('type', 'Any')}): {known[p].get('description', '')}" for p in ordered]
        lines = [
            "Function:",
            f"def {name}({', '.join(head)}):",
            '    """',
            f"    {tool.get('function', tool).get('description', '')}",
        ]
        out.append("\n".join([*lines, "", "    Args:", *told, '    """']))
    return "\n\n".join(out)


def spoken_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as text: ``name(k=json_value, ...)``."""
    return f"{name}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in arguments.items())})"
