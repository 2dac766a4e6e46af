"""TL-Training's reward (IRM): what kind of mistake a tool call makes, against the gold call.

Ye et al., "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP Findings
2025, arXiv 2412.15495. A call is ``name(parameter=value, ...)``; F are the tools at hand, each with its parameters:

    -2     not a call, or a tool outside of F               -1.5   another tool than the gold call's
    -0.8   hal: a parameter that the tool does not have     -0.5   red: one of the tool's that the gold call leaves out
    -0.5   mis: a gold parameter is missing                 -0.25  only values differ          1   the same call

hal, red and mis add up: -1.3 for hal with one of the others, -1 for red and mis, -1.8 for all three. Each is counted
once, however many parameters it concerns.

As credit: what is wrong stands on the name, on the parameters or on the values it concerns, what is missing on the
closing parenthesis, what is no call on all of it; the 1 is shared by name and parameters. The sum is the reward. What
is read is the first turn: the tokens emitted before a tool's output.

Differs from the authors' code: calls are parsed with `ast`, never run; values are literals, JSON's true, false and null
too; positional ones are bound to the signature, surplus ones count as hal. ``parser="regex"`` reads as theirs does:
single-quoted values only, up to the first closing parenthesis. A gold call that is none is an error of the data (there:
-2, and so here by the regex).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.credit import Credit, laid_out
from ..core.json_spans import tool_schema
from ..core.trace import Trace, byte_offsets

Span = tuple[int, int]
Tools = Mapping[str, Sequence[str]]
PENALTY = {"hallucinated": -0.8, "redundant": -0.5, "missing": -0.5}
_WORDS = {"true": True, "false": False, "null": None}
_BAD = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Spoken:
    """A call as text: name, values by parameter, and where they stand (characters)."""

    name: str
    values: Mapping[str, Any]
    name_span: Span = (0, 0)
    spans: Mapping[str, Span] = field(default_factory=dict)
    value_spans: Mapping[str, Span] = field(default_factory=dict)
    closing: Span = (0, 0)


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(_WORDS[node.id]), node) if node.id in _WORDS else node


def parse_ast(text: str, tools: Tools) -> Spoken:
    """The one call that a text is.

    Raises:
        ValueError, SyntaxError, TypeError, RecursionError, MemoryError: it is something else.
    """
    stripped = text.strip()
    first = text.index(stripped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value's odd escape is none of our user's code
        call = ast.parse(stripped, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        raise ValueError("not a call of a name")
    lines = [0, *(m.end() for m in re.finditer(r"\r\n|\r|\n", stripped))]

    def at(line: int, column: int) -> int:
        """Where a position of ast's (1-based line, byte of the line) stands in the text, in characters."""
        return first + lines[line - 1] + len(stripped[lines[line - 1] :].encode()[:column].decode())

    def span(node: Any) -> Span:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    name = ast.unparse(call.func)
    signature = list(tools.get(name, ()))
    signature += [f"*{i}" for i in range(len(signature), len(call.args))]
    given: list[tuple[Any, Any, Any]] = [(key, node, node) for key, node in zip(signature, call.args, strict=False)]
    given += [(keyword.arg, keyword, keyword.value) for keyword in call.keywords]
    if len({key for key, *_ in given}) < len(given) or None in (key for key, *_ in given):
        raise ValueError("a parameter is given twice, or without a name after **")
    end = span(call)[1]
    return Spoken(
        name,
        {key: ast.literal_eval(_Words().visit(value)) for key, _, value in given},
        span(call.func),
        {key: span(node) for key, node, _ in given},
        {key: span(value) for key, _, value in given},
        (end - 1, end),
    )


def parse_regex(text: str) -> Spoken:
    """What the release reads as a call: the text before the first parenthesis of a line, and single-quoted values.

    Raises:
        ValueError: there is none.
    """
    opening = text.find("(")  # without a closing one behind it, the search would try every part at every length
    found = re.search(r"(.*?)\(([\s\S]*?)\)", text) if 0 <= opening < text.rfind(")") else None
    if found is None:
        raise ValueError("no parentheses")
    matches, start = list(re.finditer(r"(\w+)\s*=\s*'([^']*)'", found[2])), found.start(2)
    return Spoken(
        found[1].strip(),
        {m[1]: m[2] for m in matches},
        found.span(1),
        {m[1]: (start + m.start(), start + m.end()) for m in matches},
        {m[1]: (start + m.start(2) - 1, start + m.end(2) + 1) for m in matches},
        (found.end() - 1, found.end()),
    )


def mistakes(call: Spoken, gold: Spoken, tools: Tools, action: str | None = None) -> dict[str, tuple[float, list[str]]]:
    """What is wrong with a call, or that it is right: name of the part -> (its reward, the parameters concerned). Their
    sum is the reward.

    Args:
        action: look the parameters up under this name (a prompt that ends in the beginning of a call; empty or None:
            under the call's own).
    """
    if call.name and call.name not in tools:
        return {"unknown_tool": (-2.0, [])}
    if call.name != gold.name:
        return {"wrong_tool": (-1.5, [])}
    known = tools.get(action or call.name)
    extra = [key for key in call.values if key not in gold.values]
    concerned = {
        "hallucinated": [] if known is None else [key for key in call.values if key not in known],
        "redundant": [] if known is None else [key for key in extra if key in known],
        "missing": [key for key in gold.values if key not in call.values],
    }
    wrong = {name: (PENALTY[name], keys) for name, keys in concerned.items() if keys}
    if wrong:
        return wrong
    if dict(call.values) != dict(gold.values):
        return {"values": (-0.25, [k for k in call.values if k in extra or call.values[k] != gold.values[k]])}
    return {"right": (1.0, list(call.values))}


@dataclass(frozen=True, kw_only=True)
class TLTrainingReward:
    """Scorer of tool calls by the kind of their mistakes."""

    parser: Literal["ast", "regex"] = "ast"
    """How calls are read; regex: as the release does."""
    level: Literal["token", "sequence"] = "token"
    """Parts on the tokens they concern, or the reward on the last token."""

    columns: ClassVar[Mapping[str, str]] = {
        "gold_call": "the right call, name(parameter=value, ...)",
        "tools": "{tool: [its parameters in order]}, or a list of JSON schemas (OpenAI's, too)",
    }

    def __post_init__(self) -> None:
        if self.parser not in ("ast", "regex") or self.level not in ("token", "sequence"):
            raise ValueError(f"parser={self.parser!r}: ast or regex; level={self.level!r}: token or sequence")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]`` names the mistakes, ``meta["parameters"]`` whom each concerns. An
        optional column ``demo_action`` is the `action` of `mistakes`.

        Raises:
            ValueError: a row without gold call or tools, or whose gold call is none, or (ast) of a tool not among them.
        """
        return [self._score(trace) for trace in items]

    def _score(self, trace: Trace) -> Credit:
        row, (start, text) = trace.meta.get("row", "?"), _first_turn(trace)
        said, tools = trace.meta.get("gold_call"), tools_of(trace.meta.get("tools"), row)
        if not isinstance(said, str):
            raise ValueError(f"row {row} has no text in column gold_call, which tl-training-reward compares with")
        call, found = None, dict[str, tuple[float, list[str]]](format=(-2.0, []))
        try:
            gold = self._parse(said, tools)
            if self.parser == "ast" and gold.name not in tools:
                raise ValueError(f"there is no tool {gold.name}")
        except _BAD as error:
            if self.parser == "ast":
                raise ValueError(f"row {row}: its gold call {said!r} is no call ({error}); mend the row") from error
        else:
            try:
                call = self._parse(text, tools)
                found = mistakes(call, gold, tools, trace.meta.get("demo_action"))
            except _BAD:
                call = None  # its format is wrong
        parts = {name: value for name, (value, _) in found.items()}
        at = byte_offsets(text)
        spans = [(start + at[a], start + at[b], v) for a, b, v in _where(call, found, len(text))]
        meta = {
            "parts": parts,
            "parameters": {name: keys for name, (_, keys) in found.items()},
            "scale": "-2, -1.8, -1.5, -1.3, -1, -0.8, -0.5, -0.25 or 1",
        }
        named = {"kind": "reward", "method": "tl-training-reward", "version": 1}
        return laid_out(trace, spans, sum(parts.values()), self.level, meta=meta, **named)

    def _parse(self, text: str, tools: Tools) -> Spoken:
        return parse_ast(text, tools) if self.parser == "ast" else parse_regex(text)


def tools_of(given: Any, row: Any = "?") -> dict[str, list[str]]:
    """Parameters by tool, from either form of the column.

    Raises:
        ValueError: neither.
    """
    try:
        listed = list(given.values()) if isinstance(given, Mapping) else []
        if not given or any(isinstance(parameters, str | Mapping) for parameters in listed):
            raise TypeError("no tools, or no list of parameters")
        if listed:
            return {str(name): [str(p) for p in parameters] for name, parameters in given.items()}
        return {name: [str(p) for p in known["properties"]] for name, known in map(tool_schema, given)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {row}: column tools must be {TLTrainingReward.columns['tools']}") from error


def _first_turn(trace: Trace) -> tuple[int, str]:
    """The first run of tokens that the policy emitted (before a tool's output): its first byte, and its text."""
    mask = trace.mask.tolist()
    first = mask.index(True) if True in mask else 0
    last = mask.index(False, first) if False in mask[first:] else len(mask)
    before = sum(map(len, trace.completion_pieces[:first]))
    return before, b"".join(trace.completion_pieces[first:last]).decode("utf-8", "surrogateescape")


def _where(
    call: Spoken | None, found: Mapping[str, tuple[float, list[str]]], size: int
) -> list[tuple[int, int, float]]:
    """The parts on spans of characters."""
    out: list[tuple[int, int, float]] = []
    for part, (value, keys) in found.items():
        spans = [(0, size)]
        if call is not None and part in ("unknown_tool", "wrong_tool") and call.name:
            spans = [call.name_span]
        elif call is not None and part == "missing":
            spans = [call.closing]
        elif call is not None and (keys or part == "right"):
            places = call.value_spans if part == "values" else call.spans
            spans = [places[key] for key in keys] + ([call.name_span] if part == "right" else [])
        out += [(*span, value / len(spans)) for span in spans]
    return out
