"""Text <-> words <-> rows of units. Ids are ByT5's: 0 PAD, 1 END of a word, byte b is 3 + b; 2 is MORE, the end of a
chunk whose word goes on. Further units (characters, subwords) come after the 256 bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PAD, END, MORE, BYTES = 0, 1, 2, 3
# A space belongs to the word after it, punctuation is a word, further white space another: GPT-2's rule.
_WORDS = re.compile(r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s", re.UNICODE)


def normalise(text: str) -> str:
    """The reference's lossy form: markup and newlines dropped, spaces around punctuation, single spaces."""
    return " ".join(re.sub(r"([^\w\s])", r" \1 ", re.sub(r"<[^<>]*>", " ", text)).split())


def characters(texts: Iterable[str]) -> tuple[bytes, ...]:
    """The alphabet of char units: every character of several bytes (those of one are bytes already), sorted."""
    return tuple(sorted(c.encode() for c in {c for text in texts for c in text} if len(c.encode()) > 1))


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Words of a text as rows of unit ids.

    Attributes:
        longest: most units of a chunk; a longer word is several chunks, all but the last ended by MORE.
        alphabet: units of several bytes beside the 256 bytes; a word is cut greedily, longest unit first, so that what
            is not in the alphabet becomes bytes.
        mode: ``reversible``: words keep their leading space and joining them gives the text, to the byte. ``reference``
            is LOSSY: words of `normalise`, without spaces, PAD is END, no chunks.
    """

    longest: int = 16
    alphabet: tuple[bytes, ...] = ()
    mode: Literal["reversible", "reference"] = "reversible"

    def __post_init__(self) -> None:
        if self.longest < 1 or self.mode not in ("reversible", "reference"):
            raise ValueError(f"{self}: longest must be 1 or more, mode reversible or reference")
        if len(set(self.alphabet)) < len(self.alphabet) or any(len(unit) < 2 for unit in self.alphabet):
            raise ValueError("alphabet: units must differ and have two bytes or more (single bytes are always units)")

    @property
    def vocabulary(self) -> int:
        """V, number of unit ids."""
        return BYTES + 256 + len(self.alphabet)

    @property
    def row(self) -> int:
        """c0, length of a row: one more than the longest chunk, for its END (the reference has no such room)."""
        return self.longest + (self.mode == "reversible")

    def words(self, text: str) -> list[bytes]:
        """The words of a text; concatenated they are its UTF-8 bytes (mode reference: of `normalise`, unspaced)."""
        if self.mode == "reference":
            return [word.encode() for word in normalise(text).split()]
        return [word.encode() for word in _WORDS.findall(text)]

    def units(self, word: bytes) -> list[int]:
        """Unit ids of a word, without an end."""
        if not self.alphabet:
            return [BYTES + b for b in word]
        known = {unit: BYTES + 256 + i for i, unit in enumerate(self.alphabet)}
        longest, out, at = max(map(len, self.alphabet)), [], 0
        while at < len(word):
            size = next((n for n in range(min(longest, len(word) - at), 1, -1) if word[at : at + n] in known), 1)
            unit = word[at : at + size]
            out.append(known[unit] if size > 1 else BYTES + unit[0])
            at += size
        return out

    def chunks(self, word: bytes) -> list[list[int]]:
        """A word as rows with their end, not padded.

        Raises:
            ValueError: mode reference and a word of more than `longest` units.
        """
        ids = self.units(word)
        if self.mode == "reference":
            if len(ids) > self.longest:
                raise ValueError(f"a word of {len(ids)} units, longest={self.longest}: the reference has no chunks")
            return [ids]
        parts = [ids[i : i + self.longest] for i in range(0, max(1, len(ids)), self.longest)]
        return [[*part, MORE] for part in parts[:-1]] + [[*parts[-1], END]]

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Bytes of units; PAD, END and MORE have none."""
        pieces = ((self.alphabet[i - BYTES - 256] if i >= BYTES + 256 else bytes([i - BYTES])) for i in ids if i > MORE)
        return b"".join(pieces)

    def encode(self, words: Sequence[bytes], *, bos: bool = True) -> Tensor:
        """Rows [t, c0] of words, padded; the first is the BOS word, an END alone (the reference has none)."""
        rows = [[END]] if bos and self.mode == "reversible" else []
        rows += [row for word in words for row in self.chunks(word)]
        out = torch.full((len(rows), self.row), PAD)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return out

    def decode(self, rows: Tensor | Sequence[Sequence[int]]) -> list[bytes]:
        """Words of rows: an empty row (BOS) is none, a chunk with MORE or without an end is joined to the next."""
        out, open_word = [], b""
        for row in rows.tolist() if isinstance(rows, Tensor) else rows:
            ids = [int(i) for i in row]
            said = self.bytes_of(ids)
            open_word += said
            if self.mode == "reference" or END in ids:
                out += [open_word] if open_word else []
                open_word = b""
        return out + ([open_word] if open_word else [])

    def report(self, text: str) -> dict[str, float]:
        """``words``, ``chunks``, and ``cut``: share of words that are longer than a chunk."""
        sizes = [len(self.chunks(word)) for word in self.words(text)]
        cut = sum(n > 1 for n in sizes)
        return {"words": float(len(sizes)), "chunks": float(sum(sizes)), "cut": cut / len(sizes) if sizes else 0.0}
