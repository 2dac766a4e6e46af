"""A trace: what a model was asked and what it answered, as token ids.

Ids are the truth. Text, byte spans and masks are views of them; a trace never decodes and re-encodes. A response is
tokenized once, and every other prompt is put before the same ids (`Trace.with_prompt`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .bytes import ByteView

_OVER = ("completion", "prompt", "all")
_ENTRIES = {
    "prompt_ids": int,
    "completion_ids": int,
    "prompt_pieces": bytes,
    "completion_pieces": bytes,
    "emitted": bool,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One prompt and one completion of P and T tokens.

    Attributes:
        prompt_ids: ids before the completion, template included, length P.
        completion_ids: ids of the completion, length T; its last one is the turn's terminator when `ended`.
        prompt_pieces, completion_pieces: the bytes each id stands for; ``b""`` for special tokens.
        tokenizer: fingerprint of the tokenizer the ids belong to (`ByteView.fingerprint`).
        emitted: bool of length T, False where the policy did not produce the id (tool outputs, later user turns).
            None means all True.
        ended: the completion carries its terminator; False means it was cut off (by a length limit).
        sampled_logps: log-prob of each completion id under the distribution it was drawn from, length T, or None.
        policy_logps: log-prob of each completion id at temperature 1 over the whole vocabulary, length T, or None.
        sampling: how it was drawn (temperature, top_p, top_k, model, seed), empty if it was not sampled here.
        meta: anything a user wants to carry along; JSON values only.

    Ids, pieces and `emitted` may be given as any sequence, and are kept as tuples.

    Raises:
        ValueError: lengths that disagree.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    prompt_pieces: tuple[bytes, ...]
    completion_pieces: tuple[bytes, ...]
    tokenizer: str
    emitted: tuple[bool, ...] | None = None
    ended: bool = False
    sampled_logps: np.ndarray | None = None
    policy_logps: np.ndarray | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, kind in _ENTRIES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and all(type(v) is kind for v in value)):
                object.__setattr__(self, name, tuple(map(kind, value)))
        for name in ("sampled_logps", "policy_logps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if len(self.prompt_ids) != len(self.prompt_pieces):
            raise ValueError(f"{len(self.prompt_ids)} prompt ids, {len(self.prompt_pieces)} pieces; give one a token")
        t = len(self.completion_ids)
        for name in ("completion_pieces", "emitted", "sampled_logps", "policy_logps"):
            value = getattr(self, name)
            if value is not None and len(value) != t:
                raise ValueError(f"{name} has {len(value)} entries for {t} completion ids; give one a token")

    def __len__(self) -> int:
        """T, the number of completion tokens."""
        return len(self.completion_ids)

    @property
    def text(self) -> str:
        """The completion as text (bytes that form no character become U+FFFD)."""
        return b"".join(self.completion_pieces).decode("utf-8", errors="replace")

    @property
    def raw_text(self) -> str:
        """The completion as text whose characters map back to its bytes (`byte_offsets`): a byte that forms no
        character is a lone surrogate."""
        return b"".join(self.completion_pieces).decode("utf-8", errors="surrogateescape")

    @property
    def prompt_text(self) -> str:
        """The prompt as text, template markers left out (they are special tokens)."""
        return b"".join(self.prompt_pieces).decode("utf-8", errors="replace")

    def ids(self, over: str = "completion") -> tuple[int, ...]:
        """Ids of the completion, the prompt, or all."""
        return _choose(over, self.prompt_ids, self.completion_ids)

    def pieces(self, over: str = "completion") -> tuple[bytes, ...]:
        """Bytes of each token of the completion, the prompt, or all."""
        return _choose(over, self.prompt_pieces, self.completion_pieces)

    def spans(self, over: str = "completion") -> np.ndarray:
        """Byte span [start, end) of each token in the concatenated bytes of `over`: int64 of shape (tokens, 2)."""
        ends = np.cumsum([len(p) for p in self.pieces(over)], dtype=np.int64)
        return np.stack([np.concatenate([ends[:1] * 0, ends[:-1]]), ends], axis=1)

    @property
    def mask(self) -> np.ndarray:
        """bool of length T: the completion tokens that the policy produced."""
        return np.ones(len(self), bool) if self.emitted is None else np.asarray(self.emitted, bool)

    def tokens_between(self, start: int, end: int, over: str = "completion") -> np.ndarray:
        """Indices of the tokens that share at least one byte with [start, end) of the text of `over`.

        Raises:
            ValueError: the span is empty or lies outside of the text.
        """
        spans = self.spans(over)
        size = int(spans[-1, 1]) if len(spans) else 0
        if not 0 <= start < end <= size:
            raise ValueError(f"byte span [{start}, {end}) does not lie in the {size} bytes of the {over}")
        return np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0]))

    def with_prompt(self, prompt_ids: tuple[int, ...], view: ByteView) -> Trace:
        """The same completion ids after another prompt of the same tokenizer; recorded log-probs do not carry over.

        Raises:
            ValueError: `view` belongs to another tokenizer.
        """
        if view.fingerprint != self.tokenizer:
            raise ValueError(
                f"the new prompt's tokenizer ({view.fingerprint}) is not the trace's ({self.tokenizer}); "
                "encode it with the trace's own tokenizer"
            )
        pieces = view.pieces(prompt_ids, at_start=True)
        return dataclasses.replace(
            self, prompt_ids=prompt_ids, prompt_pieces=pieces, sampled_logps=None, policy_logps=None
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal trace; bytes are written as latin-1 text."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("pieces"):
                value = [p.decode("latin-1") for p in value]
            elif isinstance(value, np.ndarray):
                value = [float(v) for v in value]
            elif isinstance(value, tuple):
                value = list(value)
            if value is not None and value != {}:
                out[f.name] = value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        """The trace that `to_json` wrote."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for name in ("prompt_pieces", "completion_pieces"):
            values[name] = tuple(p.encode("latin-1") for p in values[name])
        return cls(**values)


def byte_offsets(text: str) -> list[int]:
    """Where each character of a `Trace.raw_text` begins, in bytes, and where the last one ends: len + 1 entries."""
    out = [0]
    for char in text:
        out.append(out[-1] + len(char.encode("utf-8", "surrogateescape")))
    return out


def _choose(over: str, prompt: tuple, completion: tuple) -> tuple:
    if over not in _OVER:
        raise ValueError(f"over={over!r} is not one of {', '.join(_OVER)}")
    return completion if over == "completion" else prompt if over == "prompt" else prompt + completion
