"""ToolRL — a rule reward for tool calls: a format bit and graded correctness of names, parameters and values.

Qian et al., "ToolRL: Reward is All Tool Learning Needs", 2025, arXiv 2504.13958. An answer is ``<think>..</think>``,
then ``<tool_call>`` with one JSON object a line (``name``, ``parameters``), and/or ``<response>``. With G the gold
calls and P the predicted ones:

    R = R_format + R_correct (+ R_length),   R_format in {0, 1},   R_correct = 6 score / S_max - 3 in [-3, 3]
    score = match(names_G, names_P) + sum over matched pairs (g, p) of [ match(keys_g, keys_p) + #{k : p[k] == g[k]} ]
    S_max = 1 + sum_g ( 1 + |params_g| ),    match = multiset Jaccard |a n b| / (|a| + |b| - |a n b|)

A gold call takes, in order, the unused predicted call of its name that scores most. What does not parse has -3; a gold
answer without calls has correctness 0. Values are equal as Python's == says of decoded JSON.

As credit, each part of S_max stands on what it speaks of: the names, the keys of a call, each value; a part runs from
its share of -3 (wrong) to its share of +3 (right), so a wrong value's own tokens are punished. What is missing stands
on the end of its call, or of the block. The sum is R.

Differs from the authors' code: none in the numbers, with ``compat=True``; by default the smooth schedule's format
minimum ends at 0 as its maximum does at 1 (theirs is clipped at -1 on the wrong side). Only errors of parsing and shape
are caught. A gold call that does not parse is an error of the data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..core.credit import Credit, laid_out
from ..core.options import known_values
from ..core.trace import Trace, byte_offsets
from ._tool_calls import CLOSE, OPEN, Call, Span, block, calls_with_spans, parse_calls

Part = tuple[int, int, float]
_BAD = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # parsing and shape
_FORMATS = {  # (call, response) in the gold answer -> what the whole answer must be, and the tags that come once
    (False, True): (r"^<think>.*?</think>\n<response>.*?</response>$", ("response",)),
    (True, False): (r"^<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>$", ("tool_call",)),
    (True, True): (
        r"^<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>\n<response>.*?</response>$",
        ("tool_call", "response"),
    ),
    (False, False): (r"^<think>.*?</think>$", ()),
}


def format_ok(text: str, gold: str) -> bool:
    """Whether the answer has the parts that the gold answer has, in order, and each tag once."""
    pattern, tags = _FORMATS["<tool_call>" in gold, "<response>" in gold]
    once = all(text.count(f"<{tag}>") == 1 == text.count(f"</{tag}>") for tag in tags)
    return once and re.search(pattern, text, re.DOTALL) is not None


def match(a: Sequence[Any], b: Sequence[Any], strict: bool = False) -> float:
    """Multiset Jaccard of two lists (1 for equal ones, two empty ones too); `strict`: 1 for equal lists, else 0."""
    if list(a) == list(b):
        return 1.0
    if strict or not a or not b:
        return 0.0
    shared = sum((Counter(a) & Counter(b)).values())
    return shared / (len(a) + len(b) - shared)


def pairs_of(gold: Sequence[dict], predicted: Sequence[dict], how: str = "fine") -> list[tuple[int | None, float]]:
    """For each gold call, the predicted one that it takes and the score of the pair; (None, 0) without one."""
    used: set[int] = set()
    out: list[tuple[int | None, float]] = []
    for g in gold:
        best, chosen = 0.0, None
        for i, p in enumerate(predicted):
            if i in used or p["name"] != g["name"]:
                continue
            if how == "intermediate":
                score = float(p == g)
            else:
                keys = match(list(g["parameters"]), list(p["parameters"].keys()), how == "strict")
                score = keys + sum(k in p["parameters"] and p["parameters"][k] == v for k, v in g["parameters"].items())
            if score > best:
                best, chosen = score, i
        if chosen is not None:
            used.add(chosen)
        out.append((chosen, best))
    return out


def correctness(gold: Sequence[dict], predicted: Sequence[dict], low: float, high: float, how: str = "fine") -> float:
    """R_correct between `low` and `high`.

    Args:
        how: fine, strict (lists must be equal), intermediate (whole calls), coarse (all or nothing).

    Raises:
        KeyError, TypeError, AttributeError: a predicted call of another shape (its score is `low`).
    """
    if list(gold) == list(predicted):
        return high
    if how == "coarse":
        return low
    names = match([g["name"] for g in gold], [p["name"] for p in predicted], how == "strict")
    score = names + sum(score for _, score in pairs_of(gold, predicted, how))
    return (high - low) * score / most(gold, how) + low


def most(gold: Sequence[dict], how: str) -> float:
    """S_max."""
    return 1.0 + sum(1 if how == "intermediate" else 1 + len(g["parameters"]) for g in gold)


@dataclass(frozen=True, kw_only=True)
class ToolRL:
    """Scorer of tool calls against gold ones."""

    granularity: Literal["fine", "strict", "intermediate", "coarse"] = "fine"
    """What correctness compares (REFINEDREWARD, INTERMEDIATEREWARD, COARSEREWARD)."""
    scale: Literal["three", "one"] = "three"
    """Correctness in [-3, 3], or in [-1, 1] (CORRECTMAX1)."""
    schedule: Literal["none", "two_stage", "smooth"] = "none"
    """How the scale moves with `step` (MAX1STEP30MAX3, SCHEDULEREWARD)."""
    length: Literal["none", "fixed", "scheduled"] = "none"
    """Reward of long thinking: words / 512, or by a divisor that grows (WITHLENGTH, SCHEDULELENGTH)."""
    step: int = 0
    """Training step of the schedules."""
    compat: bool = False
    """The release's format minimum in the smooth schedule."""
    level: Literal["token", "sequence"] = "token"

    columns: ClassVar[Mapping[str, str]] = {"ground_truth": "the gold answer: <think>, <tool_call>, <response> parts"}

    def __post_init__(self) -> None:
        known_values(self)
        if self.step < 0:
            raise ValueError(f"step={self.step} must not be negative; give the training step, from 0")

    def at(self, step: int) -> ToolRL:
        """The reward at another step of the schedules."""
        return replace(self, step=step)

    def bounds(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(lowest, highest) of format, and of correctness."""
        t, high = self.step, 3.0 if self.scale == "three" else 1.0
        if self.schedule == "two_stage":
            return ((0.0, 1.0), (-high / 3, high / 3)) if t < 30 else ((0.0, 0.5), (-high, high))
        if self.schedule == "smooth":
            floor = min(-1.0 if self.compat else 0.0, -2 + 2 * t / 150)
            own = min(3.0, (high - 2) * t / 150 + 2)
            return (floor, max(1.0, 2 - t / 150)), (max(-3.0, (2 - high) * t / 150 - 2), own)
        return (0.0, 1.0), (-high, high)

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]``: format, correctness, and length if it is asked for.

        Raises:
            ValueError: a row without a gold answer, or whose gold calls do not parse.
        """
        return [self._score(trace) for trace in items]

    def _score(self, trace: Trace) -> Credit:
        gold, text = gold_of(trace), trace.raw_text
        form, (low, high) = self.bounds()
        parts = {"format": float(form[format_ok(text, gold)])}
        spans: list[Part] = []
        tags = [m.span() for m in re.finditer(r"</?(?:think|tool_call|response)>", text)] or [(0, len(text))]
        spans += [(*tag, parts["format"] / len(tags)) for tag in tags]
        if OPEN in gold:
            calls = _gold_calls(gold, trace)
            try:
                parts["correctness"] = correctness(calls, parse_calls(text), low, high, self.granularity)
            except _BAD:
                parts["correctness"] = low
                spans.append((max(0, text.find(OPEN)), len(text), low))
            else:
                if self.granularity == "coarse":  # whose lines may be any JSON
                    spans.append((*block(text), parts["correctness"]))
                else:
                    spans += _where(calls, calls_with_spans(text), text, low, high, self.granularity)
        else:
            parts["correctness"] = 0.0
        if self.length != "none":
            thought = thinking(text)
            divisor = 512.0 if self.length == "fixed" else (640 - 384) * self.step / 105 + 384
            parts["length"] = min(1.0, round(len(text[slice(*thought)].split()) / divisor, 2)) if thought else 0.0
            spans += [(*thought, parts["length"])] if thought else []
        at = byte_offsets(text)
        named = {"kind": "reward", "method": "toolrl", "version": 1}
        meta = {"parts": parts, "scale": f"format {form[0]:g} to {form[1]:g}, correctness {low:g} to {high:g}"}
        return laid_out(
            trace, [(at[a], at[b], v) for a, b, v in spans], sum(parts.values()), self.level, meta=meta, **named
        )


def gold_of(trace: Trace) -> str:
    """The gold answer of a trace's row.

    Raises:
        ValueError: there is none.
    """
    known = trace.meta.get("ground_truth", (trace.meta.get("reward_model") or {}).get("ground_truth"))
    if not isinstance(known, str):
        raise ValueError(
            f"row {trace.meta.get('row', '?')} has no column ground_truth, which toolrl compares with; give one"
        )
    return known


def thinking(text: str) -> Span | None:
    """What stands after the last <think>, up to the next </think> (or the end); None where one of them is missing."""
    start = text.rfind("<think>")
    if start < 0 or "</think>" not in text:
        return None
    end = text.find("</think>", start)
    return start + len("<think>"), end if end >= 0 else len(text)


def _gold_calls(gold: str, trace: Trace) -> list[dict[str, Any]]:
    try:
        calls = parse_calls(gold)
        correctness(calls, [], -1, 1)
        return calls
    except _BAD as error:
        raise ValueError(
            f"row {trace.meta.get('row', '?')}: its gold calls do not parse ({error}); mend the row"
        ) from error


def _where(gold: Sequence[dict], found: Sequence[Call], text: str, low: float, high: float, how: str) -> list[Part]:
    """Correctness on spans: each part of S_max from its share of `low` to its share of `high`."""
    predicted = [call.data for call in found]
    end = block(text)[1]
    tail = (min(end, len(text) - 1), min(end + len(CLOSE), len(text)))
    unit = most(gold, how)
    worth = lambda earned, weight=1.0: (low * weight + (high - low) * earned) / unit
    names = match([g["name"] for g in gold], [p["name"] for p in predicted], how == "strict")
    parts: list[Part] = [(*call.name, worth(names) / len(found)) for call in found]
    for g, (taken, score) in zip(gold, pairs_of(gold, predicted, how), strict=True):
        if taken is None:
            parts.append((*tail, worth(0.0, 1.0 if how == "intermediate" else 1.0 + len(g["parameters"]))))
            continue
        call = found[taken]
        if how == "intermediate":
            parts.append((*call.span, worth(score)))
            continue
        closing = (call.span[1] - 1, call.span[1])
        own = call.data["parameters"]
        keys = worth(match(list(g["parameters"]), list(own), how == "strict"))
        parts += [(*span, keys / len(call.keys)) for span in call.keys.values()] or [(*call.name, keys)]
        for key, value in g["parameters"].items():
            parts.append((*call.values.get(key, closing), worth(float(key in own and own[key] == value))))
    return parts
