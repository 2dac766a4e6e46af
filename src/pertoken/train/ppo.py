"""PPO — Proximal Policy Optimization with a critic and a KL penalty in the rewards: the RLHF baseline.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv 1707.06347; with the KL penalty of Ziegler et
al., "Fine-Tuning Language Models from Human Preferences", 2019, arXiv 1909.08593. On a rollout y of the policy:

    r_t = credit_t - kl_coef ( log pi(y_t) - log pi_ref(y_t) )
    A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t,   R_t = A_t + V_t
    L   = mean_t [ -min( rho_t A_t, clip(rho_t, 1 +- eps) A_t ) + vf_coef 0.5 max( (V - R)^2, (clip(V) - R)^2 ) ]

credit_t is whatever the reward puts on token t: a number on the last token, spans, or every token. A is whitened over
the batch of rollouts; R is not. The critic is a linear map on the policy's last hidden states.

Differs from the authors' code: implementations differ among themselves; each difference we know is an option (`gae`,
`loss`, `value`, `rollouts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..core.advantage import GAE, Advantages
from ..core.critic import Critic, KLControl
from ..core.experience import Experience, Rollouts
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._policy_gradient import LOGP, WITH_STATE, ValueLoss, example_columns, kl_penalised, policy_gradient_loss


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Options of PPO."""

    reward: str = ""
    """Scorers and their weights: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python: a scorer, a callable from text to a number, or {name: either}; added to `reward`."""
    kl: KLControl = field(default_factory=KLControl)
    """The KL penalty in the rewards."""
    gae: GAE = field(default_factory=GAE)
    """Advantages."""
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy's loss."""
    value: ValueLoss = field(default_factory=ValueLoss)
    """The critic's loss."""
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(generations=1, inner_epochs=4))
    """How prompts are answered, and how often answers are learned from."""

    data: ClassVar[str] = "prompts"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of policy and reference, and the states that the critic values."""
        return {"policy": WITH_STATE, "reference": LOGP}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs and states of the policy (and the reference's log-probs, if the loss has a KL term)."""
        return {"policy": frozenset({"logp", "hidden"})} | ({"reference": LOGP} if self.policy_loss.kl_loss else {})

    def init_state(self, config: Any) -> Critic:
        """The value head and the KL coefficient."""
        return Critic(config, self.kl, lr_factor=self.value.critic_lr_factor)

    def rewards(self, experience: Experience, state: nn.Module | None) -> Tensor:
        """Credit less the KL penalty: (N, T)."""
        return kl_penalised(experience, state)

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """GAE, whitened as asked, and returns."""
        return self.gae.compute(reward_NT, experience.value_NT, experience.groups_N, experience.mask_NT)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that rollouts make, for tests."""
        return example_columns(rng, mask_NT, critic=True)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """The policy's and the critic's loss on a minibatch of rollouts."""
        longest = self.rollouts.sampling.max_new_tokens
        return policy_gradient_loss(stats, batch, self.policy_loss, longest, self.value, state)
