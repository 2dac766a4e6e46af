"""What a token looks like on a page, and how strongly its credit colours it: shared by the terminal and HTML views."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pertoken.core.credit import Credit
from pertoken.core.trace import Trace

PART = "·"  # stands for a token whose bytes are only a part of a character; the last part shows the character


@dataclass(frozen=True)
class Shown:
    """One token as drawn.

    Attributes:
        text: printable text; line breaks and control characters are visible symbols, real line breaks follow `lines`.
        lines: how many line breaks the token makes after its text.
        role: ``text``, ``part`` (of a character), ``special`` (no bytes) or ``given`` (not emitted by the policy).
        raw: the token's bytes as Python would print them, for tooltips.
    """

    text: str
    lines: int
    role: str
    raw: str


def shown(trace: Trace, over: str = "completion") -> list[Shown]:
    """How each token of `over` is drawn. A character that spans several tokens stands on the last of them."""
    pieces, ids = trace.pieces(over), trace.ids(over)
    given = [False] * (len(trace.prompt_ids) if over != "completion" else 0)
    given += [] if over == "prompt" else [not emitted for emitted in trace.mask]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    carriers = [i for i, piece in enumerate(pieces) if piece]
    out = []
    for i, piece in enumerate(pieces):
        text = decoder.decode(piece, final=bool(carriers) and i == carriers[-1]) if piece else ""
        role = "given" if given[i] else "text"
        if not piece:
            ends = trace.ended and over != "prompt" and i == len(pieces) - 1
            text, role = ("<end>" if ends else f"<{ids[i]}>"), "special"
        elif not text:
            text, role = PART, "part"
        raw = repr(piece.decode("utf-8")) if _is_utf8(piece) else "bytes " + piece.hex(" ")
        out.append(Shown(visible(text), text.count("\n"), role, raw))
    return out


def visible(text: str) -> str:
    """Control characters as visible symbols, so that a token can neither hide nor steer a terminal."""
    return "".join(_symbol(c) for c in text)


def scale_of(credits: Sequence[Credit]) -> float:
    """The value at which colour is full: the largest |value| on tokens that say something (else on any), 0 if none.

    Zero-byte tokens are left out because a terminator's log-ratio often dwarfs every word; they just saturate.
    """
    spoken, any_token = 0.0, 0.0
    for credit in credits:
        sizes = np.abs(credit.values)
        says = np.array([bool(p) for p in credit.trace.pieces(credit.over)], bool)
        spoken = max(spoken, float(sizes[says].max(initial=0.0)))
        any_token = max(any_token, float(sizes.max(initial=0.0)))
    return spoken or any_token


def sequential(credit: Credit) -> bool:
    """Whether the values are levels from zero up (one hue) rather than signed amounts (two hues)."""
    return not credit.extensive and bool((credit.values >= 0).all())


def number(value: float, credit: Credit, digits: int = 4) -> str:
    """A value to some digits, with a sign where that means something; a true minus, no +0."""
    text = f"{value:.{digits}g}" if sequential(credit) or not value else f"{value:+.{digits}g}"
    return text.replace("-", "−")


def _symbol(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "⏎"
    if char == "\t":
        return "⇥"
    if code < 32:
        return chr(0x2400 + code)
    return "␡" if code == 127 else "�" if 0x80 <= code < 0xA0 else char


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
