"""Quoted phrases to characters of a response, and characters to token scores.

A phrase is looked for as it is; then without case, punctuation and runs of white space; then by rapidfuzz (the best
window of the same normalised text, `partial_ratio` of at least 90). Text is read in NFC, and every position leads back
to the characters it came from, so that offsets are those of the response as its tokens say it.

A token has the score of the span that covers its first character that is neither white space nor punctuation; a token
without such a character has 0. So "good", "good!" and '"good' score the same tokens, however quotes and full stops are
cut from words. Scores never depend on white-space words: CJK and emoji are matched by characters.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pertoken.core.credit import Critique
from pertoken.core.trace import Trace

from .critique import Quote, Written

Span = tuple[int, int]
ESCAPE = "surrogateescape"  # a byte that forms no character keeps its place


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How phrases are found."""

    occurrence: str = "first"
    """Which occurrence of a phrase is meant, where the critique does not say: first or all."""
    overlap: str = "first"
    """Who keeps a character that two spans cover: the one listed first (good ones come first), or the poor one."""
    fuzzy: float | None = 90.0
    """Least partial ratio (0 to 100) of a phrase that is found in neither form; None: such phrases are unmatched."""

    def __post_init__(self) -> None:
        if self.occurrence not in ("first", "all") or self.overlap not in ("first", "poor"):
            raise ValueError(f"{self}: occurrence is first or all, overlap is first or poor")
        if self.fuzzy is not None and not 0 < self.fuzzy <= 100:
            raise ValueError(f"fuzzy={self.fuzzy} is a ratio above 0 and at most 100 (or None)")


@dataclass(frozen=True)
class Reading:
    """A text in a normal form, and the characters of the original that each of its characters stands for."""

    text: str
    origin: tuple[Span, ...]

    def find(self, phrase: str) -> list[Span]:
        """Every occurrence, as spans of the original: those of whole words, if there are any, else all."""
        spots, start = [], self.text.find(phrase) if phrase else -1
        while start >= 0:
            spots.append((start, start + len(phrase)))
            start = self.text.find(phrase, start + 1)
        whole = [s for s in spots if not any(map(self._inside_word, s))]
        return [self.original(*s) for s in whole or spots]

    def original(self, start: int, end: int) -> Span:
        """The original's characters behind [start, end) of the text."""
        return self.origin[start][0], self.origin[end - 1][1]

    def _inside_word(self, at: int) -> bool:
        return 0 < at < len(self.text) and self.text[at - 1].isalnum() and self.text[at].isalnum()


def is_punctuation(char: str) -> bool:
    """Of Unicode's punctuation, or one of ASCII's symbols."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


@lru_cache(maxsize=256)
def composed(text: str) -> Reading:
    """The text in NFC."""
    out, origin, start = [], [], 0
    while start < len(text):
        end = start + 1
        while end < len(text) and (unicodedata.combining(text[end]) or _joins(text[start:end], text[end])):
            end += 1
        made = unicodedata.normalize("NFC", text[start:end])
        out.append(made)
        origin += [(start, end)] * len(made)
        start = end
    return Reading("".join(out), tuple(origin))


def _joins(before: str, char: str) -> bool:
    """Hangul letters compose without being combining marks."""
    if char < "\u1100":
        return False
    one, two = unicodedata.normalize("NFC", before), unicodedata.normalize("NFC", char)
    return unicodedata.normalize("NFC", before + char) != one + two


@lru_cache(maxsize=512)
def folded(text: str, apart: bool) -> Reading:
    """Lower case, one space for white space, no punctuation (or, `apart`, a space in its place)."""
    nfc = composed(text)
    out: list[str] = []
    origin: list[Span] = []
    for char, where in zip(nfc.text, nfc.origin, strict=True):
        if is_punctuation(char) and not (apart and char not in "'’"):
            continue
        said = " " if char.isspace() or is_punctuation(char) else char.lower()
        if said != " " or (out and out[-1] != " "):
            out += said
            origin += [where] * len(said)
    if out and out[-1] == " ":
        out.pop()
        origin.pop()
    return Reading("".join(out), tuple(origin))


def occurrences(phrase: str, text: str) -> tuple[list[Span], str]:
    """Where a text says a phrase, exactly or in normal form: spans of characters, and which (or none, ``""``)."""
    phrase = phrase.strip()
    spans = composed(text).find(composed(phrase).text)
    if spans:
        return spans, "exact"
    for apart in (False, True):
        spans = folded(text, apart).find(folded(phrase, apart).text)
        if spans:
            return spans, "normalised"
    return [], ""


def nearest(phrase: str, text: str, least: float) -> Span | None:
    """The window of a text that is likest a phrase, if it is like enough."""
    fuzz = _rapidfuzz()
    read, wanted = folded(text, False), folded(phrase, False).text
    if not wanted or not read.text:
        return None
    if len(wanted) > len(read.text):  # partial_ratio would look for the text in the phrase
        return read.original(0, len(read.text)) if fuzz.ratio(wanted, read.text) >= least else None
    found = fuzz.partial_ratio_alignment(wanted, read.text, score_cutoff=least)
    return None if found is None or found.score < least else read.original(found.dest_start, found.dest_end)


@lru_cache(maxsize=1)
def _rapidfuzz() -> Any:
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise ImportError("fuzzy matching needs rapidfuzz: pip install 'pertoken[critiques]', or fuzzy=None") from error
    return fuzz


def locate(written: Written, response: str, context: str, allowed: Sequence[bool], how: Matching) -> Any:
    """The spans that a critique speaks of.

    Args:
        written: the critique. response: whose phrases it quotes, one character an entry of `allowed` (False: not
            emitted by the policy). context: the prompt; what is quoted from it alone is left out.

    Returns:
        (start, end, +1 or -1) in characters of the response, good ones first, in the order listed; and counts: how
        phrases were found (``exact``, ``normalised``, ``fuzzy``), ``unmatched``, and ``of_context``.
    """
    found: list[tuple[int, int, int]] = []
    counts: Counter[str] = Counter()
    for quote, sign in [*((q, 1) for q in written.good), *((q, -1) for q in written.poor)]:
        spans, way = _of_quote(quote, response, context, allowed, how)
        counts[way] += 1
        found += [(*span, sign) for span in spans]
    return found, counts


def _of_quote(
    quote: Quote, response: str, context: str, allowed: Sequence[bool], how: Matching
) -> tuple[list[Span], str]:
    every, way = occurrences(quote.text, response)
    spans = [s for s in every if any(allowed[slice(*s)])]
    if every and not spans:
        return [], "of_context"
    if spans:
        if quote.index is not None:
            spans = every[quote.index : quote.index + 1]
            return (spans, way) if spans else ([], "unmatched")
        return (spans if how.occurrence == "all" else spans[:1]), way
    if occurrences(quote.text, context)[0]:
        return [], "of_context"
    near = nearest(quote.text, response, how.fuzzy) if how.fuzzy is not None else None
    return ([near], "fuzzy") if near is not None else ([], "unmatched")


def byte_offsets(text: str) -> np.ndarray:
    """Where each character begins, and the text ends, in bytes: int64 of shape (characters + 1,)."""
    return np.cumsum([0, *(len(char.encode("utf-8", ESCAPE)) for char in text)], dtype=np.int64)


def token_scores(trace: Trace, critique: Critique, overlap: str = "first") -> np.ndarray:
    """A critique's values on the completion's tokens: float64 (T,), 0 on those that the policy did not emit.

    Args:
        critique: byte spans of the completion with values; overlap: see `Matching`.

    Raises:
        ValueError: a span outside of the text, or with a value that is not finite.
    """
    at_T = speaking(trace)
    size = int(at_T.size and trace.spans()[-1, 1])
    values, free_T = np.zeros(len(trace)), at_T >= 0
    first = sorted(critique.spans, key=lambda s: s[2] >= 0) if overlap == "poor" else critique.spans  # sort is stable
    for start, end, value in first:
        if not 0 <= start < end <= size:
            raise ValueError(f"a critique's span [{start}, {end}) is outside of the {size} bytes of the response")
        if not np.isfinite(value):
            raise ValueError(f"a critique's span [{start}, {end}) has the value {value}; give a finite one")
        mine_T = free_T & (at_T >= start) & (at_T < end)
        values[mine_T], free_T = value, free_T & ~mine_T
    return values * trace.mask


def speaking(trace: Trace) -> np.ndarray:
    """Where in the response each token's first character begins that is neither white space nor punctuation: int64 (T,)
    of bytes, -1 for a token without one. A token inside of a character has that character's."""
    text = b"".join(trace.completion_pieces).decode("utf-8", ESCAPE)
    begins = byte_offsets(text)
    said = np.array([not (char.isspace() or is_punctuation(char)) for char in text], bool)
    spots = np.flatnonzero(said)
    spans = trace.spans()
    first_T = np.searchsorted(begins[1:], spans[:, 0], "right")  # of the characters that end after it begins
    next_T = np.searchsorted(spots, first_T)
    out = np.full(len(trace), -1)
    for t in np.flatnonzero(next_T < len(spots)):
        begin = begins[spots[next_T[t]]]
        if begin < spans[t, 1] and spans[t, 1] > spans[t, 0]:
            out[t] = begin
    return out
