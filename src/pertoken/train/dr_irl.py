"""DR-IRL: safety alignment from demonstrations: rewards by inverse RL, then GRPO scaled by hardness (GRPO-S).

Cheng, Ma, Wang, Duan, Liu, Jia, Qin, Cao, Liu, Jia, "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM
Alignment", ICLR 2026, arXiv 2503.18991. Prompts q with a demonstration (a good refusal) and a harm category j:

    r_j          by maximum-likelihood IRL from the demonstrations alone (the scorer irl-reward, `core.irl`)
    alpha_ji     = alphaD_ji alphaM_j, from one greedy answer of the policy a prompt (`_dynamic_scaling`)
    A_i          = alpha(q) ( R_i - mean R ) / std R,   std with ddof 0, no epsilon, 0 for equal rewards
    L            = mean_t -min( rho_t A_i, clip(rho_t, 1 +- eps) A_i ) + beta k3

alpha > 1: the answer differs more than average from the demonstration (alphaD), the reward separates the two by more
than the unfiltered average (alphaM). It multiplies after normalisation, so it changes the size of a step and no order.
Data: prompts with the columns ``demonstration`` and, for several reward models, ``category``.

Differs from the authors' code: there is none in public. Categories are mixed in a batch, each prompt judged by its own
category's model, where the paper trains on one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..core.advantage import Advantages, GroupNormalised
from ..core.experience import Experience, Rollouts
from ..core.irl import IRL
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._demonstrated import INACTIVE, Demonstrated, Scaling
from ._policy_gradient import LOGP, SEEN, example_columns, policy_gradient_loss


@dataclass(frozen=True, kw_only=True)
class DRIRL(Demonstrated):
    """Options of DR-IRL."""

    reward: str = ""
    """Scorers in the place of the IRL rewards: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python, likewise: a scorer, a callable from text to a number, or {name: either}."""
    reward_folder: str = ""
    """IRL rewards that were saved; else they are learned first, from the prompts' demonstrations."""
    irl: IRL = field(default_factory=IRL)
    """How rewards are learned."""
    scaling: Scaling = field(default_factory=Scaling)
    """How alpha is made."""
    advantage: GroupNormalised = field(default_factory=lambda: GroupNormalised(ddof=0, eps=0.0))
    """How rewards of a group become advantages, before alpha."""
    policy_loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(kl_loss=0.04))
    """The policy's loss; its kl_loss is beta of GRPO."""
    rollouts: Rollouts = field(default_factory=Rollouts)
    """How prompts are answered, and how often answers are learned from."""
    encode: Any = None
    """From Python: texts -> vectors (N, H), in the place of the encoder."""

    data: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        if self.rollouts.generations < 2:
            raise ValueError("GRPO-S compares completions of one prompt; give generations of 2 or more")

    @property
    def models(self) -> tuple[str, ...]:
        """The reference, if there is a KL term."""
        return ("reference",) if self.policy_loss.kl_loss else ()

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """As GRPO: log-probs of all models, or no forward at all."""
        o = self.rollouts
        asked = o.inner_epochs * o.minibatches > 1 or self.models or self.policy_loss.importance_cap is not None
        return {"policy": SEEN} | dict.fromkeys(self.models, LOGP) if asked else {}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy, and of the reference if there is a KL term."""
        return dict.fromkeys(("policy", *self.models), LOGP)

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """Rewards against those of the group, times alpha of the prompt."""
        found = self.advantage.compute(reward_NT, None, experience.groups_N, experience.mask_NT)
        return self.scale(found, experience, state)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that rollouts make, for tests."""
        return example_columns(rng, mask_NT, critic=False)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """The policy's loss on a minibatch of rollouts."""
        return policy_gradient_loss(stats, batch, self.policy_loss, self.rollouts.sampling.max_new_tokens)


__all__ = ["DRIRL", "INACTIVE", "Scaling"]
