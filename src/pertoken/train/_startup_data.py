"""Startup data of cDPO: from many samples a question, what the positive and the negative model learn, and one pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.data import Group
from ..core.examples import Example
from ..core.run import data_key
from ..core.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class StartupData:
    """What `startup_data` chose.

    Attributes:
        positive, negative: one response each, for the two models.
        pairs: (chosen, rejected); the example's scores are 1 and 0.
        counts: what was skipped, by reason, and the yield.
    """

    positive: tuple[Group, ...]
    negative: tuple[Group, ...]
    pairs: tuple[Group, ...]
    counts: dict[str, int]

    def identity(self) -> dict[str, str]:
        """A hash of what the two models learn from: this stands for the data in a run's record."""
        return {"positive": data_key(self.positive, []), "negative": data_key(self.negative, [])}


def startup_data(
    drawn: Sequence[Sequence[Trace]],
    answer: Callable[[str], str],
    truths: Sequence[str],
    *,
    top_p: float = 0.5,
    max_prompt: int = 512,
    max_length: int = 1024,
    seed: int = 0,
) -> StartupData:
    """Choose by the frequency of final answers, as the release does.

    Of each question's samples: a correct one goes to the positive set; wrong ones, one an answer, most frequent answer
    first, to the negative set until `top_p` of the wrong samples is covered, but an answer that occurs once only as the
    very first; the pair is the positive and the most frequent wrong answer's response. Which of an answer's responses
    is taken, and which of equally frequent answers comes first, is drawn by `seed`.

    Args:
        drawn: the samples of each question (the paper: 64).
        answer: text of a response -> its final answer, normalised (so that 1/2 and 0.5 are one), empty if it has none.
        truths: the right answer of each question, normalised alike.
        top_p: share of the wrong samples that the negative set stands for.
        max_prompt, max_length: a pair's prompt, and prompt with either response (terminators left out), must be
            shorter than this many tokens.
        seed: of all choices.

    Raises:
        ValueError: another number of truths than of questions; a truth that is empty; top_p outside of 0 to 1.
    """
    if len(drawn) != len(truths):
        raise ValueError(f"{len(truths)} right answers for {len(drawn)} questions; give one each")
    if not all(truths):
        raise ValueError(f"question {list(map(bool, truths)).index(False)} has no right answer; leave it out")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    positive: list[Group] = []
    negative: list[Group] = []
    pairs: list[Group] = []
    reasons = ("empty answer", "no correct sample", "no wrong sample", "wrong answer left out", "pair too long")
    counts = dict.fromkeys(reasons, 0)
    for question, (samples, truth) in enumerate(zip(drawn, truths, strict=True)):
        rng = np.random.default_rng([seed, question])
        by_answer: dict[str, list[Trace]] = {}
        for i in rng.permutation(len(samples)):
            said = answer(samples[i].text) if samples[i].text.strip() else ""
            if said:
                by_answer.setdefault(said, []).append(samples[i])
            else:
                counts["empty answer"] += 1
        right = by_answer.pop(truth, [])
        ranked = sorted(by_answer.values(), key=len, reverse=True)  # stable: ties as they were drawn
        picked = [traces[rng.integers(len(traces))] for traces in ranked]
        need = math.ceil(top_p * sum(map(len, ranked)))
        for i, (trace, traces) in enumerate(zip(picked, ranked, strict=True)):
            if need > 0 and (i == 0 or len(traces) > 1):
                negative.append(_group("sft", trace, row=question))
                need -= len(traces)
            else:
                counts["wrong answer left out"] += 1
        counts["no correct sample"] += not right
        counts["no wrong sample"] += not ranked
        if right:
            chosen = right[rng.integers(len(right))]
            positive.append(_group("sft", chosen, row=question))
            if ranked:
                sides = (chosen, picked[0])
                if len(chosen.prompt_ids) < max_prompt and max(map(_length, sides)) < max_length:
                    pairs.append(_group("pair", *sides, row=question))
                else:
                    counts["pair too long"] += 1
    counts |= {"questions": len(drawn), "positive": len(positive), "negative": len(negative), "pairs": len(pairs)}
    return StartupData(positive=tuple(positive), negative=tuple(negative), pairs=tuple(pairs), counts=counts)


def sides_of(pairs: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Chosen and rejected responses of pairs as data of one response each: startup data for want of better."""
    positive = [_group("sft", g.traces[0], row=g.example.row, prompt=g.example.prompt) for g in pairs]
    negative = [_group("sft", g.traces[1], row=g.example.row, prompt=g.example.prompt) for g in pairs]
    return positive, negative


def _length(trace: Trace) -> int:
    return len(trace.prompt_ids) + len(trace) - trace.ended


def _group(kind: str, *traces: Trace, row: int, prompt: Any = None) -> Group:
    """Traces of one prompt with their own ids, never encoded again."""
    prompt = prompt or traces[0].meta.get("prompt", traces[0].prompt_text)
    example = Example(
        prompt=prompt,
        responses=tuple(t.text for t in traces),
        kind=kind,
        scores=(1.0, 0.0) if kind == "pair" else None,
        row=row,
    )
    return Group(example=example, prompt_ids=traces[0].prompt_ids, traces=traces)
