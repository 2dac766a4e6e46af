"""Who writes critiques: a rule, the row of the data (a person), a language model, or any callable; and what a language
model learns from to write them.

An annotator is (prompt, response) -> critique: JSON text, JSON data, a `Written`, or a `core.credit.Critique` whose
spans are bytes of the response.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pertoken.core.credit import Critique
from pertoken.core.data import Example
from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling, sample

from .critique import Quote, Written, of_object, parse
from .spans import occurrences

Annotator = Callable[[str, str], Any]
INSTRUCTION = (
    "Judge the response below. Think about what it does well and what it does badly. Then answer with one JSON object: "
    '"textual_feedback" (one paragraph), "good_spans" and "poor_spans" (lists of {count} copied word for word from the '
    "response).\n\nInput:\n{prompt}\n\nResponse:\n{response}"
)
PROMPT_TOKENS, TOTAL_TOKENS = 900, 1400  # of the reward model, as the release trains it
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def instruction(prompt: str, response: str, most: int | None = None) -> str:
    """What a language model is asked; `most` bounds the phrases of either list (summaries: 2)."""
    count = "phrases" if most is None else f"at most {most} phrases each,"
    return INSTRUCTION.replace("{count}", count).replace("{prompt}", prompt).replace("{response}", response)


def as_written(said: Any) -> Written | Critique:
    """What an annotator gave, read."""
    if isinstance(said, (Critique, Written)):
        return said
    return parse(said) if isinstance(said, str) else of_object(said)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An annotator by phrases: it quotes every one that the response says as whole words, whatever their case."""

    lexicon: str = "vader"
    """``vader`` (words with a positive or negative valence; package vaderSentiment) or empty."""
    good: tuple[str, ...] = ()
    """Encouraged phrases."""
    poor: tuple[str, ...] = ()
    """Forbidden phrases."""

    def __post_init__(self) -> None:
        if self.lexicon not in ("", "vader"):
            raise ValueError(f"lexicon={self.lexicon!r} is not one of vader, or empty")

    def __call__(self, prompt: str, response: str) -> Written:
        """The critique of a response; the prompt is not looked at."""
        sides: tuple[list[Quote], list[Quote]] = ([], [])
        for start, end, sign in self.spans(response):
            phrase = response[start:end]
            where, _ = occurrences(phrase, response)
            if (start, end) in where:  # not half of a composed character, nor inside a word where it is one elsewhere
                sides[sign < 0].append(Quote(phrase, where.index((start, end)) or None))
        good, poor = ([f'"{q.text}"' for q in side] for side in sides)
        said = [f"{', '.join(q)} {verdict}." for q, verdict in ((good, "is good"), (poor, "is poor")) if q]
        return Written(" ".join(said) or "Nothing stands out.", *map(tuple, sides))

    def spans(self, response: str) -> list[tuple[int, int, int]]:
        """(start, end, +1 or -1) in characters, in reading order; of spans that overlap the longest, then first."""
        known = _vader() if self.lexicon else {}
        found = [(*m.span(), known[m.group().lower()]) for m in _WORD.finditer(response) if m.group().lower() in known]
        for phrases, sign in ((self.good, 1), (self.poor, -1)):
            for phrase in filter(None, map(str.strip, phrases)):
                edges = [r"(?<!\w)" if phrase[0].isalnum() else "", r"(?!\w)" if phrase[-1].isalnum() else ""]
                if not phrase.isascii():  # scripts without spaces between words
                    edges = ["", ""]
                pattern = edges[0] + re.escape(phrase) + edges[1]
                found += [(*m.span(), sign) for m in re.finditer(pattern, response, re.IGNORECASE)]
        taken: list[tuple[int, int, int]] = []
        for span in sorted(found, key=lambda s: (s[0] - s[1], s[0])):
            if all(span[1] <= other[0] or other[1] <= span[0] for other in taken):
                taken.append(span)
        return sorted(taken)


@lru_cache(maxsize=1)
def _vader() -> Mapping[str, int]:
    try:
        from vaderSentiment import vaderSentiment
    except ImportError as error:
        raise ImportError("this lexicon needs vaderSentiment: pip install 'pertoken[sentiment]'") from error
    lexicon = vaderSentiment.SentimentIntensityAnalyzer().lexicon
    return {word: 1 if valence > 0 else -1 for word, valence in lexicon.items() if valence}


@dataclass(frozen=True)
class Writer:
    """A language model as an annotator: asked for the JSON, its answer is read whatever it is."""

    lm: LM
    sampling: Sampling
    most: int | None = None

    def ask(self, pairs: Iterable[tuple[str, str]]) -> list[str | None]:
        """Its answer for each (prompt, response); None where the question is longer than a prompt may be."""
        limit = min(PROMPT_TOKENS, self.lm.context - 1)
        asked = [self.lm.encode_prompt(instruction(*pair, self.most)) for pair in pairs]
        short = [ids for ids in asked if len(ids) <= limit]
        drawn = iter(sample(self.lm, short, 1, self.sampling) if short else [])
        return [next(drawn)[0].text if len(ids) <= limit else None for ids in asked]

    def __call__(self, prompt: str, response: str) -> str | None:
        """Its answer for one."""
        return self.ask([(prompt, response)])[0]


def training_examples(
    pairs: Iterable[tuple[str, str]], annotator: Annotator, lm: LM | None = None, most: int | None = None
) -> tuple[list[Example], dict[str, int]]:
    """What `sft` trains a reward model on: the question as prompt, the critique's JSON as response.

    Args:
        pairs: (prompt, response). annotator: who is to be imitated.
        lm: whose tokens the release's limits count (900 of the question, 1400 in all); None: no limit.
        most: as `instruction`; longer lists are left out.

    Returns:
        Examples of kind ``sft``; and how many were ``kept``, or left out: ``malformed``, ``too_many`` phrases,
        ``unfaithful`` (a phrase that the response does not say), ``too_long``.
    """
    out: list[Example] = []
    counts: Counter[str] = Counter(kept=0)
    for row, (prompt, response) in enumerate(pairs):
        written = as_written(annotator(prompt, response))
        if isinstance(written, Critique):
            raise ValueError("byte spans are no quotes; give an annotator that writes the JSON text (or a Written)")
        question, answer = instruction(prompt, response, most), written.to_json()
        quotes = [*written.good, *written.poor]
        why = "malformed" if written.malformed else ""
        if most is not None and max(len(written.good), len(written.poor)) > most:
            why = why or "too_many"
        if not all(occurrences(q.text, response)[0] for q in quotes):
            why = why or "unfaithful"
        if lm is not None and not why:
            asked, said = len(lm.encode_prompt(question)), len(lm.encode_completion(answer)[0])
            why = "too_long" if asked > PROMPT_TOKENS or asked + said > TOTAL_TOKENS else ""
        counts[why or "kept"] += 1
        if not why:
            out.append(Example(prompt=question, responses=(answer,), kind="sft", row=row))
    return out, dict(counts)
