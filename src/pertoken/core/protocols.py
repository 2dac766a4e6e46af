"""What the parts of the library ask of each other. Structural types: a method has the shape, it inherits nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from .credit import Credit
from .trace import Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .advantage import Advantages
    from .data import Group
    from .examples import Example
    from .lm import LM
    from .loop import LoopConfig
    from .stats import Stats


@dataclass(frozen=True)
class Batch:
    """What an objective sees beside the statistics: N completions, of B pairs or of N unpaired examples.

    Attributes:
        pairs_B2: indices of (chosen, rejected) among the N completions; None when the data are unpaired.
        columns: per-token columns (N, T) and per-completion columns (N,), by name, as `prepare` and the data gave them.
        label_N: desirable (True) or not, for unpaired data; None for pairs.
        rows: for each completion, the row of its example in the data (to name it in an error).
        counts: False where a process has no row of its own in a last, short batch and computes one without weight:
            what an objective shares over processes leaves it out.
    """

    pairs_B2: Tensor | None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    label_N: Tensor | None = None
    rows: tuple[int, ...] = ()
    counts: bool = True

    @property
    def chosen(self) -> Tensor:
        """Indices (B,) of the chosen completions."""
        return self._side(0)

    @property
    def rejected(self) -> Tensor:
        """Indices (B,) of the rejected completions."""
        return self._side(1)

    def _side(self, side: int) -> Tensor:
        if self.pairs_B2 is None:
            raise ValueError("this objective compares pairs; give data with chosen and rejected responses")
        return self.pairs_B2[:, side]


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and its count, so that accumulation and data parallelism are exact: the step minimises
    ``sum over the batch / count over the batch``.

    Attributes:
        sum: scalar tensor with gradient.
        count: what it is a sum over (pairs, examples or tokens).
        metrics: name -> (sum, count) of detached figures, averaged the same way. A name that ends in ``/max`` is the
            largest of a figure that is not negative, as (largest, 1).
    """

    sum: Tensor
    count: float | Tensor
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


@runtime_checkable
class Scorer(Protocol):
    """Values on the tokens of traces. Any callable from traces to numbers or credits can be made one (`as_scorer`)."""

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """One credit a trace, in order."""
        ...


class Objective(Protocol):
    """A training objective: frozen keyword-only options, pure methods. See `Needs` for what `stats` may ask.

    ``data`` is ``pairs``, ``unpaired``, ``sft`` or ``prompts``; ``models`` names the models besides the policy.
    Some methods are optional: ``token_stats(logits, ids)`` mixes several full distributions inside the chunk;
    ``prepare(run)`` runs stages once before training and returns nothing: it adds columns to ``run.groups``, or other
    groups in their place (all of one shape: pairs, or one completion each), and gives models (``run.give``).
    ``check(groups)`` raises a ValueError with the fix where the data lack what the method learns from, before anything
    runs. ``init_state(config)`` may return a module that is trained and checkpointed with the policy; it is in training
    mode while the policy is trained. Its ``lr_factor`` multiplies the rate, or ``parameter_groups()`` names groups of
    its own. An attribute ``rollout`` (`rollout.Sampling`) has each training batch answered by the policy as it is then,
    one sampled completion a prompt, in place of the data's responses (draws depend on the number of processes).
    An attribute ``rollouts`` makes it one that learns from rewards: see `experience.Reinforced`.
    """

    data: str
    models: tuple[str, ...]

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Statistics wanted of each model, by name."""
        ...

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None) -> Loss:
        """The loss of one batch."""
        ...


class Preparation(Protocol):
    """What `Objective.prepare` is given."""

    groups: list[Group]
    held_out: list[Group]
    policy: LM
    given: Mapping[str, LM]
    config: LoopConfig
    max_length: int | None

    @property
    def every(self) -> list[Group]:
        """Training groups, then held-out ones: both are evaluated, so both want the columns."""
        ...

    def scorer(self, slug: str, **options: Any) -> Scorer:
        """A scorer of the catalog, ready to score (models filled in)."""
        ...

    def credits(self, name: str, scorer: Scorer) -> list[list[np.ndarray]]:
        """Token values of every completion of `every` by a scorer, computed once and kept as a stage."""
        ...

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder that `make` fills, made once for all runs with these `inputs` (`stages.Stages.run`)."""
        ...

    def data_key(self) -> str:
        """Hash of `every`, for the inputs of a stage that depends on the data."""
        ...

    def train(
        self,
        slug: str,
        *,
        on: Sequence[Group] | None = None,
        config: Mapping[str, Any] | None = None,
        lora: int | None = None,
        start: LM | None = None,
        **options: Any,
    ) -> LM:
        """Another model, trained from the starting checkpoint by another method, as a stage.

        Args:
            slug: the method; options: its options.
            on: what it learns from; default: the training groups, without their columns.
            config: options of the loop that differ from the run's.
            lora: train an adapter of this rank, and merge it, instead of all weights.
            start: begin from this model; the starting checkpoint stays the reference.
        """
        ...

    def give(self, name: str, lm: LM) -> None:
        """Make `lm` the live model `name` of the objective's `stats`."""
        ...

    def start_from(self, lm: LM) -> None:
        """Begin training from the weights of `lm`, which are the reference too: the next round of a method."""
        ...

    def reward_by(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float] | None = None) -> None:
        """Score rollouts by these scorers (weighted, default 1), whatever the objective's options name."""
        ...

    def report(self, line: str) -> None:
        """A line for whoever watches the run: what preparation found, in words."""
        ...


class Advantage(Protocol):
    """Rewards to advantages (`advantage` has GAE, group-normalised, leave-one-out...)."""

    def compute(self, rewards_NT: Tensor, values_NT: Tensor | None, groups_N: Tensor, mask_NT: Tensor) -> Advantages:
        """Advantages (N, T), and what a critic learns, if there is one. `groups_N`: which prompt a completion
        answers."""
        ...


class Segmenter(Protocol):
    """Cuts a completion into macro actions, sentences, steps: the index of the first token of each piece."""

    def __call__(self, trace: Trace, logps: np.ndarray | None = None) -> Sequence[int]:
        """Strictly increasing indices, the first of them 0; nothing for an empty completion. `logps`: (T,), for
        those that look at them (which model's, the method says)."""
        ...


@dataclass(frozen=True)
class Weights:
    """What a selector says of N examples.

    Attributes:
        values: weight of each, (N,) (0: left out). scores: what it was chosen by, (N,).
        provenance: method, options, seeds. order: indices of those kept, as they should come; empty: as they came.
    """

    values: np.ndarray
    scores: np.ndarray
    provenance: Mapping[str, Any]
    order: tuple[int, ...] = ()


class Selector(Protocol):
    """Chooses data."""

    def weights(self, examples: Sequence[Example]) -> Weights:
        """A weight an example, in order."""
        ...


class FunctionScorer:
    """A plain function as a scorer: text -> number (sequence level), or trace -> values, one a completion token."""

    def __init__(self, function: Callable[..., Any], name: str = "", kind: str = "reward", on: str = "text"):
        if on not in ("text", "trace"):
            raise ValueError(f"on={on!r} is not one of text, trace")
        self.function, self.kind, self.on = function, kind, on
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """One credit a trace."""
        out = []
        for trace in items:
            value = self.function(trace.text if self.on == "text" else trace)
            if isinstance(value, Credit):
                out.append(value)
            elif np.ndim(value):
                out.append(Credit(trace=trace, values=np.asarray(value), kind=self.kind, method=self.name))
            else:
                out.append(Credit.of_sequence(trace, float(value), kind=self.kind, method=self.name))
        return out


def as_scorer(scorer: Scorer | Callable[..., Any], **options: Any) -> Scorer:
    """A scorer as it is, a callable wrapped."""
    return scorer if isinstance(scorer, Scorer) else FunctionScorer(scorer, **options)


def token_columns(credits: Sequence[Credit]) -> list[np.ndarray]:
    """The values of credits over completions, for use as a per-token column.

    Raises:
        ValueError: credit over the prompt.
    """
    for credit in credits:
        if credit.over != "completion":
            raise ValueError(f"credit of {credit.method} is over {credit.over}; a loss weighs completion tokens")
    return [credit.values for credit in credits]


Stage = Callable[[Path], None]
