"""Credit: values on the tokens of a trace. Every signal of the library becomes one, so that any can be used anywhere.

A `Credit` can be added, scaled, reduced, moved to another tokenizer (through bytes), saved and drawn. Its `kind` says
what the numbers are and decides how they move: *extensive* kinds (reward, advantage, logratio, kl, surprisal,
attribution) are amounts, so a token cut in two shares its amount by bytes and the sum is kept; *intensive* kinds
(weight, entropy, probability) are levels, so the pieces keep the level and a merged token takes the byte-weighted mean.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bytes import byte_view
from .trace import Trace

EXTENSIVE = frozenset({"reward", "advantage", "logratio", "kl", "surprisal", "attribution"})
INTENSIVE = frozenset({"weight", "entropy", "probability"})
LEVELS = ("token", "span", "sequence")
_REDUCE: dict[str, Callable[[np.ndarray], float]] = {
    "sum": lambda v: float(v.sum()),
    "mean": lambda v: float(v.mean()) if len(v) else 0.0,
    "max": lambda v: float(v.max()) if len(v) else 0.0,
    "min": lambda v: float(v.min()) if len(v) else 0.0,
    "last": lambda v: float(v[-1]) if len(v) else 0.0,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Credit:
    """One value a token of a trace.

    Attributes:
        trace: the tokens the values stand on.
        values: float64 of shape (tokens of `over`,); 0 on completion tokens the policy did not emit.
        kind: reward, advantage, weight, logratio, surprisal, entropy, kl, attribution or probability.
        over: which tokens: ``completion`` (default), ``prompt`` or ``all``.
        level: ``token``; ``span`` if values are constant over marked spans; ``sequence`` if one number stands on the
            last token and zeros before it.
        method, version: catalog slug and version of the method that made it.
        meta: provenance and named parts (JSON values).

    Raises:
        ValueError: unknown kind, level or over; a wrong number of values; values that are not finite.
    """

    trace: Trace
    values: np.ndarray
    kind: str = "reward"
    over: str = "completion"
    level: str = "token"
    method: str = ""
    version: int = 1
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        values = np.asarray(self.values, np.float64)
        object.__setattr__(self, "values", values)
        if self.kind not in EXTENSIVE | INTENSIVE:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(sorted(EXTENSIVE | INTENSIVE))}")
        if self.level not in LEVELS:
            raise ValueError(f"level={self.level!r} is not one of {', '.join(LEVELS)}")
        tokens = len(self.trace.ids(self.over))
        if values.shape != (tokens,):
            raise ValueError(f"credit of shape {values.shape} on {tokens} {self.over} tokens; give one value a token")
        if not np.isfinite(values).all():
            where = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"credit is {values[where]} at {self.over} token {where}; score it with finite values")

    @classmethod
    def of_sequence(cls, trace: Trace, value: float, **options: Any) -> Credit:
        """A sequence-level number: on the last completion token, zeros before it (nothing if there is no token)."""
        values = np.zeros(len(trace))
        values[-1:] = value
        return cls(trace=trace, values=values, level="sequence", **options)

    @property
    def extensive(self) -> bool:
        """Whether the values are amounts (summed) rather than levels (averaged)."""
        return self.kind in EXTENSIVE

    def reduce(self, how: str = "sum") -> float:
        """One number: ``sum``, ``mean``, ``max``, ``min`` or ``last``, over the tokens that the policy emitted."""
        if how not in _REDUCE:
            raise ValueError(f"reduce={how!r} is not one of {', '.join(_REDUCE)}")
        return _REDUCE[how](self.values[self._mask()])

    def map(self, function: Callable[[np.ndarray], np.ndarray], **changes: Any) -> Credit:
        """The same credit with ``function(values)``; `changes` may name another kind, level or method."""
        return dataclasses.replace(self, values=function(self.values), **changes)

    def __add__(self, other: Credit | float) -> Credit:
        if isinstance(other, Credit):
            self._same_tokens(other)
            if other.kind != self.kind:
                raise ValueError(
                    f"adding {other.kind} to {self.kind}: say what the sum is with .map(lambda v: v, kind={self.kind!r})"
                )
            joined = "+".join(m for m in (self.method, other.method) if m)
            return self.map(lambda v: v + other.values, level=_joint_level(self, other), method=joined)
        return self.map(lambda v: v + other)

    def __mul__(self, factor: float) -> Credit:
        return self.map(lambda v: v * factor)

    __rmul__ = __mul__
    __radd__ = __add__

    def __neg__(self) -> Credit:
        return self * -1.0

    def __sub__(self, other: Credit | float) -> Credit:
        return self + (-other)

    def spans(self, bounds: Sequence[tuple[int, int]], how: str = "sum") -> list[float]:
        """The credit of each byte span [start, end) of the text: the tokens that touch it, reduced by `how`."""
        return [_REDUCE[how](self.values[self.trace.tokens_between(a, b, self.over)]) for a, b in bounds]

    def to(self, target: Any) -> Credit:
        """The same credit on another tokenization of the same text.

        Args:
            target: a tokenizer (the text is tokenized once with it) or a `Trace` of the same text.

        Returns:
            Credit on the new trace. Values move by shared bytes (see the module's docstring). The terminator maps to the
            terminator; any other zero-byte token's amount goes to its neighbour (the next token with bytes, else the
            one before), and is counted in ``meta["moved_zero_byte"]``. Sampled log-probs do not carry over.

        Raises:
            ValueError: the target trace says another text.
        """
        new = target if isinstance(target, Trace) else _retokenize(self.trace, target)
        if new.tokenizer == self.trace.tokenizer and new.ids(self.over) == self.trace.ids(self.over):
            return dataclasses.replace(self, trace=new)
        old_pieces, new_pieces = self.trace.pieces(self.over), new.pieces(self.over)
        if b"".join(old_pieces) != b"".join(new_pieces):
            raise ValueError("the target trace says another text; credit moves only between tokenizations of one text")
        both_end = self.over != "prompt" and self.trace.ended and new.ended
        values, moved = _realign(self.values, old_pieces, new_pieces, self.extensive, both_end)
        meta = self.meta | ({"moved_zero_byte": self.meta.get("moved_zero_byte", 0) + moved} if moved else {})
        if self.level == "sequence" and len(values):  # one number stays one number, on the new last token
            values = np.concatenate([np.zeros(len(values) - 1), [self.values.sum()]])
        return dataclasses.replace(self, trace=new, values=values, meta=meta)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal credit."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"trace": self.trace.to_json(), "values": [float(v) for v in self.values]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Credit:
        """The credit that `to_json` wrote."""
        return cls(**(data | {"trace": Trace.from_json(data["trace"]), "values": np.asarray(data["values"])}))

    def _mask(self) -> np.ndarray:
        prompt = np.ones(len(self.trace.prompt_ids), bool)
        return {"completion": self.trace.mask, "prompt": prompt, "all": np.concatenate([prompt, self.trace.mask])}[
            self.over
        ]

    def _same_tokens(self, other: Credit) -> None:
        if self.trace.tokenizer != other.trace.tokenizer:
            raise ValueError(
                f"credits of two tokenizers ({self.trace.tokenizer}, {other.trace.tokenizer}) do not add; "
                "move one first: a + b.to(a.trace)"
            )
        if self.over != other.over or self.trace.ids(self.over) != other.trace.ids(other.over):
            raise ValueError("credits of different tokens do not add; score the same trace, over the same part of it")


def combine(credits: Sequence[Credit], weights: Sequence[float] | None = None, kind: str | None = None) -> Credit:
    """Weighted sum of credits on one trace; `kind` says what the sum is (default: the first one's kind).

    The parts' reduced sums are kept in ``meta["parts"]``, by method.
    """
    if not credits:
        raise ValueError("nothing to combine; give at least one credit")
    weights = [1.0] * len(credits) if weights is None else list(weights)
    if len(weights) != len(credits):
        raise ValueError(f"{len(weights)} weights for {len(credits)} credits; give one each")
    kind = kind or credits[0].kind
    total = credits[0].map(lambda v: v * weights[0], kind=kind)
    for credit, weight in zip(credits[1:], weights[1:], strict=True):
        total = total + credit.map(lambda v, w=weight: v * w, kind=kind)
    parts = {c.method or f"part{i}": w * c.reduce("sum") for i, (c, w) in enumerate(zip(credits, weights, strict=True))}
    return dataclasses.replace(total, meta=total.meta | {"parts": parts})


@dataclass(frozen=True)
class Critique:
    """Written feedback and the byte spans of the completion it speaks of, each with a value."""

    text: str
    spans: tuple[tuple[int, int, float], ...]

    def credit(self, trace: Trace, **options: Any) -> Credit:
        """Span-level credit: each span's value on every token that touches it; overlapping spans add up."""
        values = np.zeros(len(trace))
        for start, end, value in self.spans:
            values[trace.tokens_between(start, end)] += value
        meta = {"critique": self.text} | options.pop("meta", {})
        return Credit(trace=trace, values=values, level="span", meta=meta, **options)


def save_credits(credits: Iterable[Credit], path: str | Path) -> Path:
    """One credit a line, as JSON; written beside and renamed, so a file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf8") as out:
        for credit in credits:
            out.write(json.dumps(credit.to_json(), ensure_ascii=False) + "\n")
    return part.replace(path)


def load_credits(path: str | Path) -> list[Credit]:
    """What `save_credits` wrote."""
    with Path(path).open(encoding="utf8") as lines:
        return [Credit.from_json(json.loads(line)) for line in lines if line.strip()]


def _joint_level(a: Credit, b: Credit) -> str:
    return a.level if a.level == b.level else "token"


def _retokenize(trace: Trace, tokenizer: Any) -> Trace:
    view = byte_view(tokenizer)
    prompt_ids, prompt_pieces = view.pieces_of_text(trace.prompt_text)
    ids, pieces = view.pieces_of_text(trace.text)
    ended = trace.ended and view.eos_id is not None
    if ended:
        ids, pieces = (*ids, int(view.eos_id or 0)), (*pieces, b"")
    return Trace(
        prompt_ids=prompt_ids,
        prompt_pieces=prompt_pieces,
        completion_ids=ids,
        completion_pieces=pieces,
        tokenizer=view.fingerprint,
        ended=ended,
        meta=trace.meta,
    )


def _realign(
    values: np.ndarray, old: Sequence[bytes], new: Sequence[bytes], extensive: bool, both_end: bool
) -> tuple[np.ndarray, int]:
    """Move values from one cutting of a byte string to another. Returns the values and how many were moved aside."""
    out = np.zeros(len(new))
    weight = np.zeros(len(new))
    old_ends, new_ends = np.cumsum([len(p) for p in old]), np.cumsum([len(p) for p in new])
    carriers = [j for j, piece in enumerate(new) if piece]
    moved = 0
    j = 0
    for i, piece in enumerate(old):
        if not piece:
            if both_end and i == len(old) - 1:
                out[-1], weight[-1] = values[i], 1.0
            elif extensive and carriers:
                start = old_ends[i]
                later = [k for k in carriers if new_ends[k] > start]
                out[later[0] if later else carriers[-1]] += values[i]
                moved += 1
            elif len(new) and extensive:
                out[-1] += values[i]
                moved += 1
            continue
        start, end = old_ends[i] - len(piece), old_ends[i]
        while j < len(new) and new_ends[j] <= start:
            j += 1
        k = j
        while k < len(new) and new_ends[k] - len(new[k]) < end:
            shared = min(end, new_ends[k]) - max(start, new_ends[k] - len(new[k]))
            if shared > 0:
                out[k] += values[i] * (shared / len(piece) if extensive else shared)
                weight[k] += shared
            k += 1
    if not extensive:
        out = np.divide(out, weight, out=np.zeros_like(out), where=weight > 0)
    return out, moved
