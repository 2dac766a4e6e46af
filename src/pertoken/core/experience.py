"""What reinforcement learning passes around: how rollouts are drawn, what is known of them, what an objective makes of
them. `rollout_step` is the step that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .advantage import Advantages
from .data import Group
from .rollout import Sampling
from .stats import Stats
from .trace import Trace


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """How a batch of prompts is answered, and how often it is learned from."""

    generations: int = 8
    """G, completions a prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn."""
    inner_epochs: int = 1
    """Passes over a batch of rollouts."""
    minibatches: int = 1
    """Updates a pass."""
    missing_eos_penalty: float = 0.0
    """Taken from the reward of a completion that was cut off."""
    mask_truncated: bool = False
    """Learn nothing from completions that were cut off (they stay in their group's mean)."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a scorer that fails on a row does: stop the run, or leave the row out, counted."""
    completions_every: int = 0
    """Batches between tables of completions with the credit of each token, in OUT/completions (0: none)."""

    def __post_init__(self) -> None:
        if min(self.generations, self.inner_epochs, self.minibatches) < 1 or self.completions_every < 0:
            raise ValueError(f"{self}: generations, inner_epochs and minibatches are 1 or more")
        if not math.isfinite(self.missing_eos_penalty):
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} is no amount; give a finite one (0: none)"
            )
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={self.on_error!r} is not one of stop, skip")


@dataclass(frozen=True)
class Experience:
    """N completions that were drawn and scored, for the objective to judge.

    Attributes:
        traces: the completions; groups: of each, the row it answers.
        groups_N: which prompt of the batch a completion answers.
        reward_NT: rewards on tokens (0 where the policy emitted nothing), the penalty of missing ends among them.
        mask_NT: tokens that the policy emitted.
        ended_N: whether the completion has its terminator.
        stats: of each model named in the objective's `experience`, without gradients.
        value_NT: values of the critic before each token, if there is one.
        batch: how many batches of rollouts came before.
        figures: what `rewards` and `advantages` want logged of the batch, put in by them: name -> (sum, count).
    """

    traces: tuple[Trace, ...]
    groups: tuple[Group, ...]
    groups_N: Tensor
    reward_NT: Tensor
    mask_NT: Tensor
    ended_N: Tensor
    stats: Mapping[str, Stats]
    value_NT: Tensor | None
    batch: int
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)

    def log_ratio(self, above: str = "policy", below: str = "reference") -> Tensor:
        """log-prob of each token under one model less that under another: (N, T), 0 outside the mask."""
        return torch.where(self.mask_NT, self.stats[above].logp_NT - self.stats[below].logp_NT, 0.0)


class Reinforced(Protocol):
    """An objective (`protocols.Objective`) that learns from rewards on its own rollouts.

    Its `loss` finds the columns ``advantages`` and, where there is one, ``returns`` and ``old_values`` (critic),
    ``old_logps`` (where rollouts are learned from more than once, or `experience` names the policy), ``sampled_logps``
    (under which tokens were drawn), all (N, T); ``stats["reference"]`` has the reference's log-probs if it asks.
    """

    rollouts: Rollouts
    reward: str
    scorer: Any

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Statistics wanted of each model before the updates."""
        ...

    def start(self, step: Any) -> None:
        """Buffers of ``step.state`` that depend on the data, before a checkpoint is read. Optional."""
        ...

    def before_rollouts(self, step: Any, prompts: int) -> dict[str, tuple[float, float]]:
        """Before each batch of so many prompts, over all processes: may sample from ``step.policy`` and change buffers
        of ``step.state`` (alike on all processes). Returns metrics. Optional."""
        ...

    def rewards(self, experience: Experience, state: Any) -> Tensor:
        """Rewards (N, T) that advantages are made of (KL penalties and more added). Optional."""
        ...

    def advantages(self, experience: Experience, reward_NT: Tensor, state: Any) -> Advantages:
        """Advantages (N, T), and the critic's targets."""
        ...
