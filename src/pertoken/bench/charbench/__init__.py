"""CharBench — questions about the characters of words, and what a tokenizer's cut of the word has to do with errors.

Uzan, Pinter, "CharBench: Evaluating the Role of Tokenization in Character-Level Tasks", AAAI 2026, arXiv 2508.02591.
Four tasks on words of 4 to 10 letters (case counts; places are counted from 0):

    count_unique_chars |set(w)|     count_character_frequency w.count(c)     find_first_occurrence w.index(c)
    find_last_occurrence w.rindex(c)          c uniform over the word's places

A bucket of words a length, cut in four disjoint quarters, one a task; `Random(seed)` shuffles the buckets in order of
length, then draws c row by row. Grading is exact: int(answer) == gold; accuracy counts what could not be read as
wrong, valid_rate says how much that was. Small models are asked by log-likelihood instead: the candidates 0..L
(0..L-1 for places), each with a closing newline, so that "1" does not win as the beginning of "10".

`features` says how a tokenizer cuts the word, `analysis` what correctness has to do with it.

Differs from the authors' code: words are sorted before they are shuffled (there: set order, which changes from run to
run), and a long bucket is cut after that (there before, which of sorted words would leave the first of the alphabet);
short lists are cut in quarters of what there is, and say so (there: an assertion); failures of a model count as errors
(there: dropped); bins without an error are kept.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...core.lm import LM
from ...core.packing import Cost, pack
from ...core.rollout import Sampling, sample
from ...core.stats import Needs, token_stats
from .analysis import Graded, analyse, logistic_slope, over_models
from .features import Cut, features

__all__ = [
    "TASKS",
    "CharBench",
    "Cut",
    "Graded",
    "Question",
    "analyse",
    "buckets",
    "features",
    "grade",
    "logistic_slope",
]
__all__ += ["over_models", "parse", "report"]

TASKS = ("count_unique_chars", "count_character_frequency", "find_first_occurrence", "find_last_occurrence")
_ASKED = {
    TASKS[0]: "How many unique characters appear in the string '{w}'?",
    TASKS[1]: "How many times does the character '{c}' appear in the string '{w}'?",
    TASKS[2]: "What is the index of the first occurrence of the character '{c}' in the string '{w}'?\n"
    "Start counting from 0.",
    TASKS[3]: "What is the index of the last occurrence of the character '{c}' in the string '{w}'?\n"
    "Start counting from 0.",
}
_GOLD: dict[str, Callable[[str, str], int]] = {
    TASKS[0]: lambda w, c: len(set(w)),
    TASKS[1]: str.count,
    TASKS[2]: str.index,
    TASKS[3]: str.rindex,
}
SYSTEM = "You are a helpful assistant."
PROMPT = "{question}\nUpper and lower case letters are different characters. Answer with the final number only."
SHORTEST, LONGEST, FULL = 4, 10, 25_000


@dataclass(frozen=True)
class Question:
    """One question; `character` is None for the first task."""

    question_idx: int
    question: str
    answer: str
    word: str
    character: str | None
    task: str

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """System and user turn."""
        asked = {"role": "user", "content": PROMPT.format(question=self.question)}
        return ({"role": "system", "content": SYSTEM}, asked)

    @property
    def candidates(self) -> list[str]:
        """Answers to choose from by log-likelihood."""
        last = len(self.word) - (self.task in TASKS[2:])
        return [str(i) for i in range(last + 1)]


def buckets(text: str | Iterable[str]) -> dict[int, list[str]]:
    """Unique words (case counts) of 4 to 10 ASCII letters, sorted, by length."""
    found = re.findall(r"\b[a-zA-Z]+\b", text) if isinstance(text, str) else text
    words = sorted({w for w in found if w.isascii() and w.isalpha() and SHORTEST <= len(w) <= LONGEST})
    return {n: [w for w in words if len(w) == n] for n in range(SHORTEST, LONGEST + 1)}


def parse(response: str, how: Literal["strict", "first_integer"] = "strict") -> int | None:
    """The number an answer is: strict, the whole answer as Python reads it; first_integer, its first run of digits.

    Raises:
        ValueError: another `how`.
    """
    if how not in ("strict", "first_integer"):
        raise ValueError(f"how={how!r} is not one of strict, first_integer")
    if how == "first_integer":
        found = re.search(r"[-+]?\d+", response)
        response = found[0] if found else ""
    try:
        return int(response.strip())
    except ValueError:  # no number, or one of more digits than Python reads
        return None


@dataclass(frozen=True, kw_only=True)
class CharBench:
    """Options of CharBench."""

    seed: int = 42
    """Of shuffles and characters."""
    per_cell: int | None = None
    """Most questions of a task and a length; default: a quarter of the bucket, at most 6,250."""
    tasks: tuple[str, ...] = TASKS
    """Which tasks are asked (all are drawn, so that questions do not depend on the choice)."""

    def __post_init__(self) -> None:
        wrong = [t for t in self.tasks if t not in TASKS]
        if wrong or not self.tasks or (self.per_cell is not None and self.per_cell < 1):
            raise ValueError(f"tasks={self.tasks}, per_cell={self.per_cell}: tasks of {', '.join(TASKS)}, 1 or more")

    def items(self, words: str | Iterable[str] | Mapping[int, Sequence[str]]) -> tuple[list[Question], list[str]]:
        """Questions, and what there is to say of the word list.

        Args:
            words: text or words, which are bucketed, sorted and shuffled; or buckets, whose order is kept.

        Raises:
            ValueError: no bucket has four words.
        """
        rng, ready = random.Random(self.seed), isinstance(words, Mapping)
        by_length = {n: list(some) for n, some in (words if ready else buckets(words)).items()}  # type: ignore[union-attr,arg-type]
        told, quarters = [], {}
        for n in sorted(by_length):
            some = by_length[n]
            if not ready:
                rng.shuffle(some)
            size = min(len(some), FULL) // len(TASKS)
            if size < FULL // len(TASKS):
                told.append(f"{len(some)} words of {n} letters: {size} questions a task (the full set has 6,250)")
            size = size if self.per_cell is None else min(size, self.per_cell)
            quarters[n] = [some[k * size : (k + 1) * size] for k in range(len(TASKS))]
        out: list[Question] = []
        for k, task in enumerate(TASKS):
            for n in sorted(quarters):
                for word in quarters[n][k]:
                    c = "" if task == TASKS[0] else rng.choice(word)
                    asked, gold = _ASKED[task].format(w=word, c=c), _GOLD[task](word, c)
                    out.append(Question(len(out), asked, str(gold), word, c or None, task))
        if not out:
            raise ValueError(f"no length from {SHORTEST} to {LONGEST} has four words; give a longer list")
        return [q for q in out if q.task in self.tasks], told

    def generate(self, lm: LM, questions: Sequence[Question], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers of a model."""
        how = Sampling(max_new_tokens=max_new_tokens, temperature=0)
        return [t.text for (t,) in sample(lm, [q.prompt for q in questions], 1, how)]

    @torch.no_grad()
    def choose(self, lm: LM, questions: Sequence[Question], prompts: Sequence[Any] | None = None) -> list[str]:
        """The likeliest candidate of each question: sum of log-probs of the number and a newline.

        Args:
            prompts: what is asked instead of `Question.prompt`.
        """
        asked = list(prompts) if prompts is not None else [q.prompt for q in questions]
        out = []
        for start in range(0, len(questions), 64):  # masks of packed rows are dense, so a few questions at a time
            some = questions[start : start + 64]
            groups = [
                [lm.trace(p, f"{c}\n", ended=False) for c in q.candidates]
                for q, p in zip(some, asked[start : start + 64], strict=True)
            ]
            scores: list[dict[int, float]] = [{} for _ in some]
            for packed in pack(groups, cost=Cost.of(lm.causal), max_tokens=1024):
                stats = token_stats({"policy": lm}, packed, Needs({"policy": frozenset({"logp"})}))["policy"]
                for (g, k), value in zip(packed.order, stats.sums().tolist(), strict=True):
                    scores[g][k] = value
            out += [q.candidates[max(s, key=s.__getitem__)] for q, s in zip(some, scores, strict=True)]
        return out


def grade(questions: Sequence[Question], responses: Sequence[str | None], how: Any = "strict") -> list[Graded]:
    """Exact grades; a response that is None (the model failed) is wrong and invalid.

    Raises:
        ValueError: not one response a question.
    """
    if len(questions) != len(responses):
        raise ValueError(f"{len(responses)} responses to {len(questions)} questions; give one each (None: it failed)")
    parsed = [None if r is None else parse(r, how) for r in responses]
    return [
        Graded(q.question_idx, q.task, q.word, q.character, int(q.answer), p)
        for q, p in zip(questions, parsed, strict=True)
    ]


def report(graded: Sequence[Graded]) -> dict[str, dict[str, float]]:
    """Of each task, and of all: accuracy, valid_rate, n."""
    out = {}
    for task in (*dict.fromkeys(g.task for g in graded), "all"):
        some = [g for g in graded if task in ("all", g.task)]
        n = len(some)
        right, valid = sum(g.correct for g in some), sum(g.prediction is not None for g in some)
        out[task] = {"accuracy": right / n, "valid_rate": valid / n, "n": float(n)} if n else {"n": 0.0}
    return out
