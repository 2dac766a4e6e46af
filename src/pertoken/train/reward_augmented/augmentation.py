"""The doubling of scored pairs, its undoing, and its export. No model, and no row is changed in place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...core.examples import PINNED, DataReport, Example, Refused, Text
from .goals import Goal, Score, number, turns_of

MISSING = -100.0  # what the release's preprocessing writes where there is no score
RECORD = "augmented"  # key of Example.extra: the goal of a row, and what undoing it needs


def augment(
    examples: Sequence[Example],
    goal: Goal | None = None,
    *,
    order: str = "interleaved",
    tie: str = "drop",
    disagreement: str = "score",
    aspects: Sequence[str] = (),
    required: bool = True,
) -> tuple[list[Example], DataReport]:
    """Every scored pair as two rows, each under the score of one of its responses as goal.

    Under goal g the preferred response is the one with the larger -(r - g)^2, so the chosen of goal r_w is y_w and that
    of goal r_l is y_l. Scores and aspect scores are exchanged with the responses.

    Args:
        examples: pairs with `scores` (or with the `aspects`). They are not changed.
        goal: how the goal is said; ``place="auto"`` is a system turn here, where no model is known.
        order: ``interleaved`` (pair i gives rows 2i with g = r_w and 2i + 1 with g = r_l), or ``blocks`` (the
            release's: all rows with g = r_w, then all with g = r_l).
        tie: what is done to equal scores, whose two rows contradict each other: ``drop`` or ``keep``.
        disagreement: what is done to r_l > r_w: ``score`` (the score decides, the label is not looked at) or ``drop``.
        aspects: condition on these aspect scores together instead of the overall one.
        required: False for held-out data, of which nothing may be left.

    Returns:
        The rows, and the report: refused are rows without a score (missing, not finite, -100), skipped those that
        `tie` and `disagreement` drop; pairs kept against their label are noted. It counts pairs, not rows.

    Raises:
        ValueError: a score outside the scale; a row that has a goal already or is no pair; if `required`, all scores
            equal, or no row left.
    """
    choices = {"order": order, "tie": tie, "disagreement": disagreement, "aspects": aspects}
    planned, report = plan(examples, goal or Goal(), required=required, **choices)
    return [row for _, row in planned], report


def plan(
    examples: Sequence[Example],
    goal: Goal,
    *,
    order: str,
    tie: str,
    disagreement: str,
    aspects: Sequence[str],
    required: bool = True,
) -> tuple[list[tuple[int, Example]], DataReport]:
    """`augment`, with the index of the pair that each row was made of."""
    choices = (("order", order, ("interleaved", "blocks")), ("tie", tie, ("drop", "keep")))
    for name, value, known in (*choices, ("disagreement", disagreement, ("score", "drop"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    report, pairs, seen = DataReport(), [], set()
    for i, example in enumerate(examples):
        if example.kind != "pair":
            raise ValueError(
                f"row {example.row} is of kind {example.kind}; give pairs with score_chosen, score_rejected"
            )
        if RECORD in example.extra or goal.stands_in(example.prompt):
            raise ValueError(f"row {example.row} has a goal already; augment once, or take it out with strip first")
        try:
            high, low = (_scores(example, k, goal, aspects) for k in (0, 1))
        except Refused as reason:
            report.refuse(str(reason), example.row)
            continue
        seen |= {high, low}
        if high == low and tie == "drop":
            report.skipped.setdefault("equal scores", []).append(example.row)
        elif _mean(low) > _mean(high) and disagreement == "drop":
            report.skipped.setdefault("the rejected response has the higher score", []).append(example.row)
        else:
            if _mean(low) > _mean(high):
                reason = "the rejected response has the higher score, which is followed, not the label"
                report.noted.setdefault(reason, []).append(example.row)
            pairs.append((i, high, low))
    report.kept = len(pairs)
    if required and len(seen) == 1:
        raise ValueError(f"all scores are {seen.pop()}: no goal tells one response from another; give graded scores")
    if required:
        report.some_kept("the data to augment")
    rows = [(i, g, flipped) for i, high, low in pairs for g, flipped in ((high, False), (low, True))]
    rows = rows[::2] + rows[1::2] if order == "blocks" else rows
    return [(i, _row(examples[i], g, flipped, goal, aspects)) for i, g, flipped in rows], report


def _scores(example: Example, k: int, goal: Goal, aspects: Sequence[str]) -> Score:
    """What response k was scored, rounded as the goal says it."""
    if any(a not in example.aspects for a in aspects) or not (aspects or example.scores):
        raise Refused("without scores")
    values = [example.aspects[a][k] for a in aspects] or [(example.scores or ())[k]]
    for value in values:
        if not math.isfinite(value):
            raise Refused("a score is not finite")
        if not goal.low <= value <= goal.high:
            if value == MISSING:
                raise Refused("a score is -100, the mark of a missing one")
            raise ValueError(
                f"row {example.row} is scored {number(value)}, outside of {number(goal.low)} to {number(goal.high)}; "
                "map the scores to the scale, or say theirs with low and high"
            )
    rounded = tuple(float(v) if goal.decimals is None else round(float(v), goal.decimals) for v in values)
    return rounded if aspects else rounded[0]


def _mean(score: Score) -> float:
    return float(np.mean(score))


def _row(example: Example, score: Score, flipped: bool, goal: Goal, aspects: Sequence[str]) -> Example:
    said = goal.say(score, aspects)
    prompt, pinned = goal.put(example.prompt, said, "system" if goal.place == "auto" else goal.place)
    record = {
        "goal": list(score) if isinstance(score, tuple) else score,
        "flipped": flipped,
        "said": said,
        "separator": goal.separator,
        "text": isinstance(example.prompt, str),
    }
    return _turned(example, prompt, flipped, {**example.extra, PINNED: pinned, RECORD: record})


def _turned(example: Example, prompt: Text, flipped: bool, extra: Mapping[str, Any]) -> Example:
    turn = (lambda pair: tuple(pair)[::-1]) if flipped else tuple
    return dataclasses.replace(
        example,
        prompt=prompt,
        responses=turn(example.responses),
        scores=example.scores and turn(example.scores),
        aspects={name: turn(values) for name, values in example.aspects.items()},
        extra=extra,
    )


def strip(rows: Sequence[Example]) -> list[Example]:
    """Augmented rows without their goals, flips undone: each pair as it was, once a row.

    Raises:
        ValueError: a row that `augment` did not make.
    """
    out = []
    for row in rows:
        record = row.extra.get(RECORD)
        if not isinstance(record, Mapping):
            raise ValueError(f"row {row.row} has no goal to take out; give rows that augment made")
        front, prompt = record["said"] + record["separator"], []
        for m in turns_of(row.prompt):
            ours = bool(front) and m["role"] in ("system", "user") and m["content"].startswith(record["said"])
            if not ours or m["content"] != record["said"] or m["role"] == "user":  # a system turn of our own goes
                prompt.append(m | {"content": m["content"].removeprefix(front)} if ours else m)
            front = "" if ours else front  # one goal, once
        extra = {k: v for k, v in row.extra.items() if k not in (PINNED, RECORD)}
        out.append(_turned(row, prompt[0]["content"] if record["text"] else tuple(prompt), record["flipped"], extra))
    return out


def to_trl(rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Pairs in TRL's conversational preference format (prompt, chosen, rejected as messages), JSON values only; scores,
    goal and the text that must not be cut are further columns. ``datasets.Dataset.from_list`` takes it."""
    out = []
    for row in rows:
        chosen, rejected = (
            [{"role": "assistant", "content": r}] if isinstance(r, str) else [dict(m) for m in r] for r in row.responses
        )
        line: dict[str, Any] = {
            "prompt": [dict(m) for m in turns_of(row.prompt)],
            "chosen": chosen,
            "rejected": rejected,
        }
        if row.scores:
            line |= dict(zip(("score_chosen", "score_rejected"), row.scores, strict=True))
        line |= {key: row.extra[key] for key in (PINNED, RECORD) if key in row.extra}
        out.append(line)
    return out
