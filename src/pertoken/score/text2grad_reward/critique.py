"""Critiques as JSON: written safely, and read whatever the writer made of it.

A critique is ``{"textual_feedback": one paragraph, "good_spans": [phrases], "poor_spans": [phrases]}``; a phrase may be
an object ``{"text": phrase, "index": k}``, the k-th time that it occurs (from 0). The older form is a list of (word,
score) with scores -1, 0 or 1. Text is parsed, never evaluated: first as JSON wherever in the prose it begins, then by a
lenient reader (single quotes, trailing commas, tuples, a list that was cut off: what is complete is kept).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FEEDBACK, GOOD, POOR = "textual_feedback", "good_spans", "poor_spans"
_DEEPEST = 8  # no critique nests deeper
_TRIES = 64  # places where it may begin
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_WORDS = {"true": True, "false": False, "null": None, "none": None}


class Quote(NamedTuple):
    """A phrase of the response; `index` says which of its occurrences, None: as the reader decides."""

    text: str
    index: int | None = None


@dataclass(frozen=True)
class Written:
    """A critique as it was written.

    Attributes:
        feedback: the paragraph. good, poor: quoted phrases, in order.
        malformed: nothing that says spans was found; repaired: it was no valid JSON, or not all of it was.
        dropped: entries that are no phrases.
    """

    feedback: str = ""
    good: tuple[Quote, ...] = ()
    poor: tuple[Quote, ...] = ()
    malformed: bool = False
    repaired: bool = False
    dropped: int = 0

    def to_json(self) -> str:
        """The JSON text, feedback first."""
        plain = lambda q: q.text if q.index is None else {"text": q.text, "index": q.index}
        sides = {GOOD: [plain(q) for q in self.good], POOR: [plain(q) for q in self.poor]}
        return json.dumps({FEEDBACK: self.feedback, **sides}, ensure_ascii=False)


def parse(text: str) -> Written:
    """Read a critique; one without spans is `malformed` and says nothing."""
    decoder = json.JSONDecoder()
    starts = [i for i, char in enumerate(text) if char in "{["][:_TRIES]
    for start in starts:
        try:
            found = _critique(decoder.raw_decode(text, start)[0])
        except (ValueError, RecursionError):
            continue
        if found is not None:
            return found
    for start in starts:
        found = _critique(_Lenient(text, start).value(0))
        if found is not None:
            return Written(found.feedback, found.good, found.poor, False, True, found.dropped)
    return Written(malformed=True)


def of_object(data: Any) -> Written:
    """A critique that is JSON data already."""
    return _critique(data) or Written(malformed=True)


def _critique(data: Any) -> Written | None:
    if isinstance(data, dict) and (GOOD in data or POOR in data):
        (good, lost), (poor, more) = _quotes(data.get(GOOD)), _quotes(data.get(POOR))
        said = data.get(FEEDBACK)
        feedback = said.encode("utf-8", "replace").decode() if isinstance(said, str) else ""  # half an escaped emoji
        return Written(feedback, good, poor, dropped=lost + more)
    if isinstance(data, list) and data:
        pairs = [_scored(entry) for entry in data]
        known = [p for p in pairs if p is not None]
        if not known:
            return None
        good, poor = (tuple(Quote(word) for word, score in known if score == sign) for sign in (1, -1))
        return Written("", good, poor, dropped=len(pairs) - len(known))
    return None


def _quotes(entries: Any) -> tuple[tuple[Quote, ...], int]:
    listed = [] if entries is None else entries if isinstance(entries, list) else [entries]
    found: list[Quote] = []
    for entry in listed:
        text, index = (entry.get("text"), entry.get("index")) if isinstance(entry, dict) else (entry, None)
        whole = index is None or (type(index) is int and index >= 0)
        if isinstance(text, str) and text.strip() and whole:
            found.append(Quote(text, index))
    return tuple(found), len(listed) - len(found)


def _scored(entry: Any) -> tuple[str, int] | None:
    pair: Sequence[Any] = [entry.get("word"), entry.get("score")] if isinstance(entry, dict) else entry
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0].strip():
        return None
    number = type(pair[1]) in (int, float) and pair[1] in (-1, 0, 1)
    return (pair[0], int(pair[1])) if number else None


class _Cut(Exception):
    """The text ended inside a string or a word."""


class _Lenient:
    """A reader of almost JSON: it keeps what is complete and passes over what it cannot read."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def value(self, depth: int) -> Any:
        char = self.text[self.at]
        if char in _CLOSERS and depth < _DEEPEST:
            return self._several(char, depth)
        return self._string(char) if char in "\"'" else self._word()

    def _several(self, opener: str, depth: int) -> Any:
        """A list, tuple or object, up to its closer or the end of the text."""
        items: list[Any] = []
        table: dict[str, Any] = {}
        key: str | None = None
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == _CLOSERS[opener]:
                self.at += 1
                break
            if char.isspace() or char in ",:" or char in "}])":
                key = None if char == "," else key
                self.at += 1
                continue
            try:
                item = self.value(depth + 1)
            except _Cut:
                break
            if opener != "{":
                items.append(item)
            elif key is None:
                key = str(item)
            else:
                table[key], key = item, None
        return table if opener == "{" else items

    def _string(self, quote: str) -> str:
        """Up to a quote before a comma, colon or closer: an apostrophe ends no string."""
        out: list[str] = []
        at = self.at + 1
        while at < len(self.text):
            char = self.text[at]
            if char == "\\" and at + 1 < len(self.text):
                found, at = self._escaped(at)
                out.append(found)
                continue
            if char == quote:
                after = self.text[at + 1 :].lstrip()[:1]
                if not after or after in ",:]})":
                    self.at = at + 1
                    return "".join(out)
            out.append(char)
            at += 1
        self.at = len(self.text)
        raise _Cut

    def _escaped(self, at: int) -> tuple[str, int]:
        code = self.text[at + 2 : at + 6]
        if self.text[at + 1] == "u" and len(code) == 4 and all(c in "0123456789abcdefABCDEF" for c in code):
            return chr(int(code, 16)), at + 6
        return {"n": "\n", "t": "\t", "r": "\r"}.get(self.text[at + 1], self.text[at + 1]), at + 2

    def _word(self) -> Any:
        """A number, a literal, or a word without quotes (read as text)."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ",:]})":
            self.at += 1
        word = self.text[start : self.at].strip()
        if self.at == len(self.text):
            raise _Cut
        if word.lower() in _WORDS:
            return _WORDS[word.lower()]
        try:
            return int(word)
        except ValueError:
            return word
