"""VADER: sentiment by lexicon and rules, as token credit. Hutto and Gilbert, ICWSM 2014 (package vaderSentiment, MIT).

The sequence reward is VADER's compound score, and the credit of the tokens sums to it:

    s = sum_i v_i + sign(sum_i v_i) e        compound = s / sqrt(s^2 + alpha),  alpha = 15
    credit of word i = v_i / sqrt(s^2 + alpha)

v_i is the valence of word i (about -5 to 5) after VADER's own rules (boosters, negation, capitals, idioms, "but"), 0
for a word outside of the lexicon; e >= 0 is the emphasis of exclamation and question marks, and stands on those marks.
The denominator is never zero, so opposite words that cancel keep their credit. A negation changes the credit of the
word it negates and gets none itself. Within a word (or an emoji, read by its description) tokens share by bytes.

Unit: compound, in [-1, 1]. Offsets are bytes of the text in UTF-8, where a byte that belongs to no character may be
carried as a surrogate escape (`bytes.decode("utf-8", "surrogateescape")`).
Differs from the authors' code: the compound is not rounded to four decimals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from pertoken.core.credit import Credit, on_spans
from pertoken.core.trace import Trace

ALPHA = 15.0
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Vader:
    """Scorer of English text by VADER: one reward credit a trace.

    Words that lie on tokens the policy did not emit (tool outputs) are read as context but earn nothing.
    """

    level: str = "token"  # "token": spread over words; "sequence": the whole compound on the last token
    label_only: bool = False  # +1 / -1 on tokens of positive / negative lexicon words (raw sign) instead of shares

    def __post_init__(self):
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level={self.level!r} is not one of token, sequence")
        if self.label_only and self.level == "sequence":
            raise ValueError("label_only marks single tokens; use it with level='token'")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward over the completion of each trace.

        Returns:
            One credit a trace, in order; its sum is the compound (with `label_only`: a count of labels). ``meta`` holds
            the ``compound``, its named ``parts`` (words, punctuation) and the ``scale``.
        """
        return [self._score(trace) for trace in items]

    def _score(self, trace: Trace) -> Credit:
        text = b"".join(trace.completion_pieces).decode("utf-8", "surrogateescape")
        words, marks = shares(text)
        of_words, of_marks = (on_spans(trace, part) * trace.mask for part in (words, marks))
        values = of_words + of_marks
        parts = {"words": float(of_words.sum()), "punctuation": float(of_marks.sum())}
        total = float(values.sum())
        meta: dict[str, Any] = {"compound": total, "parts": parts, "scale": "compound in [-1, 1]"}
        named = {"kind": "reward", "method": "vader", "version": 1, "meta": meta}
        if self.level == "sequence":
            return Credit.of_sequence(trace, total, **named)
        if self.label_only:
            values = np.sign(on_spans(trace, lexicon_labels(text))) * trace.mask
        return Credit(trace=trace, values=values, **named)


def compound(text: str) -> float:
    """VADER's compound score of a text, in [-1, 1], unrounded; 0 for a text without lexicon words."""
    return sum((share for part in shares(text) for *_, share in part), 0.0)


def lexicon_labels(text: str) -> list[tuple[int, int, int]]:
    """Byte span and raw sign of every lexicon word of a text: ground truth that no rule has touched.

    Args:
        text: any text.

    Returns:
        (start, end, +1 or -1) in reading order. Signs are the lexicon's own: "good" is +1 in "not good" too. Boosters
        ("very") are no lexicon words, as in VADER; an emoji takes the sign of its description's summed valence.
    """
    lexicon, boosters = _analyzer().lexicon, _package().BOOSTER_DICT
    valence: dict[Span, float] = {}
    for span, word in _words(*_expand(text)):
        if word.lower() in lexicon and word.lower() not in boosters:
            valence[span] = valence.get(span, 0.0) + lexicon[word.lower()]
    return [(*span, 1 if v > 0 else -1) for span, v in valence.items() if v]


def shares(text: str) -> tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]:
    """The compound score taken apart.

    Args:
        text: any text.

    Returns:
        (start, end, share) of every word with a valence, and of every mark that adds emphasis; spans in bytes. All
        shares together sum to `compound(text)`.
    """
    expanded, origin = _expand(text)
    words = _words(expanded, origin)
    valences = _valences(expanded, [word for _, word in words])
    bare = float(sum(valences))
    direction = (bare > 0) - (bare < 0)
    # The amplifiers are private in the package, as is "but" below: its public face gives rounded totals only.
    emphasis = {"!": _analyzer()._amplify_ep(expanded), "?": _analyzer()._amplify_qm(expanded)}
    total = bare + direction * sum(emphasis.values())
    size = (total * total + ALPHA) ** 0.5
    marks = [(char, origin[i]) for i, char in enumerate(expanded) if char in emphasis and emphasis[char] and direction]
    return (
        [(*span, v / size) for (span, _), v in zip(words, valences, strict=True) if v],
        [(*span, direction * emphasis[char] / expanded.count(char) / size) for char, span in marks],
    )


@lru_cache(maxsize=1)
def _package() -> ModuleType:
    try:
        from vaderSentiment import vaderSentiment
    except ImportError as error:
        raise ImportError("VADER needs the package vaderSentiment: pip install 'pertoken[sentiment]'") from error
    return vaderSentiment


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    return _package().SentimentIntensityAnalyzer()


def _expand(text: str) -> tuple[str, list[Span]]:
    """The text as VADER reads it (emojis as their descriptions) and the byte span each of its characters stands for."""
    emojis = _analyzer().emojis
    said, origin, at, after_blank = [], [], 0, True
    for char in text:
        size = 1 if "\udc80" <= char <= "\udcff" else len(char.encode("utf-8", "surrogatepass"))
        description = emojis.get(char)
        reading = char if description is None else description if after_blank else " " + description
        said.append(reading)
        origin += [(at, at + size)] * len(reading)
        after_blank = description is None and char == " "
        at += size
    return "".join(said), origin


def _words(expanded: str, origin: list[Span]) -> list[tuple[Span, str]]:
    """VADER's words, stripped of punctuation as it does, with their byte spans in the original text."""
    strip = _package().SentiText._strip_punc_if_word
    out = []
    for match in re.finditer(r"\S+", expanded):  # the same white space as str.split
        word = strip(match.group())
        start = match.start() + match.group().index(word)
        covered = origin[start : start + len(word)]
        out.append(((covered[0][0], covered[-1][1]), word))
    return out


def _valences(expanded: str, words: list[str]) -> list[float]:
    """The loop of the package's `polarity_scores`, which keeps the words' valences to itself."""
    analyzer, boosters = _analyzer(), _package().BOOSTER_DICT
    sentiments: list[float] = []
    context = _package().SentiText(expanded)
    for i, word in enumerate(words):
        if word.lower() in boosters or [w.lower() for w in words[i : i + 2]] == ["kind", "of"]:
            sentiments.append(0.0)
        else:
            sentiments = analyzer.sentiment_valence(0.0, context, word, i, sentiments)
    return analyzer._but_check(words, sentiments)
