"""LangGame: multiple-choice questions about how words are spelled, and sums written backwards.

Six kinds (after Sims et al., 2506.01687; the wording is ours): most of a letter, contains letters, starts with, ends
with, longest, shortest. Four options, one right; the answer is a word after a space. Words are split, so that no word
held out is ever an answer in training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("most", "contains", "starts", "ends", "longest", "shortest")
ASKED = {
    "most": (
        "Which word has the most {0}'s?",
        "Where is the letter {0} found most often?",
        "Pick the word with the most {0}'s.",
        "Which of these has {0} more often than the others?",
        "Most {0}'s:",
    ),
    "contains": (
        "Which word contains '{0}'?",
        "Where do you find '{0}'?",
        "Pick the word that has '{0}' in it.",
        "In which word does '{0}' occur?",
        "Has '{0}' in it:",
    ),
    "starts": (
        "Which word starts with '{0}'?",
        "Which begins with '{0}'?",
        "Pick the word whose beginning is '{0}'.",
        "Whose first letters are '{0}'?",
        "Starts with '{0}':",
    ),
    "ends": (
        "Which word ends with '{0}'?",
        "Which ends in '{0}'?",
        "Pick the word whose ending is '{0}'.",
        "Whose last letters are '{0}'?",
        "Ends with '{0}':",
    ),
    "longest": (
        "Which word is the longest?",
        "Which is the longest of these?",
        "Pick the longest word.",
        "Which has the most letters?",
        "Longest:",
    ),
    "shortest": (
        "Which word is the shortest?",
        "Which is the shortest of these?",
        "Pick the shortest word.",
        "Which has the fewest letters?",
        "Shortest:",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question, its four options, and which is right."""

    kind: str
    text: str
    options: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        """The question and its options; the answer follows as ``" word"``."""
        return f"{self.text} [{', '.join(self.options)}] Answer:"

    @property
    def answer(self) -> str:
        """The right word."""
        return self.options[self.right]


def basic_words() -> list[str]:
    """The 850 words of Basic English.

    Raises:
        ValueError: PERTOKEN_DATA is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds corpora/words_basic_850.txt")
    words = (Path(folder) / "corpora" / "words_basic_850.txt").read_text("utf8").split()
    return sorted({w.lower() for w in words if w.isalpha()})


def split_words(words: Sequence[str], held_out: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Words that may be answers in training, and those held out."""
    order = np.random.default_rng([seed, 11]).permutation(len(words))
    cut = round(len(words) * (1 - held_out))
    return [words[i] for i in sorted(order[:cut])], [words[i] for i in sorted(order[cut:])]


def questions(
    n: int,
    answers: Sequence[str],
    others: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> list[Question]:
    """Questions whose right words are of `answers` and whose wrong ones are of `others`.

    Raises:
        ValueError: an unknown kind, or words among which no question of some kind can be found.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds={tuple(kinds)}: choose of {', '.join(KINDS)}")
    rng, out = np.random.default_rng([seed, 12]), []
    for _ in range(n):
        kind = str(rng.choice(list(kinds)))
        found = next(_tries(kind, answers, others, rng), None)
        if found is None:
            raise ValueError(f"{len(answers)} and {len(others)} words hold no question of kind {kind}; give more")
        subject, right, wrong = found
        place = int(rng.integers(4))
        options = (*wrong[:place], right, *wrong[place:])
        out.append(Question(kind, str(rng.choice(ASKED[kind])).format(subject), options, place))
    return out


def _tries(
    kind: str, answers: Sequence[str], others: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Up to 200 draws of (subject, right word, three wrong ones) that fit."""
    for _ in range(200):
        right = str(rng.choice(answers))
        size = int(rng.integers(1, 4))
        if kind == "most":
            subject = str(rng.choice(list(right)))
        elif kind == "contains":
            at = int(rng.integers(0, max(len(right) - size, 0) + 1))
            subject = right[at : at + size]
        else:
            subject = {"starts": right[:size], "ends": right[-size:]}.get(kind, "")
        good, bad = _rule(kind, subject)
        if not good(right):
            continue
        pool = [w for w in others if bad(w) and w != right]
        if len(pool) >= 3:
            yield subject, right, tuple(str(w) for w in rng.choice(pool, 3, replace=False))


def _rule(kind: str, subject: str) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """What makes a word right, and what makes one clearly wrong."""
    if kind == "most":
        return (lambda w: w.count(subject) >= 2), (lambda w: w.count(subject) <= 1)
    if kind == "longest":
        return (lambda w: len(w) >= 7), (lambda w: len(w) <= 4)
    if kind == "shortest":
        return (lambda w: len(w) <= 3), (lambda w: len(w) >= 6)
    has = {
        "contains": lambda w: subject in w,
        "starts": lambda w: w.startswith(subject),
        "ends": lambda w: w.endswith(subject),
    }[kind]
    return has, lambda w: not has(w)


def additions(n: int, digits: int = 3, seed: int = 0) -> list[tuple[str, str]]:
    """``$a+b=`` and the digits of the sum, last one first."""
    pairs = np.random.default_rng([seed, 13]).integers(0, 10**digits, (n, 2)).tolist()
    return [(f"${a}+{b}=", str(a + b)[::-1]) for a, b in pairs]
