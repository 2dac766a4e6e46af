"""What every objective that learns from its own rollouts shares: the policy's loss, a critic's, and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.advantage import GAE, Advantages
from ..core.critic import Critic, KLControl
from ..core.experience import Experience, Rollouts
from ..core.policy_loss import PolicyLoss, aggregated, kl_losses, policy_losses, value_losses
from ..core.protocols import Batch, Loss
from ..core.stats import Stats, masked_sum

LOGP = frozenset({"logp"})
SEEN = frozenset({"logp", "entropy"})
WITH_STATE = frozenset({"logp", "entropy", "hidden"})


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Options of the critic: one linear map on the policy's last hidden states."""

    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float | None = 0.2
    """Values are held this near to those of the rollouts (None: not)."""
    critic_lr_factor: float = 1.0
    """Multiple of the policy's learning rate for the value head."""

    def __post_init__(self) -> None:
        if not (self.vf_coef >= 0 and self.critic_lr_factor > 0 and (self.value_clip is None or self.value_clip > 0)):
            raise ValueError(f"{self}: vf_coef >= 0, critic_lr_factor > 0 and value_clip > 0 (or None) are needed")


def kl_penalised(experience: Experience, state: nn.Module | None) -> Tensor:
    """r_t - kl_coef (log pi - log pi_ref) (k1), 0 outside the mask: (N, T). The coefficient then adapts."""
    assert isinstance(state, Critic)
    log_ratio_NT = experience.log_ratio()
    rewards_NT = experience.reward_NT - state.kl_coef.to(log_ratio_NT) * log_ratio_NT
    emitted_N = experience.mask_NT.any(1)  # none in a process without a row of its own
    state.observe(masked_sum(log_ratio_NT, experience.mask_NT)[emitted_N])
    return torch.where(experience.mask_NT, rewards_NT, 0.0)


def policy_gradient_loss(
    stats: Mapping[str, Stats],
    batch: Batch,
    options: PolicyLoss,
    longest: int,
    value: ValueLoss | None = None,
    state: nn.Module | None = None,
) -> Loss:
    """The policy's loss on the columns of `experience.Reinforced`, with a critic's where there is one.

    Args:
        longest: tokens that a completion may have, for ``aggregate="constant"``.

    Raises:
        ValueError: there is no column ``advantages``.
    """
    if "advantages" not in batch.columns:
        raise ValueError("there is no column 'advantages'; this objective learns from rollouts (core.rollout_step)")
    policy, columns = stats["policy"], batch.columns
    mask_NT, logp_NT = policy.mask_NT, policy.logp_NT
    old_NT = columns.get("old_logps", logp_NT.detach())
    losses_NT, metrics = policy_losses(
        logp_NT, old_NT, columns["advantages"], mask_NT, options, columns.get("sampled_logps"), _macros(batch)
    )
    tokens = mask_NT.sum()
    if options.kl_loss:
        kl_NT = kl_losses(logp_NT, stats["reference"].logp_NT, mask_NT)
        losses_NT = losses_NT + options.kl_loss * kl_NT
        metrics["kl"] = (kl_NT.detach().sum(), tokens)
    metrics["loss/policy"] = (masked_sum(losses_NT.detach(), mask_NT).sum(), tokens)
    if value is not None:
        assert isinstance(state, Critic)
        values_NT = state.values(policy.extra["hidden"])
        error_NT = value_losses(values_NT, columns["old_values"], columns["returns"], mask_NT, value.value_clip)
        losses_NT = losses_NT + value.vf_coef * error_NT
        metrics["loss/value"] = (error_NT.detach().sum(), tokens)
    total, count = aggregated(losses_NT, mask_NT, options.aggregate, longest)
    return Loss(total, count, metrics)


def _macros(batch: Batch) -> Tensor | None:
    return batch.columns["macros"].long() if "macros" in batch.columns else None


def example_columns(rng: Any, mask_NT: Tensor, critic: bool) -> dict[str, Tensor]:
    """Random columns of the shape that rollouts make, for tests."""
    names = ("advantages", *(("returns", "old_values") if critic else ()))
    draw = lambda: torch.from_numpy(rng.normal(size=tuple(mask_NT.shape))) * mask_NT
    # about the log-probs of a random model of 320 tokens, so that some ratios are clipped and some are not
    return {name: draw() for name in names} | {n: draw() - 6.0 for n in ("old_logps", "sampled_logps")}


class ActorCritic:
    """What PPO and the methods that are PPO with other rewards share; the options are fields of theirs."""

    kl: KLControl
    gae: GAE
    policy_loss: PolicyLoss
    value: ValueLoss
    rollouts: Rollouts

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
