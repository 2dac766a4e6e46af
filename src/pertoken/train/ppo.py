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

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.advantage import GAE
from ..core.critic import KLControl
from ..core.experience import Rollouts
from ..core.policy_loss import PolicyLoss
from ._policy_gradient import ActorCritic, ValueLoss


@dataclass(frozen=True, kw_only=True)
class PPO(ActorCritic):
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
