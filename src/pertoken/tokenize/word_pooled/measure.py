"""Arms of one comparison (word-pooled, bytes, subwords, words), measured alike; `_pooled_training` trains them.

A next word is the greedy spelling up to the next space, as a string, whatever a model's units are. Text is
`codec.normalise`d with a space before every word, so that each arm is told that a word begins and has to say where it
ends. Bits per byte are of the words with their spaces, ends included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .codec import MORE, PAD, Codec
from .model import GPT, WordPooledLM

Windows = Sequence[Sequence[bytes]]


class Arm(Protocol):
    """A model and how it reads windows of words."""

    model: Any

    def batch(self, windows: Windows) -> Tensor:
        """Ids of windows, padded."""
        ...

    def judge(self, windows: Windows, skip: int) -> tuple[list[bool], list[float], tuple[int, int]]:
        """Of every word after the first `skip` of each window: hit or not, nats; and (right, all) units."""
        ...


class PooledArm:
    """Word-pooled. A hit: every unit and END of the word's row(s) is the most probable one, so greedy spelling."""

    def __init__(self, model: WordPooledLM, codec: Codec):
        self.model, self.codec = model, codec

    def batch(self, windows: Windows) -> Tensor:
        """Rows of words [B, w, c], as wide as the longest of them: padding changes nothing."""
        ids = torch.nn.utils.rnn.pad_sequence([self.codec.encode(w) for w in windows], batch_first=True)
        return ids if self.codec.mode == "reference" else ids[..., : int((ids != PAD).sum(-1).max())]

    @torch.no_grad()
    def judge(self, windows: Windows, skip: int) -> tuple[list[bool], list[float], tuple[int, int]]:
        """See `Arm`. The space that begins a word is given, not judged."""
        device = next(self.model.parameters()).device
        ids = self.batch(windows).to(device)
        targets, logp = ids[:, 1:], self.model(ids)
        right = (logp.argmax(-1) == targets) | (targets == PAD)
        right[..., 0] |= targets[..., 0] == self.codec.units(b" ")[0]
        real = targets > MORE
        real[..., 0] &= targets[..., 0] != self.codec.units(b" ")[0]
        nats = -torch.where(targets != PAD, logp.gather(-1, targets[..., None])[..., 0], 0.0).sum(-1)
        hits, costs, found = [], [], (0, 0)
        rights, nats = right.all(-1).tolist(), nats.tolist()
        for b, window in enumerate(windows):
            at = 0
            for i, word in enumerate(window):
                rows = slice(at, at + len(self.codec.chunks(word)))
                at = rows.stop
                if i >= skip:
                    hits.append(all(rights[b][rows]))
                    costs.append(sum(nats[b][rows]))
                    found = (
                        found[0] + int((right[b, rows] & real[b, rows]).sum()),
                        found[1] + int(real[b, rows].sum()),
                    )
        return hits, costs, found


class GPTArm:
    """The baseline over pieces of words: bytes, subwords or whole words, in text order.

    Args:
        pieces: bytes of ids 2, 3, ... (0 is padding, 1 begins). A space is at most the first byte of a piece.
        cut: word -> places in `pieces`.
    """

    def __init__(self, model: GPT, pieces: Sequence[bytes], cut: Callable[[bytes], Sequence[int]]):
        self.model, self.pieces, self.cut = model, [b"", b"", *pieces], cut
        self.spaced = torch.tensor([piece.startswith(b" ") for piece in self.pieces])
        self._known: dict[bytes, list[int]] = {}

    def ids(self, word: bytes) -> list[int]:
        """Ids of a word."""
        if word not in self._known:
            self._known[word] = [2 + i for i in self.cut(word)]
        return self._known[word]

    def batch(self, windows: Windows) -> Tensor:
        """Ids [B, T]."""
        rows = [torch.tensor([1, *(i for word in window for i in self.ids(word))]) for window in windows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @torch.no_grad()
    def judge(self, windows: Windows, skip: int) -> tuple[list[bool], list[float], tuple[int, int]]:
        """See `Arm`. Where the best piece is not the text's, but the word's bytes go on so, it is spelled out."""
        device = next(self.model.parameters()).device
        ids = self.batch(windows).to(device)
        logp = self.model(ids)
        nats = -logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        nats, best = nats.tolist(), logp.argmax(-1).tolist()
        first = torch.where(self.spaced.to(device), logp, -torch.inf).argmax(-1).tolist()
        hits, costs, found = [], [], (0, 0)
        ask: list[tuple[int, list[int], bytes]] = []  # place among hits, ids so far, bytes still to be spelled
        for b, window in enumerate(windows):
            row, at = ids[b].tolist(), 1
            for i, word in enumerate(window):
                own = self.ids(word)
                if i >= skip:
                    costs.append(sum(nats[b][at - 1 : at - 1 + len(own)]))
                    guesses = [first[b][at - 1], *best[b][at : at + len(own)]]
                    same = [g == o for g, o in zip(guesses, own, strict=False)]
                    units = [s for s, o in zip(same, own, strict=True) if self.pieces[o] != b" "]  # the space is given
                    found = (found[0] + sum(units), found[1] + len(units))
                    said = b"".join(self.pieces[o] for o in own)  # not the word, where it is unknown
                    hits.append(all(same) and said == word and bool(self.spaced[guesses[-1]]))
                    if not all(same):
                        k = same.index(False)
                        left, piece = b"".join(self.pieces[o] for o in own[k:]), self.pieces[guesses[k]]
                        if piece and left.startswith(piece):
                            ask.append((len(hits) - 1, [*row[: at + k], guesses[k]], left[len(piece) :]))
                at += len(own)
        while ask:
            now, ask = ask[:32], ask[32:]
            rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for _, s, _ in now], batch_first=True)
            rows = rows[:, : self.model.places.num_embeddings].to(device)
            ends = torch.tensor([len(s) - 1 for _, s, _ in now], device=device).clamp(max=rows.shape[1] - 1)
            guessed = self.model(rows)[torch.arange(len(now), device=device), ends].argmax(-1).tolist()
            for (place, so_far, left), guess in zip(now, guessed, strict=True):
                piece = self.pieces[guess]
                if not left:
                    hits[place] = piece.startswith(b" ")
                elif piece and left.startswith(piece):
                    ask.append((place, [*so_far, guess], left[len(piece) :]))
        return hits, costs, found


def byte_pieces() -> tuple[list[bytes], Callable[[bytes], Sequence[int]]]:
    """Pieces and cut of the byte model."""
    return [bytes([b]) for b in range(256)], list


def subword_pieces(text: str, vocabulary: int) -> tuple[list[bytes], Callable[[bytes], Sequence[int]]]:
    """Pieces and cut of a byte-level BPE trained on a text, GPT-2's way."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(text.splitlines() or [""], trainer)
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's printable stand-ins for bytes
    stand_in = {chr(b): b for b in kept}
    stand_in |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in set(kept))}
    pieces = [bytes(stand_in[c] for c in core.id_to_token(i)) for i in range(core.get_vocab_size())]
    return pieces, lambda word: core.encode(word.decode()).ids


def word_pieces(words: Sequence[bytes], vocabulary: int) -> tuple[list[bytes], Callable[[bytes], Sequence[int]]]:
    """Pieces and cut of the closed vocabulary: the most frequent words; any other is unknown and never a hit."""
    known = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    ids = {word: i + 1 for i, word in enumerate(known)}
    return [b" \xff", *known], lambda word: [ids.get(word, 0)]


@dataclass(frozen=True)
class Measured:
    """Held-out figures: of every word a hit or not and its nats; right and all units."""

    words: tuple[bytes, ...]
    hits: np.ndarray
    nats: np.ndarray
    units: tuple[int, int]

    @property
    def word_accuracy(self) -> float | None:
        """Share of words hit; None: no words."""
        return float(self.hits.mean()) if len(self.hits) else None

    @property
    def unit_accuracy(self) -> float | None:
        """Right / all units, pooled; None: no units."""
        return self.units[0] / self.units[1] if self.units[1] else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of the words over their bytes; None: no words."""
        size = sum(map(len, self.words))
        return float(self.nats.sum()) / math.log(2) / size if size else None

    def buckets(
        self, seen: Mapping[bytes, int], edges: Sequence[int] = (1, 10, 100)
    ) -> dict[tuple[int, int | None], tuple[int, int]]:
        """(hits, words) by how often a word was seen in training: [0, 1), [1, 10), ... of the edges."""
        counts = np.array([seen.get(word, 0) for word in self.words])
        out = {}
        for low, high in zip((0, *edges), (*edges, None), strict=True):
            inside = (counts >= low) & (counts < (high if high is not None else np.inf))
            out[low, high] = (int(self.hits[inside].sum()), int(inside.sum()))
        return out


def measure(arm: Arm, words: Sequence[bytes], window: int, batch: int = 32) -> Measured:
    """Every word once, in windows that overlap by half, so with half a window of context or more (but at the start)."""
    half = max(1, window // 2)
    starts = range(0, max(1, len(words) - window + half) if words else 0, half)
    hits, nats, right, units = [], [], 0, 0
    for skip, those in ((0, starts[:1]), (window - half, starts[1:])):
        some = [words[s : s + window] for s in those]
        for i in range(0, len(some), batch):
            h, c, (r, u) = arm.judge(some[i : i + batch], skip)
            hits, nats, right, units = hits + h, nats + c, right + r, units + u
    return Measured(tuple(words[: len(hits)]), np.array(hits, bool), np.array(nats), (right, units))
