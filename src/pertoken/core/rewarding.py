"""Rewards of rollouts: any scorers, weighted, with every failure told.

A reward is a sum of scorers, each a credit on the completion's tokens: what one gives as a single number stands on the
last token, what it gives on spans or tokens stays there. A scorer that fails on a batch is asked row by row; rows that
fail alone stop the run, or are left out and counted, as asked. A reward that is not finite always stops the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .credit import Credit, NotFinite, combine
from .data import Group
from .isolated import WorkerDied
from .protocols import Scorer, as_scorer
from .trace import Trace


def with_row(group: Group, trace: Trace) -> Trace:
    """A completion that knows its row's prompt, and the row's other columns (references, gold answers...)."""
    known = {**group.example.extra, "row": group.example.row, "source": group.example.source}
    return dataclasses.replace(trace, meta={**trace.meta, **known, "prompt": group.example.prompt})


@dataclass(frozen=True)
class Rewarded:
    """What scorers said of some completions.

    Attributes:
        credits: the weighted sum, one a completion; None where a scorer failed.
        parts: name of a scorer, or of a scorer's named part -> one number a completion (None where it failed). So for
            what a scorer counts (``meta["counts"]``: entries it could not read...).
        failures: (index of the completion, scorer, message).
    """

    credits: list[Credit | None]
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    failures: list[tuple[int, str, str]] = field(default_factory=list)


class Rewarder:
    """A weighted sum of scorers.

    Args:
        scorers: by name.
        weights: of each; default 1.
        on_error: ``stop`` at a scorer that raises on a row (naming it), or ``skip``: leave the row out, counted.

    Raises:
        ValueError: no scorer, or an unknown `on_error`.
    """

    def __init__(
        self, scorers: Mapping[str, Scorer], weights: Mapping[str, float] | None = None, on_error: str = "stop"
    ):
        if not scorers:
            raise ValueError("no reward: name a scorer (reward='vader'; pertoken methods --room score lists them)")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={on_error!r} is not one of stop, skip")
        self.scorers, self.weights, self.on_error = dict(scorers), dict(weights or {}), on_error

    def at(self, batch: int) -> Rewarder:
        """The reward of the batch of rollouts with that number: scorers with a schedule (a method `at`) move on."""
        moved = {n: s.at(batch) if hasattr(s, "at") else s for n, s in self.scorers.items()}  # type: ignore[attr-defined]
        return Rewarder(moved, self.weights, self.on_error)

    def __call__(self, traces: Sequence[Trace]) -> Rewarded:
        """Score completions.

        Raises:
            ValueError: a scorer that fails on a row, unless failures are skipped; a value that is not finite; credit
                over the prompt or on other tokens, or another number of credits than of completions.
        """
        total: list[list[Credit]] = [[] for _ in traces]
        parts: dict[str, list[float | None]] = {}
        failures: list[tuple[int, str, str]] = []
        for name, scorer in self.scorers.items():
            found, failed = self._ask(name, scorer, traces)
            failures += failed
            without = {i for i, *_ in failed}
            for i, credit in enumerate(found):
                if i not in without and not isinstance(credit, Credit):
                    what = f"a {type(credit).__name__} for row {traces[i].meta.get('row', i)}, not a Credit"
                    raise ValueError(f"{name} gave {what}; give Credit.of_sequence(trace, number), or raise")
            parts[name] = [None if c is None else c.reduce() for c in found]
            for i, credit in enumerate(found):
                if credit is None:
                    continue
                if credit.over != "completion":
                    raise ValueError(f"{name} puts credit on the {credit.over}; a reward is over the completion")
                own = traces[i]
                if (credit.trace.completion_ids, credit.trace.tokenizer) != (own.completion_ids, own.tokenizer):
                    raise ValueError(
                        f"{name} gave completion {i} (row {own.meta.get('row', i)}) credit on other tokens; give one "
                        "credit a completion in their order, that of another tokenizer by credit.to(trace)"
                    )
                total[i].append(credit.map(lambda v: v, kind="reward", method=name))
                for part, value in credit.meta.get("parts", {}).items():
                    parts.setdefault(f"{name}.{part}", [None] * len(traces))[i] = float(value)
                for what, number in credit.meta.get("counts", {}).items():  # none where it is not said
                    parts.setdefault(f"{name}.{what}", [0.0] * len(traces))[i] = float(number)
        lost, weights = {i for i, *_ in failures}, [self.weights.get(n, 1.0) for n in self.scorers]
        credits = [None if i in lost else combine(some, weights) for i, some in enumerate(total)]
        return Rewarded(credits, parts, failures)

    def _ask(
        self, name: str, scorer: Scorer, traces: Sequence[Trace]
    ) -> tuple[list[Credit | None], list[tuple[int, str, str]]]:
        try:
            found = list(scorer.score(traces))
        except Exception as error:  # anything: it is another's code, and the row is to be found
            return self._one_by_one(name, scorer, traces, error)
        if len(found) != len(traces):
            raise ValueError(f"{name} gave {len(found)} credits for {len(traces)} completions; give one each")
        return found, []  # type: ignore[return-value]

    def _one_by_one(
        self, name: str, scorer: Scorer, traces: Sequence[Trace], together: Exception
    ) -> tuple[list[Credit | None], list[tuple[int, str, str]]]:
        found: list[Credit | None] = []
        failed: list[tuple[int, str, str]] = []
        for i, trace in enumerate(traces):
            try:
                found.append(scorer.score([trace])[0])
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                if self.on_error == "stop" or isinstance(error, NotFinite):
                    hint = "" if isinstance(error, NotFinite) else ", or go on without such rows: on_error=skip"
                    raise ValueError(
                        f"the reward {name} failed on row {trace.meta.get('row', i)} ({what}); its completion: "
                        f"{trace.text[:200]!r}. Mend the scorer or the row{hint}"
                    ) from error
                found.append(None)
                failed.append((i, name, what))
        if not failed and not isinstance(together, WorkerDied):
            what = f"{type(together).__name__}: {together}"
            raise ValueError(f"the reward {name} fails on {len(traces)} completions together, on none alone ({what})")
        return found, failed


def make_rewarder(reward: str, scorer: Any, make: Callable[..., Scorer], on_error: str = "stop") -> Rewarder:
    """The reward that options name.

    Args:
        reward: slugs of scorers with weights: ``vader``, ``vader + 0.5*toolrl``.
        scorer: from Python, beside it or in its place: a scorer, a callable (text -> number), or {name: either}.
        make: slug -> scorer.

    Raises:
        ValueError: neither is given, a sum that cannot be read, or one name twice.
    """
    scorers: dict[str, Scorer] = {}
    weights: dict[str, float] = {}
    for term in filter(None, (t.strip() for t in reward.split("+"))):
        factor, star, slug = term.rpartition("*")
        try:
            weight = float(factor) if star else 1.0
        except ValueError as error:
            raise ValueError(f"reward={reward!r}: {factor!r} is no number; write 0.5*toolrl + vader") from error
        if not math.isfinite(weight):
            raise ValueError(f"reward={reward!r}: a weight of {weight} makes no sum; give a finite one")
        slug = slug.strip()
        if slug in scorers:
            raise ValueError(f"reward={reward!r} names {slug} twice; give it one weight")
        scorers[slug], weights[slug] = make(slug), weight
    if scorer is not None:
        for name, one in (scorer if isinstance(scorer, Mapping) else {_name(scorer): scorer}).items():
            if name in scorers:
                raise ValueError(f"reward={reward!r} and scorer both name {name}; give scorer={{'another name': ...}}")
            scorers[name] = as_scorer(one)
    return Rewarder(scorers, weights, on_error)


def _name(scorer: Any) -> str:
    return str(getattr(scorer, "name", "") or getattr(scorer, "__name__", type(scorer).__name__.lower()))
