"""TL-Training's reward on real calls with one planted mistake each: is it named, and does it cost where it stands?

BFCL's questions with their functions (in the folder that PERTOKEN_DATA names): all rows whose right answer is one call
of a listed function, name and parameters being Python names; of the accepted values the first, if it is not empty. Each
call is written in six ways: right; another value for the first parameter; without the first parameter; with one of the
function's parameters that the gold call leaves out; with a parameter that the function does not have; with a name that
no function has. Where a call has no room for one (no parameter, none left out), it is left out; the calls are counted.

The specification's bound (accuracy on key tokens) belongs to the training objective `tl-training`; this has none. What
is printed is the share of planted mistakes that get the reward of their kind, by `ast` and, beside it, by the
release's regular expressions, which see single-quoted values only.

    python examples/tl_training_reward.py            seconds
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pertoken.core.trace import Trace
from pertoken.results import save_result
from pertoken.score.tl_training_reward import TLTrainingReward, tools_of

EXPECTED = {"right": 1.0, "value": -0.25, "missing": -0.5, "redundant": -0.5, "hallucinated": -0.8, "unknown": -2.0}
Row = tuple[str, dict[str, Any], dict[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    save: bool = False
    """Write results/tl-training-reward.json."""


def read() -> list[Row]:
    """Name and values of the right call, and the tools, of each row.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds tool_calls/bfcl.jsonl.gz")
    with gzip.open(Path(folder) / "tool_calls" / "bfcl.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    out: list[Row] = []
    for row in rows:
        if len(row["ground_truth"] or []) != 1:
            continue
        tools = tools_of(row["functions"])
        ((name, accepted),) = row["ground_truth"][0].items()
        values = {k: v[0] for k, v in accepted.items() if v and v[0] != ""}
        words = [*name.split("."), *values]
        if name in tools and set(values) <= set(tools[name]) and all(word.isidentifier() for word in words):
            out.append((name, values, tools))
    return out


def said(name: str, values: dict[str, Any]) -> str:
    """A call as the model writes it."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


def planted(name: str, values: dict[str, Any], tools: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(kind, call) of each mistake that the call has room for."""
    yield "right", said(name, values)
    for first in list(values)[:1]:
        yield "value", said(name, values | {first: "ZZZ"})
        yield "missing", said(name, {k: v for k, v in values.items() if k != first})
    for left in [p for p in tools[name] if p not in values and p.isidentifier()][:1]:
        yield "redundant", said(name, values | {left: "x"})
    yield "hallucinated", said(name, values | {"no_such_parameter": "x"})
    yield "unknown", said(name + "x", values)


def reward(scorer: TLTrainingReward, text: str, gold: str, tools: dict[str, list[str]]) -> float:
    """The reward of a text, one token a byte."""
    data = text.encode()
    trace = Trace(
        prompt_ids=(),
        prompt_pieces=(),
        completion_ids=tuple(data),
        completion_pieces=tuple(bytes([b]) for b in data),
        tokenizer="bytes",
        meta={"gold_call": gold, "tools": tools},
    )
    return scorer.score([trace])[0].reduce()


def main(options: Options) -> None:
    """Run it and print the table."""
    rows = read()
    hits: dict[str, dict[str, list[bool]]] = {}
    for parser in ("ast", "regex"):
        scorer = TLTrainingReward(parser=parser)
        for name, values, tools in rows:
            for kind, text in planted(name, values, tools):
                right = abs(reward(scorer, text, said(name, values), tools) - EXPECTED[kind]) < 1e-9
                hits.setdefault(kind, {}).setdefault(parser, []).append(right)
    print(f"{len(rows)} real calls; share with the reward of what was planted")
    print(f"{'planted':<14}{'reward':>8}{'ast':>8}{'regex':>8}{'calls':>8}")
    for kind, by in hits.items():
        print(f"{kind:<14}{EXPECTED[kind]:8.2f}{np.mean(by['ast']):8.3f}{np.mean(by['regex']):8.3f}{len(by['ast']):8}")
    shares = {p: float(np.mean([x for by in hits.values() for x in by[p]])) for p in ("ast", "regex")}
    print(f"all: ast {shares['ast']:.3f}, regex {shares['regex']:.3f}")
    if options.save:
        save_result(
            "tl-training-reward",
            metric="share of calls that get the reward of the mistake planted in them",
            value=shares["ast"],
            interval=None,
            baseline="the release's regular expressions",
            baseline_value=shares["regex"],
            bound="",
            reached=None,
            world=f"{len(rows)} real calls of BFCL, one planted mistake each",
            seeds=[],
            notes="Deterministic. The specification's bound belongs to the training objective tl-training.",
            rows=[
                {
                    "metric": f"the same, planted: {kind}",
                    "value": float(np.mean(by["ast"])),
                    "baseline": "the release's regular expressions",
                    "baseline_value": float(np.mean(by["regex"])),
                }
                for kind, by in hits.items()
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
