"""Word-pooled tokenization — a language model over words that reads and spells them unit by unit, no vocabulary.

Thawani, Ghanekar, Zhu, Pujara, "Learn Your Tokens: Word-Pooled Tokenization for Language Modeling", Findings of EMNLP
2023, arXiv 2310.11628. B batch, t words, c0 units of a word's row, p prefix slots, d width:

    e_j = Encoder([p prefix slots ; units of word j])[: p]            [B, t, p, d]   bidirectional within the word
    h_j = GPT(e_1 .. e_j)                                              [B, t, p, d]   causal over all t p vectors
    P(unit i of word j+1) = Speller([h_j ; units 1 .. i-1 of word j+1])               causal, all words in parallel

Loss: mean cross-entropy over the units and the one END of each word. Units are bytes (ids of ByT5), characters with
bytes for those not seen, or any alphabet of pieces.

Differs from the authors' code: END has an id and a place of its own, and a BOS word begins a text, so that all of it is
predicted; words keep their space and long ones are chunks with a flag, so that joining gives the text to the byte; the
encoder's padding is seen by no unit (there by all, hence results depend on c0); prefix ids are V .. V+p-1 (there
c0 .. c0+p-1, which are units, too); positions are added once; blocks are pre-norm GELU of 4 d, and encoder and speller
end in a norm. ``compat="reference"`` brings back, of these, the shared id 0, its words without spaces (lossy), no BOS,
and the loss over padding; the mask stays mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .codec import Codec, characters
from .model import GPT, WordPooledLM


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The encoder within words and the spelling decoder."""

    layers: int = 2
    """Layers of each."""
    heads: int = 4
    """Heads of each."""


@dataclass(frozen=True, kw_only=True)
class WordPooled:
    """Options of word-pooled models."""

    prefix: int = 4
    """p, vectors a word."""
    width: int = 512
    """d."""
    layers: int = 8
    """Layers of the model over words."""
    heads: int = 8
    """Its heads."""
    spelling: Spelling = field(default_factory=Spelling)
    """Encoder and decoder."""
    dropout: float = 0.1
    """In every block."""
    block: int = 192
    """Longest context in words."""
    longest: int = 16
    """Most units of a chunk: c0 is one more, for the END (as many, in the reference)."""
    unit: Literal["byte", "char"] = "byte"
    """What words are spelled in; char takes its alphabet from the texts."""
    compat: Literal["", "reference"] = ""
    """The release's ids, lossy words and loss."""

    def __post_init__(self) -> None:
        if min(self.prefix, self.width, self.layers, self.heads, self.block, self.longest) < 1:
            raise ValueError(f"{self}: prefix, width, layers, heads, block and longest must be 1 or more")
        if min(self.spelling.layers, self.spelling.heads) < 1:
            raise ValueError(f"{self.spelling}: layers and heads must be 1 or more")
        if self.width % self.heads or self.width % self.spelling.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads and spelling.heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    def codec(self, texts: Sequence[str] = ()) -> Codec:
        """The codec; `texts` give the alphabet of char units."""
        alphabet = characters(texts) if self.unit == "char" else ()
        mode = "reference" if self.compat == "reference" else "reversible"
        return Codec(longest=self.longest, alphabet=alphabet, mode=mode)

    def build(self, codec: Codec, *, seed: int = 0) -> WordPooledLM:
        """A model with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WordPooledLM(
                vocabulary=codec.vocabulary,
                row=codec.row,
                words=self.block,
                prefix=self.prefix,
                width=self.width,
                layers=self.layers,
                heads=self.heads,
                spelling_layers=self.spelling.layers,
                spelling_heads=self.spelling.heads,
                dropout=self.dropout,
                compat="reference" if codec.mode == "reference" else "",
            )

    def baseline(self, vocabulary: int, places: int, layers: int, *, seed: int = 0) -> GPT:
        """A GPT of the same blocks over `vocabulary` pieces (padding and BOS are added)."""
        shape: dict[str, Any] = {"width": self.width, "heads": self.heads, "dropout": self.dropout}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT(vocabulary=vocabulary + 2, places=places, layers=layers, **shape)

    def pieces(self, texts: Sequence[str], tokenizer: Any) -> list[list[bytes]]:
        """What is pooled of each text: its words, long ones in chunks. The tokenizer plays no part."""
        codec = self.codec(texts)
        return [[codec.bytes_of(row) for word in codec.words(text) for row in codec.chunks(word)] for text in texts]
