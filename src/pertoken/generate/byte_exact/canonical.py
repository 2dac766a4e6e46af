"""Which token sequences a tokenizer itself would produce: the validity mask of byte-exact's canonical mode.

A sequence t is canonical *as a prefix* if the encoding of some text starts with it. Every prefix of such a sequence is
one, too. That is not so for encode(decode(t)) = t: SmolLM2 splits "\\n\\ny" into \\n | \\n | y, though "\\n\\n" alone
is one token, and a search over encode(x_1..x_i) misses the first. What follows is therefore probed: a sequence is valid
if its text is encoded as it, or as it and more with a probe behind it (a letter, white space or digit after white space
where a regular expression looks ahead; any letter or digit where whole words are looked up first).

Inside a character only continuation bytes go on. Its last byte is tried in all 64 values, so that a token that ends one
byte short of a character is valid only if some such character is spelt with it; with more bytes missing, any are
(what is wrong is found when they come).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from ...core.bytes import ByteView

_LETTERS = "qzjxaeitnsrobcdfghklmpuvwyABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OTHERS = "éЖ中ก😀𐍈"
_MEMORY = 64
_CONTINUATION = bytes(range(0x80, 0xC0))


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which token sequences count (see `ByteExact`)."""

    mode: Literal["canonical", "all"] = "canonical"
    fast: bool = True
    beam: int = 0
    threshold: float = 0.0


class Canonical:
    """The rules of one tokenizer, asked of it by encoding; masks of the last contexts are remembered."""

    def __init__(self, view: ByteView):
        self.view = view
        tokenizer = view.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else {}
        splitting = json.dumps(rules.get("pre_tokenizer"), ensure_ascii=False)
        self._looks_ahead = backend is None or '"ByteLevel"' in splitting or "(?" in splitting
        self._looks_up = backend is None or bool((rules.get("model") or {}).get("ignore_merges"))
        self._letters = [c for c in _LETTERS if self._spells(c)]
        self._digits = [c for c in "0123456789" if self._spells(c)][:1]
        self._marks = [c for c in ".,!?-;:()" if self._spells(c)][:1]
        self._aloof = [c for c in (*_LETTERS, *_OTHERS) if self._spells(c) and self._stands_apart(c)][:1]
        self._anchor, self._anchors = self._find_anchor()
        self._masks: OrderedDict[tuple[tuple[int, ...], bool], np.ndarray] = OrderedDict()

    def _find_anchor(self) -> tuple[str, int]:
        """A character to stand before a space, and how many ids it is; ("", 0) if no space is a sure boundary."""
        for i in range(self.view.size):
            piece = self.view.piece(i)
            if any(b == 32 and piece[k] not in b" \t\n\r\v\f" for k, b in enumerate(piece[1:])):
                return "", 0  # a token reaches over it
        for char in [*self._letters, *self._digits, *self._marks]:
            alone, spaced = self._encode([char, char + " "])
            if spaced[: len(alone)] == alone:
                return char, len(alone)
        return "", 0

    def _spells(self, char: str) -> bool:
        return self._bytes(self._encode([char])[0], True) == char.encode()

    def _stands_apart(self, char: str) -> bool:
        """Whether a space before it stays a token of its own."""
        return b" " in self.view.pieces(self._encode(["\n " + char])[0])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.view.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)["input_ids"]

    def _bytes(self, ids: Sequence[int], at_start: bool) -> bytes:
        return b"".join(self.view.pieces(ids, at_start=at_start))

    def tail(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """What a next token can change: ids from the last sure boundary before the last token, and whether they begin
        the text."""
        if self._anchor:
            for k in range(len(ids) - 1, 0, -1):
                if self.view.piece(ids[k])[:1] == b" ":
                    last = self.view.pieces(ids[max(0, k - 4) : k])
                    char = b"".join(last).decode("utf8", "replace")[-1:]
                    if char and char != "\ufffd" and not char.isspace():
                        return ids[k:], False
        return ids, True

    def prefix(self, ids: tuple[int, ...]) -> bool:
        """Whether some text's encoding starts with these ids (from the beginning of a text on)."""
        tail, begins = self.tail(ids[:-1])
        return bool(self._valid(tail, begins, ids[-1:])[0]) if ids else True

    def whole(self, ids: tuple[int, ...]) -> bool:
        """Whether these ids are the encoding of their own text."""
        if not ids:
            return True
        tail, begins = self.tail(ids[:-1])
        return bool(self._valid(tail, begins, ids[-1:], probing=False)[0])

    def mask(self, ids: tuple[int, ...], following: np.ndarray) -> np.ndarray:
        """Which ids can come next, bool of the shape of `following` (always the same ids for one tokenizer)."""
        key = self.tail(ids)
        if key not in self._masks:
            self._masks[key] = self._valid(*key, following)
            if len(self._masks) > _MEMORY:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]

    def _valid(
        self, tail: tuple[int, ...], begins: bool, following: Sequence[int] | np.ndarray, probing: bool = True
    ) -> np.ndarray:
        out = np.zeros(len(following), bool)
        before = self._bytes(tail, begins)
        started = bool(tail) or not begins
        open_: list[tuple[int, str, tuple[str, ...]]] = []
        for place, v in enumerate(np.asarray(following).tolist()):
            data = before + self.view.pieces([v], at_start=not started)[0]
            if not data:
                out[place] = probing  # the space that stands before a text, alone: some word may follow
                continue
            text, missing = _characters(data)
            if text is None or (missing and not probing):
                continue
            if missing > 1:
                out[place] = True
            elif missing == 1:
                rest = data[len(text.encode()) :]
                ends = [rest + bytes([b]) for b in range(0x80, 0xC0)]
                open_.append((place, text, tuple(e.decode() for e in ends if _characters(e)[1] == 0)))
            else:
                open_.append((place, text, ("", *self._probes(text)) if probing else ("",)))
        turn = 0
        while open_:  # the n-th ending of all that have found none among the earlier ones
            texts = [self._anchor * (not begins) + text + ends[turn] for _, text, ends in open_]
            left = []
            for item, text, ids in zip(open_, texts, self._encode(texts), strict=True):
                place, _, ends = item
                skip = 0 if begins else self._anchors
                wanted = [*tail, int(following[place])]
                if ids[skip : skip + len(wanted)] == wanted and (
                    len(ids) == skip + len(wanted) if ends[turn] == "" else self._bytes(ids, True) == text.encode()
                ):
                    out[place] = True
                elif turn + 1 < len(ends):
                    left.append(item)
            open_, turn = left, turn + 1
        return out

    def _probes(self, text: str) -> list[str]:
        last, letters, out = text[-1:], self._letters[:2], []
        if self._looks_ahead and last.isspace():
            for c in letters[:1] or self._digits or self._marks:
                out += [c, "\n" + c, " " + c, "  " + c]
            out += self._digits + self._marks + self._aloof + ["\n"]
        elif self._looks_ahead and last.isdigit():
            out += [d * k for d in self._digits for k in (1, 2, 3)]
        if self._looks_up and not last.isspace():
            out += letters + self._digits
        return out


@lru_cache(maxsize=1024)
def goes_on(rest: bytes) -> np.ndarray:
    """Which bytes can follow the bytes of an unfinished character (b"": which begin one), bool (256,)."""
    return np.array([_characters(rest + bytes([b]))[0] is not None for b in range(256)])


def unfinished(data: bytes) -> bytes:
    """The bytes of a last character that is not complete."""
    text, missing = _characters(data[-3:].lstrip(_CONTINUATION))
    return data[len(data) - len(data[-3:].lstrip(_CONTINUATION)) + len((text or "").encode()) :] if missing else b""


def _characters(data: bytes) -> tuple[str | None, int]:
    """The whole characters of the bytes, and how many bytes the last one lacks; None: no text starts like this."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None, 0
        lead = data[error.start]
        return data[: error.start].decode(), (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - len(data) + error.start


_known: WeakKeyDictionary[ByteView, Canonical] = WeakKeyDictionary()


def canonical(view: Any) -> Canonical:
    """The rules of a tokenizer, made once."""
    if view not in _known:
        _known[view] = Canonical(view)
    return _known[view]
