"""Examples: rows of data in one form, whatever file they came from, and the report of those that are not used."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Turns = tuple[dict[str, Any], ...]
Text = str | Turns

KINDS = ("pair", "unpaired", "sft", "prompt")
PINNED = "pinned"  # key of Example.extra: text of the prompt that is never cut off


class Refused(ValueError):
    """Why one row cannot be used: the reason it is counted under in a `DataReport`."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of data: a prompt and what is known of its responses.

    Attributes:
        prompt: text (one user turn), or messages ``{"role", "content"}`` that do not end with an assistant turn.
        responses: each text, or messages beginning and ending with an assistant turn. ``pair``: the chosen, the
            rejected; ``unpaired`` and ``sft``: one; ``prompt``: none.
        kind: ``pair``, ``unpaired``, ``sft`` or ``prompt``.
        label: whether the response of an ``unpaired`` example is desirable; None for the others.
        scores: one number a response, or None.
        aspects: aspect (helpfulness, style...) -> one score a response.
        annotator, criterion: who judged, and by what; empty if unknown.
        tags: anything to group results by.
        source, row: where it was read from, and its 0-based row there.
        extra: the other columns of the row.

    Raises:
        ValueError: unknown kind; a number of responses, scores or labels that the kind does not have.
    """

    prompt: Text
    responses: tuple[Text, ...] = ()
    kind: str = "pair"
    label: bool | None = None
    scores: tuple[float, ...] | None = None
    aspects: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    annotator: str = ""
    criterion: str = ""
    tags: tuple[str, ...] = ()
    source: str = ""
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        one_of("kind", self.kind, KINDS)
        k = {"pair": 2, "prompt": 0}.get(self.kind, 1)
        if len(self.responses) != k:
            raise ValueError(f"row {self.row}: {len(self.responses)} responses; an example of kind {self.kind} has {k}")
        if (self.label is None) == (self.kind == "unpaired"):
            raise ValueError(f"row {self.row}: label={self.label}; give one to unpaired examples, and only to them")
        for name, numbers in {"scores": self.scores, **self.aspects}.items():
            if numbers is not None and len(numbers) != k:
                raise ValueError(f"row {self.row}: {len(numbers)} {name} for {k} responses; give one each")


@dataclass
class DataReport:
    """What became of every row.

    Attributes:
        kept: how many rows are used.
        refused: reason -> rows that cannot be used.
        skipped: reason -> good rows that are not used (a mixture's weights, undesirable answers for sft).
        noted: reason -> kept rows that were changed (``prompt cut``).
    """

    kept: int = 0
    refused: dict[str, list[int]] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows kept, refused and skipped."""
        return self.kept + sum(len(rows) for table in (self.refused, self.skipped) for rows in table.values())

    def refuse(self, reason: str, row: int) -> None:
        """Count a row that cannot be used."""
        self.refused.setdefault(reason, []).append(row)

    def some_kept(self, source: str) -> None:
        """Check that anything is left of `source`.

        Raises:
            ValueError: nothing is; the sentence says why.
        """
        if not self.kept:
            why = "; ".join(self.lines()[1:]) or "it is empty"
            raise ValueError(f"{source} holds no row that can be used: {why}")

    def merge(self, other: DataReport) -> DataReport:
        """The report of both, read side by side (two sources); for two steps on the same rows see `then`."""
        tables: tuple[dict[str, list[int]], ...] = ({}, {}, {})
        for table, name in zip(tables, ("refused", "skipped", "noted"), strict=True):
            for reason, rows in itertools.chain(getattr(self, name).items(), getattr(other, name).items()):
                table[reason] = [*table.get(reason, []), *rows]
        return DataReport(self.kept + other.kept, *tables)

    def then(self, later: DataReport) -> DataReport:
        """The report of both, where `later` is about the examples that this one kept (loading, then encoding)."""
        return dataclasses.replace(self.merge(later), kept=later.kept)

    def lines(self) -> list[str]:
        """The report for a reader: one line of counts, then one a reason with its first ten rows."""
        out = [f"{self.kept} of {self.total} rows kept"]
        for what, table in (("refused", self.refused), ("skipped", self.skipped), ("kept", self.noted)):
            for reason, rows in table.items():
                listed = ", ".join(map(str, rows[:10])) + (f" ... and {len(rows) - 10} more" if rows[10:] else "")
                out.append(f"{what} {len(rows)}: {reason} (row{'s' * bool(rows[1:])} {listed})")
        return out


def as_kind(examples: Iterable[Example], kind: str) -> list[Example]:
    """Examples of another kind, in order, with the same row numbers.

    A pair becomes ``unpaired`` (two examples, the chosen first and desirable) or ``sft`` (the chosen); an unpaired one
    becomes ``sft`` if it is desirable, else nothing; all become ``prompt`` (without what is known of the responses).

    Raises:
        ValueError: an example that cannot become one of that kind.
    """
    out: list[Example] = []
    for example in examples:
        if example.kind == kind:
            out.append(example)
        elif kind == "prompt":
            out.append(dataclasses.replace(example, kind=kind, responses=(), label=None, scores=None, aspects={}))
        elif kind in ("unpaired", "sft") and example.kind in ("pair", "unpaired"):
            labels = (True, False) if example.kind == "pair" else (bool(example.label),)
            for k, label in enumerate(labels):
                if kind == "unpaired" or label:
                    one = {"responses": example.responses[k : k + 1], "label": label if kind == "unpaired" else None}
                    one["scores"] = example.scores and example.scores[k : k + 1]
                    one["aspects"] = {name: values[k : k + 1] for name, values in example.aspects.items()}
                    out.append(dataclasses.replace(example, kind=kind, **one))
        else:
            raise ValueError(f"row {example.row}: a {example.kind} example cannot become {kind}; give {kind} data")
    return out


def ranked_pairs(
    prompt: Text,
    responses: Sequence[Text],
    ranks: Sequence[float],
    scores: Sequence[float] | None = None,
    **fields: Any,
) -> list[Example]:
    """All comparisons of a ranked list, at most n(n-1)/2, instead of the best against the worst alone.

    Args:
        prompt, responses: n responses to one prompt.
        ranks: 1 is best; of equal ranks no pair is made.
        scores: of the responses, if there are any.
        fields: of `Example` (row, source...).

    Returns:
        Pairs, by rank of the chosen, then of the rejected, then in the order given.

    Raises:
        ValueError: not one rank (and score) a response, or a rank that is not a number.
    """
    if not len(responses) == len(ranks) == len(scores if scores is not None else ranks):
        raise ValueError(f"{len(responses)} responses, {len(ranks)} ranks; give one rank (and one score) a response")
    if any(math.isnan(r) for r in ranks):
        raise ValueError(f"ranks={list(ranks)} hold one that is not a number; leave that response out")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    pairs = [(w, lo) for a, w in enumerate(order) for lo in order[a + 1 :] if ranks[w] < ranks[lo]]
    both = lambda values, pair: None if values is None else tuple(float(values[i]) for i in pair)
    return [
        Example(prompt=prompt, responses=(responses[p[0]], responses[p[1]]), scores=both(scores, p), **fields)
        for p in pairs
    ]


def split_by_prompt(
    examples: Sequence[Example], *, test: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Two parts that share no prompt, each in the order given: (train, test).

    A prompt's side is decided by a hash of it and the seed, so rows that come or go move no other row (but where all
    prompts fall on one side, one is moved). Dialogues with one opening question stay together, whatever their length:
    the later turns of one would give away the earlier ones of another.

    Args:
        examples: of any kind.
        test: share of the prompts that goes to test, in [0, 1); sides have about that share of the rows.
        seed: another seed, another split.

    Raises:
        ValueError: `test` out of range, or a single prompt, which cannot be on both sides.
    """
    if not 0 <= test < 1:
        raise ValueError(f"test={test} is not a share in [0, 1)")
    if test == 0:
        return list(examples), []
    keys = [_opening(e.prompt) for e in examples]
    place = {key: _uniform(f"{seed}\n{key}") for key in set(keys)}
    order = sorted(place, key=lambda key: (place[key], key))
    if len(order) < 2:
        raise ValueError(
            f"{len(order)} prompt in {len(examples)} rows cannot be split; give rows of several prompts, or test=0"
        )
    n_test = min(max(sum(p < test for p in place.values()), 1), len(order) - 1)
    held = set(order[:n_test])
    return (
        [e for e, key in zip(examples, keys, strict=True) if key not in held],
        [e for e, key in zip(examples, keys, strict=True) if key in held],
    )


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Check an option.

    Raises:
        ValueError: `value` is not among the known ones.
    """
    if value not in known:
        raise ValueError(f"{option}={value!r} is not one of {', '.join(known)}")


def said_by(role: str, text: Text) -> list[str]:
    """What the ``user`` or the ``assistant`` says in a prompt or a response, turn by turn, without any template; plain
    text is one turn of whoever is asked for."""
    return [text] if isinstance(text, str) else [m["content"] for m in text if m["role"] == role]


def _opening(prompt: Text) -> str:
    """All up to the first user turn, so that a text and the same text as a message are one."""
    turns = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    return json.dumps(turns[: first + 1])


def _uniform(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2.0**64
