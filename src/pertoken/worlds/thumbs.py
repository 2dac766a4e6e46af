"""Thumbs up and thumbs down that come from different prompts: unpaired labels, in the language of any world.

Prompts are of two kinds that a sentence encoder can tell apart. Most thumbs up were given to prompts of the one kind,
most thumbs down to the other, and there are several times as many thumbs up; whether a response earned one is its
score's sign, whatever the kind. Who learns from such a log may take the kind for the quality.

`grammar_source` is the 64-word sentiment language, where a response often names its prompt's thing and other
things beside it: things met outdoors, and things found indoors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.data import Example, Group
from ..core.lm import LM, load
from ..core.rollout import Sampling, sample
from ..core.trace import Trace
from .experiment import group_of
from .grammar import GRAMMARS, prompts, train_lm

OUTDOORS = frozenset("cat dog boat car kite".split())


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where responses come from and what they are worth.

    Attributes:
        lm: writes them. ask: a prompt's words -> what the model is asked (text or messages).
        score: text -> reward; its sign is the thumb, 0 is none.
        kind: whether a prompt is of the first kind, which most thumbs up were given to.
        sampling, samples: how, and how many a prompt.
    """

    lm: LM
    score: Callable[[str], float]
    kind: Callable[[str], bool]
    ask: Callable[[str], Any] = lambda prompt: prompt
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=40))
    samples: int = 4

    def __call__(self, asked: Sequence[str], seed: int) -> list[tuple[str, float, Trace]]:
        """(prompt, score, response) of all samples that earn a thumb."""
        drawn = sample(self.lm, [self.ask(p) for p in asked], self.samples, self.sampling, seed=seed, batch=512)
        scored = [(p, self.score(t.text), t) for p, ts in zip(asked, drawn, strict=True) for t in ts if t.text.strip()]
        return [one for one in scored if one[1]]


def shifted_thumbs(
    source: Source, asked: Sequence[str], *, up: int, down: int, mostly: float = 0.9, seed: int = 0
) -> list[Group]:
    """Sample the log of a seed: unpaired groups, up and down mixed.

    Args:
        source: the model and the reward. asked: prompts, used again and again.
        up, down: rows of each label.
        mostly: share of the thumbs up that the first kind of prompts has, and of the thumbs down that the second has.

    Raises:
        ValueError: the samples do not give as many rows as were asked for.
    """
    drawn = source([asked[i % len(asked)] for i in range(up + down)], 1 + seed)
    order, rows = np.random.default_rng(seed).permutation(len(drawn)), []
    for label, wanted in ((True, up), (False, down)):
        first = round(wanted * (mostly if label else 1 - mostly))
        for kind, n in ((True, first), (False, wanted - first)):
            some = [drawn[i] for i in order if (drawn[i][1] > 0) == label and source.kind(drawn[i][0]) == kind][:n]
            if len(some) < n:
                raise ValueError(f"{len(some)} of {n} rows of a kind and label; ask for fewer, or give more prompts")
            rows += [(prompt, label, trace) for prompt, _, trace in some]
    return [_row(*rows[i], row) for row, i in enumerate(np.random.default_rng(seed).permutation(len(rows)))]


def split_prompts(asked: dict[str, list[str]]) -> dict[str, list[str]]:
    """``train`` less every fifth prompt, which are ``validation``, and ``test``."""
    kept = [p for i, p in enumerate(asked["train"]) if i % 5]
    return {"train": kept, "validation": asked["train"][::5], "test": asked["test"]}


def grammar_lm(progress: bool = True) -> LM:
    """The language model of the 64-word sentiment language: start and reference."""
    return load(str(train_lm(GRAMMARS["lexicon64"], seed=0, progress=progress)), device="cpu", attention="sdpa")


def grammar_source(progress: bool = True) -> tuple[Source, dict[str, list[str]]]:
    """That language as a source, and its prompts of each split; the first kind is outdoors."""
    grammar = GRAMMARS["lexicon64"]
    outdoors = lambda prompt: bool(OUTDOORS & set(prompt.split()))
    return Source(lm=grammar_lm(progress), score=grammar.score, kind=outdoors), split_prompts(prompts(grammar))


def _row(prompt: str, label: bool, trace: Trace, row: int) -> Group:
    example = Example(prompt=prompt, responses=(trace.text,), kind="unpaired", label=label, row=row, source="thumbs")
    return Group(example=example, prompt_ids=trace.prompt_ids, traces=(trace,))


def same_prompt_pairs(source: Source, asked: Sequence[str], n: int, seed: int = 10**6) -> list[Group]:
    """n pairs to evaluate with, the first half on prompts of the first kind: the first good and the first bad one of a
    prompt's samples.

    Raises:
        ValueError: the samples do not give as many pairs as were asked for.
    """
    groups: dict[bool, list[Group]] = {True: [], False: []}
    for turn in range(16):
        by_prompt: dict[str, list[tuple[float, Trace]]] = {}
        for prompt, score, trace in source(asked, seed + turn):
            by_prompt.setdefault(prompt, []).append((score, trace))
        for prompt, some in by_prompt.items():
            good, bad = ([one for one in some if (one[0] > 0) == label] for label in (True, False))
            side = groups[source.kind(prompt)]
            if good and bad and len(side) < n // 2:
                (high, best), (low, worst) = good[0], bad[0]
                side.append(group_of(best, worst, prompt, (high, low), len(side), "thumbs"))
        if all(len(side) >= n // 2 for side in groups.values()):
            return groups[True] + groups[False]
    raise ValueError(f"the samples give fewer than {n} pairs of both kinds; ask for fewer, or give more prompts")
