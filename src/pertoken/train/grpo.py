"""GRPO — Group Relative Policy Optimization: a completion against the others of its prompt, without a critic.

Shao et al., "DeepSeekMath", 2024, arXiv 2402.03300. Of the G completions of a prompt, with rewards R_i:

    A_i = ( R_i - mean R ) / ( std R + eps ),      L = mean_t -min( rho_t A_i, clip(rho_t, 1 +- eps) A_i ) + beta k3

with k3 = exp(d) - d - 1, d = log pi_ref - log pi. A group whose rewards are all equal has advantages 0; their share is
logged (``frac_reward_zero_std``). Options give Dr. GRPO (advantage std=False, aggregate=constant), DAPO (clip_high,
mask_truncated, aggregate=token), GSPO (ratio=sequence, aggregate=sequence), CISPO (ratio=cispo), process supervision.

Differs from the authors' code: none is public; where TRL and verl differ (ddof, eps, what the mean is over), each is an
option. beta is 0 by default, as TRL's; the paper has 0.04.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..core.advantage import Advantages, GroupNormalised
from ..core.experience import Experience, Rollouts
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._policy_gradient import LOGP, SEEN, example_columns, policy_gradient_loss


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Options of GRPO."""

    reward: str = ""
    """Scorers and their weights: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python: a scorer, a callable from text to a number, or {name: either}; added to `reward`."""
    advantage: GroupNormalised = field(default_factory=GroupNormalised)
    """How rewards of a group become advantages."""
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy's loss; its kl_loss is beta."""
    rollouts: Rollouts = field(default_factory=Rollouts)
    """How prompts are answered, and how often answers are learned from."""

    data: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        if self.rollouts.generations < 2:
            raise ValueError("GRPO compares completions of one prompt; give generations of 2 or more (paper: 64)")

    @property
    def models(self) -> tuple[str, ...]:
        """The reference, if there is a KL term."""
        return ("reference",) if self.policy_loss.kl_loss else ()

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of all models; nothing (no forward at all) where neither a reference nor a second update asks."""
        again = self.rollouts.inner_epochs * self.rollouts.minibatches > 1
        asked = again or self.models or self.policy_loss.importance_cap is not None
        return {"policy": SEEN} | {name: LOGP for name in self.models} if asked else {}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy, and of the reference if there is a KL term."""
        return {name: LOGP for name in ("policy", *self.models)}

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """Rewards against those of the group."""
        return self.advantage.compute(reward_NT, None, experience.groups_N, experience.mask_NT)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that rollouts make, for tests."""
        return example_columns(rng, mask_NT, critic=False)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """The policy's loss on a minibatch of rollouts."""
        return policy_gradient_loss(stats, batch, self.policy_loss, self.rollouts.sampling.max_new_tokens)
