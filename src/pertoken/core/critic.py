"""What an actor-critic carries beside the policy: a value head on its hidden states, and the KL coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class KLControl:
    """The price of moving away from the reference, in the rewards."""

    kl_coef: float = 0.05
    """Coefficient of the KL penalty a token (the first one, if it adapts)."""
    kl_target: float | None = None
    """KL of a sequence that the coefficient adapts to (Ziegler et al., 1909.08593); None: it stays as it is."""
    kl_horizon: float = 10_000.0
    """Samples over which it adapts."""

    def __post_init__(self) -> None:
        if (
            not 0 <= self.kl_coef < torch.inf
            or not self.kl_horizon > 0
            or (self.kl_target is not None and not self.kl_target > 0)
        ):
            raise ValueError(f"{self}: kl_coef >= 0, kl_horizon > 0 and kl_target > 0 (or None) are needed")


class Critic(nn.Module):
    """Values of states, and the coefficient of the KL penalty, both checkpointed with the policy.

    Args:
        config: of the policy (its hidden size).
        control: the KL coefficient and how it adapts.
        values: whether there is a value head (one linear map on the last hidden state at the position that predicts
            a token; its gradient reaches the policy's layers).
        lr_factor: multiple of the policy's learning rate.
    """

    kl_coef: Tensor

    def __init__(self, config: Any, control: KLControl, *, values: bool = True, lr_factor: float = 1.0):
        super().__init__()
        size = config.get_text_config().hidden_size
        self.head = nn.Linear(size, 1) if values else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=(size + 1) ** -0.5)
            nn.init.zeros_(self.head.bias)
        self.control, self.lr_factor = control, lr_factor
        self.register_buffer("kl_coef", torch.tensor(float(control.kl_coef)))

    def values(self, hidden_NTH: Tensor) -> Tensor:
        """V of the state before each token: (N, T), float32 or better."""
        assert self.head is not None, "this critic has no values"
        weight, bias = self.head.weight, self.head.bias
        wide = torch.promote_types(weight.dtype, hidden_NTH.dtype)
        return (hidden_NTH.to(wide) @ weight[0].to(wide)) + bias.to(wide)

    def observe(self, kl_N: Tensor) -> None:
        """Adapt the coefficient to the KL of sequences, (N,), for the next batch: coef *= 1 + e N / horizon, with
        e = clip(KL / target - 1, -0.2, 0.2).

        Raises:
            ValueError: so many sequences for the horizon that the coefficient could change its sign.
        """
        from .distributed import summed

        if self.control.kl_target is None:
            return
        total, count = summed(kl_N.double().sum(), torch.tensor(float(len(kl_N)), device=kl_N.device))
        if 0.2 * float(count) >= self.control.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.control.kl_horizon:g} is too short for {int(count)} completions, which could "
                f"turn kl_coef negative; give more than {0.2 * float(count):g} (Ziegler et al.: 10000)"
            )
        error = float((total / count.clamp(min=1) / self.control.kl_target - 1).clamp(-0.2, 0.2))
        self.kl_coef.mul_(1 + error * float(count) / self.control.kl_horizon)
