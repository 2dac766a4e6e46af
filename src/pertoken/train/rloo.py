"""RLOO — REINFORCE Leave-One-Out: a completion's reward less the mean of the others' of its prompt, without a critic.

Ahmadian et al., "Back to Basics", ACL 2024, arXiv 2402.14740. With G completions y_i of a prompt:

    R_i = sum_t credit_t - kl_coef sum_t ( log pi(y_t) - log pi_ref(y_t) )
    A_i = R_i - mean_{j != i} R_j,           L = mean_i -A_i sum_t log pi(y_t)

(the gradient of the ratio at pi = pi_old; with several updates on the same rollouts it is clipped, as PPO's). In its
place, REINFORCE++ (Hu et al., arXiv 2501.03262): rewards to go, whitened over the batch, for any G; with or without the
group's mean as a baseline.

Differs from the authors' code: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from ..core.advantage import Advantages, LeaveOneOut, ReinforcePlusPlus
from ..core.critic import Critic, KLControl
from ..core.experience import Experience, Rollouts
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._policy_gradient import LOGP, SEEN, example_columns, kl_penalised, policy_gradient_loss

_ADVANTAGES = {
    "leave-one-out": LeaveOneOut(),
    "reinforce++": ReinforcePlusPlus(),
    "reinforce++-baseline": ReinforcePlusPlus(baseline=True),
}


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """Options of RLOO."""

    reward: str = ""
    """Scorers and their weights: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python: a scorer, a callable from text to a number, or {name: either}; added to `reward`."""
    advantage: Literal["leave-one-out", "reinforce++", "reinforce++-baseline"] = "leave-one-out"
    """How rewards become advantages."""
    kl: KLControl = field(default_factory=KLControl)
    """The KL penalty in the rewards."""
    policy_loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(aggregate="sum"))
    """The policy's loss."""
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(generations=4))
    """How prompts are answered, and how often answers are learned from."""

    data: ClassVar[str] = "prompts"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.advantage not in _ADVANTAGES:
            raise ValueError(f"advantage={self.advantage!r} is not one of {', '.join(_ADVANTAGES)}")
        if self.advantage != "reinforce++" and self.rollouts.generations < 2:
            raise ValueError(f"{self.advantage} compares completions of one prompt; give generations of 2 or more")

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of policy and reference."""
        return {"policy": SEEN, "reference": LOGP}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy (and the reference's, if the loss has a KL term)."""
        return {"policy": LOGP} | ({"reference": LOGP} if self.policy_loss.kl_loss else {})

    def init_state(self, config: Any) -> Critic:
        """The KL coefficient."""
        return Critic(config, self.kl, values=False)

    def rewards(self, experience: Experience, state: nn.Module | None) -> Tensor:
        """Credit less the KL penalty: (N, T)."""
        return kl_penalised(experience, state)

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """Rewards against the others of the prompt, or of the batch."""
        return _ADVANTAGES[self.advantage].compute(reward_NT, None, experience.groups_N, experience.mask_NT)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that rollouts make, for tests."""
        return example_columns(rng, mask_NT, critic=False)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """The policy's loss on a minibatch of rollouts."""
        return policy_gradient_loss(stats, batch, self.policy_loss, self.rollouts.sampling.max_new_tokens)
