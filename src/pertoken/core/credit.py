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


class NotFinite(ValueError):
    """A value that is NaN or infinite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Credit:
    """One value a token of a trace.

    Attributes:
        trace: the tokens the values stand on.
        values: float64 of shape (tokens of `over`,), copied; 0 on completion tokens the policy did not emit.
        kind: reward, advantage, weight, logratio, surprisal, entropy, kl, attribution or probability.
        over: which tokens: ``completion`` (default), ``prompt`` or ``all``.
        level: ``token``; ``span`` if values are constant over marked spans; ``sequence`` if one number stands on the
            last token (that the policy emitted) and zeros elsewhere.
        method, version: catalog slug and version of the method that made it.
        meta: provenance and named parts (JSON values).

    Raises:
        ValueError: unknown kind, level or over; a wrong number of values; values that are not finite (`NotFinite`).
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
        values = np.array(self.values, np.float64)
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
            raise NotFinite(f"credit is {values[where]} at {self.over} token {where}; score it with finite values")

    @classmethod
    def of_sequence(cls, trace: Trace, value: float, **options: Any) -> Credit:
        """A sequence-level number: on the last emitted completion token, else zeros (nothing if there is no token)."""
        return cls(trace=trace, values=_on_last(trace.mask, value), level="sequence", **options)

    @property
    def extensive(self) -> bool:
        """Whether the values are amounts (summed) rather than levels (averaged)."""
        return self.kind in EXTENSIVE

    def reduce(self, how: str = "sum") -> float:
        """One number: ``sum``, ``mean``, ``max``, ``min`` or ``last``, over the tokens that the policy emitted."""
        return _reduce(self.values[_mask(self.trace, self.over)], how)

    def map(self, function: Callable[[np.ndarray], np.ndarray], **changes: Any) -> Credit:
        """The same credit with ``function(values)``; `changes` may name another kind, level or method."""
        return dataclasses.replace(self, values=function(self.values), **changes)

    def __add__(self, other: Credit | float) -> Credit:
        """With a credit on the same tokens, or with a number on every emitted token (a sequence-level credit: once)."""
        if isinstance(other, Credit):
            self._same_tokens(other)
            if other.kind != self.kind:
                raise ValueError(
                    f"adding {other.kind} to {self.kind}: say what the sum is, .map(lambda v: v, kind={self.kind!r})"
                )
            joined = "+".join(m for m in (self.method, other.method) if m)
            return self.map(lambda v: v + other.values, level=_joint_level(self, other), method=joined)
        mask = _mask(self.trace, self.over)
        return self.map(lambda v: v + (_on_last(mask, other) if self.level == "sequence" else other * mask))

    def __mul__(self, factor: float) -> Credit:
        return self.map(lambda v: v * factor)

    __rmul__ = __mul__
    __radd__ = __add__

    def __neg__(self) -> Credit:
        return self * -1.0

    def __sub__(self, other: Credit | float) -> Credit:
        return self + (-other)

    def spans(self, bounds: Sequence[tuple[int, int]], how: str = "sum") -> list[float]:
        """The credit of each byte span [start, end) of the text: the emitted tokens that touch it, reduced by `how`."""
        mask = _mask(self.trace, self.over)
        touched = [self.trace.tokens_between(a, b, self.over) for a, b in bounds]
        return [_reduce(self.values[tokens[mask[tokens]]], how) for tokens in touched]

    def to(self, target: Any) -> Credit:
        """The same credit on another tokenization of the same text.

        Args:
            target: a tokenizer (the text is tokenized once with it) or a `Trace` of the same text.

        Returns:
            Credit on the new trace. Values move by shared bytes (see the module's docstring). The terminator maps to
            the terminator; the amount of any other zero-byte token goes to its neighbour (the next emitted token with
            bytes, else the one before; its level, if the kind is intensive, weighs nothing), and it is counted in
            ``meta["moved_zero_byte"]``. So is a token whose bytes form no character (a completion cut off inside one),
            because no other tokenizer can say them. A new zero-byte token has its neighbour's level. Recorded log-probs
            do not carry over.

        Raises:
            ValueError: the target says another text, or has no token for an amount to stand on.
        """
        new = target if isinstance(target, Trace) else _retokenize(self.trace, target)
        if new.tokenizer == self.trace.tokenizer and new.ids(self.over) == self.trace.ids(self.over):
            return dataclasses.replace(self, trace=new)
        old_pieces, new_pieces = self.trace.pieces(self.over), new.pieces(self.over)
        said = b"".join(new_pieces)
        if b"".join(old_pieces) != said:
            prompt, completion = _decodable(self.trace.prompt_pieces), _decodable(self.trace.completion_pieces)
            old_pieces = {"prompt": prompt, "completion": completion, "all": prompt + completion}[self.over]
        if b"".join(old_pieces) != said:
            raise ValueError(
                f"the target says {said[:80]!r}, this trace {b''.join(self.trace.pieces(self.over))[:80]!r}; "
                "credit moves only between tokenizations of one text"
            )
        if not new.ids(self.over) and self.values.any():
            raise ValueError(f"the target has no token in its {self.over}, so credit has nothing to stand on")
        old_mask, new_mask = _mask(self.trace, self.over), _mask(new, self.over)
        if self.level == "sequence":  # one number stays one number
            return dataclasses.replace(self, trace=new, values=_on_last(new_mask, self.values.sum()))
        terminators = old_pieces[-1:] == new_pieces[-1:] == (b"",) and self.over != "prompt"
        both_end = terminators and self.trace.ended and new.ended
        values, moved = _realign(self.values, old_pieces, new_pieces, old_mask, new_mask, self.extensive, both_end)
        meta = self.meta | ({"moved_zero_byte": self.meta.get("moved_zero_byte", 0) + moved} if moved else {})
        return dataclasses.replace(self, trace=new, values=values, meta=meta)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal credit."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"trace": self.trace.to_json(), "values": [float(v) for v in self.values]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Credit:
        """The credit that `to_json` wrote."""
        return cls(**(data | {"trace": Trace.from_json(data["trace"]), "values": np.asarray(data["values"])}))

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

    The parts' reduced sums are kept in ``meta["parts"]``, by method; parts of one method are added.
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
    parts: dict[str, float] = {}
    for i, (credit, weight) in enumerate(zip(credits, weights, strict=True)):
        name = credit.method or f"part{i}"
        parts[name] = parts.get(name, 0.0) + weight * credit.reduce("sum")
    return dataclasses.replace(total, meta=total.meta | {"parts": parts})


@dataclass(frozen=True)
class Critique:
    """Written feedback and the byte spans of the completion it speaks of, each with a value."""

    text: str
    spans: tuple[tuple[int, int, float], ...]

    def credit(self, trace: Trace, **options: Any) -> Credit:
        """Span-level credit: each span's value on every emitted token that touches it; overlapping spans add up."""
        values = np.zeros(len(trace))
        for start, end, value in self.spans:
            values[trace.tokens_between(start, end)] += value
        meta = {"critique": self.text} | options.pop("meta", {})
        return Credit(trace=trace, values=values * trace.mask, level="span", meta=meta, **options)


def on_spans(trace: Trace, parts: Iterable[tuple[int, int, float]]) -> np.ndarray:
    """Amounts on byte spans of the completion, each shared by the tokens it touches in proportion to the bytes that
    they cover: float64 (T,). Tokens that the policy did not emit get their share, too; mask them.

    Args:
        parts: (start, end, amount); an empty span has no token to stand on, and its amount is lost.
    """
    spans = trace.spans()
    values = np.zeros(len(trace))
    for start, end, amount in parts:
        overlap = np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start)
        values += amount * np.clip(overlap, 0, None) / max(1, end - start)
    return values


def laid_out(trace: Trace, parts: Iterable[tuple[int, int, float]], total: float, level: str, **named: Any) -> Credit:
    """A reward of which parts were earned by byte spans: on their tokens (``level="token"``), or all of it at the end.

    The sum is `total`: what falls on no token that the policy emitted stands on the last one that it did.
    """
    if level == "sequence" or not trace.mask.any():
        return Credit.of_sequence(trace, total, **named)
    values = on_spans(trace, parts) * trace.mask
    values[np.flatnonzero(trace.mask)[-1]] += total - values.sum()
    return Credit(trace=trace, values=values, **named)


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


def _reduce(values: np.ndarray, how: str) -> float:
    if how not in _REDUCE:
        raise ValueError(f"reduce={how!r} is not one of {', '.join(_REDUCE)}")
    return _REDUCE[how](values)


def _mask(trace: Trace, over: str) -> np.ndarray:
    """bool, one a token of `over`: not a completion token that the policy did not emit."""
    prompt = np.ones(len(trace.prompt_ids), bool)
    return {"completion": trace.mask, "prompt": prompt, "all": np.concatenate([prompt, trace.mask])}[over]


def _on_last(mask: np.ndarray, value: float) -> np.ndarray:
    """`value` where the mask holds for the last time, zeros elsewhere."""
    values = np.zeros(len(mask))
    values[np.flatnonzero(mask)[-1:]] = value
    return values


def _joint_level(a: Credit, b: Credit) -> str:
    return a.level if a.level == b.level else "token"


def _retokenize(trace: Trace, tokenizer: Any) -> Trace:
    view = byte_view(tokenizer)
    prompt_ids, prompt_pieces = view.pieces_of_text(b"".join(_decodable(trace.prompt_pieces)).decode("utf-8"))
    ids, pieces = view.pieces_of_text(b"".join(_decodable(trace.completion_pieces)).decode("utf-8"))
    ended = trace.ended and view.eos_id is not None
    if ended:
        ids, pieces = (*ids, int(view.eos_id or 0)), (*pieces, b"")
    emitted = None
    if trace.emitted is not None:  # a token that holds a byte the policy emitted counts as emitted
        old, every = _decodable(trace.completion_pieces), np.ones(len(ids), bool)
        emitted = tuple(_realign(trace.mask.astype(float), old, pieces, trace.mask, every, False, ended)[0] > 0)
    return Trace(
        prompt_ids=prompt_ids,
        prompt_pieces=prompt_pieces,
        completion_ids=ids,
        completion_pieces=pieces,
        tokenizer=view.fingerprint,
        emitted=emitted,
        ended=ended,
        meta=trace.meta,
    )


def _decodable(pieces: Sequence[bytes]) -> tuple[bytes, ...]:
    """The pieces without the bytes that form no character: a completion that was cut off may end inside one."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    kept = (ok for c in text for ok in ([False] if "\udc80" <= c <= "\udcff" else [True] * len(c.encode("utf-8"))))
    return tuple(bytes(byte for byte in piece if next(kept)) for piece in pieces)


def _realign(
    values: np.ndarray,
    old: Sequence[bytes],
    new: Sequence[bytes],
    old_mask: np.ndarray,
    new_mask: np.ndarray,
    extensive: bool,
    both_end: bool,
) -> tuple[np.ndarray, int]:
    """Move values from one cutting of a byte string to another.

    Args:
        values: one an old token.
        old, new: the pieces; both concatenate to the same bytes.
        old_mask, new_mask: which tokens the policy emitted; the others weigh nothing and receive no zero-byte amount.
        extensive: amounts rather than levels.
        both_end: the last token of either is its terminator.

    Returns:
        Values, one a new token, and how many emitted zero-byte tokens were moved aside.
    """
    sizes, new_sizes = (np.array([len(p) for p in pieces], int) for pieces in (old, new))
    old_of_byte, new_of_byte = np.repeat(np.arange(len(old)), sizes), np.repeat(np.arange(len(new)), new_sizes)
    share = 1.0 / sizes[old_of_byte] if extensive else old_mask[old_of_byte].astype(float)
    out = np.bincount(new_of_byte, values[old_of_byte] * share, len(new))
    weight = np.bincount(new_of_byte, share, len(new))
    if both_end:
        out[-1], weight[-1] = values[-1], 1.0
    aside = np.flatnonzero(sizes[:-1] == 0 if both_end else sizes == 0)
    homes = np.flatnonzero(new_mask[new_of_byte])

    def neighbour(start: int) -> int:
        """The token of the first emitted byte from `start` on, else of the last one before, else the last token."""
        return int(new_of_byte[homes[min(np.searchsorted(homes, start), len(homes) - 1)]]) if len(homes) else -1

    if extensive:
        for i in aside if len(new) else ():
            out[neighbour(sizes[:i].sum())] += values[i]
        return out, int(old_mask[aside].sum())
    out = np.divide(out, weight, out=np.zeros_like(out), where=weight > 0)
    for k in np.flatnonzero((new_sizes == 0) & (weight == 0) & new_mask):  # nothing says its level
        out[k] = out[neighbour(new_sizes[:k].sum())]
    return out, int(old_mask[aside].sum())
