"""PPO-S: PPO on rewards that inverse RL learned from demonstrations, its advantages scaled by how hard a prompt is.

Cheng et al., "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM Alignment", ICLR 2026, arXiv
2503.18991; beside GRPO-S (`dr_irl`, whose data and alpha these are), the second trainer that the paper scales:

    A_t = alpha(q) ( GAE_t, whitened over the batch ),      the critic's targets stay GAE_t + V_t

alpha multiplies after every normalisation, so it changes the size of a step and no order; the KL penalty in the rewards
is inside A and is scaled with it. The critic learns what the rewards are, hence no alpha in its targets.

Differs from the authors' code: there is none in public; that PPO-S multiplies the advantage is all that is known of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.advantage import GAE, Advantages
from ..core.critic import KLControl
from ..core.experience import Experience, Rollouts
from ..core.irl import IRL
from ..core.policy_loss import PolicyLoss
from ._demonstrated import Demonstrated, Scaling
from ._policy_gradient import ActorCritic, ValueLoss


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """What PPO has beside the policy's loss."""

    kl: KLControl = field(default_factory=KLControl)
    """The KL penalty in the rewards."""
    gae: GAE = field(default_factory=GAE)
    """Advantages, before alpha."""
    value: ValueLoss = field(default_factory=ValueLoss)
    """The critic's loss."""


@dataclass(frozen=True, kw_only=True)
class DRIRLPPO(Demonstrated, ActorCritic):
    """Options of PPO-S."""

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
    critic: CriticOptions = field(default_factory=CriticOptions)
    """PPO's own."""
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy's loss."""
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(generations=1, inner_epochs=4))
    """How prompts are answered, and how often answers are learned from."""
    encode: Any = None
    """From Python: texts -> vectors (N, H), in the place of the encoder."""

    data: ClassVar[str] = "prompts"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    @property
    def kl(self) -> KLControl:  # type: ignore[override]
        """The KL penalty in the rewards."""
        return self.critic.kl

    @property
    def gae(self) -> GAE:  # type: ignore[override]
        """Advantages, before alpha."""
        return self.critic.gae

    @property
    def value(self) -> ValueLoss:  # type: ignore[override]
        """The critic's loss."""
        return self.critic.value

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """GAE, whitened as asked, times alpha of the prompt; returns as they are."""
        return self.scale(super().advantages(experience, reward_NT, state), experience, state)
