"""SimPO — Simple Preference Optimization with a Reference-Free Reward.

Meng, Xia, Chen, NeurIPS 2024, arXiv 2405.14734, equation 6:

    L = -log sigmoid( beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma )

The reward is beta times the mean log-prob of a response's tokens (nats a token, the terminator included); gamma is the
target margin between rewards, 0 for none. The loss is the mean over pairs.

Differs from the authors' code: the same formula. The release writes gamma as beta * gamma_beta_ratio (default 0.25, at
beta 2) and has a hinge loss and an SFT term, both off by default, which are not here. TRL 1.16 has it as a loss of
CPO: gamma is its `simpo_gamma`, and the defaults are CPO's (beta 0.1, an SFT term of weight `cpo_alpha` 1). Both log
``logps/...`` as means over tokens; here they are sums, as in every other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, length_normalized_rewards, log_sigmoid_loss, pair_loss


def simpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Losses (B,) from mean log-probs a token (B,) in nats."""
    return log_sigmoid_loss(beta * (chosen_B - rejected_B) - gamma, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """Options of SimPO."""

    beta: float = 2.0
    """beta, scale of the reward (2 to 10)."""
    gamma: float = 1.0
    """gamma, target margin between rewards; the paper tunes gamma/beta up to 1 (TRL: simpo_gamma)."""
    label_smoothing: float = 0.0
    """Share of pairs whose label is expected to be flipped (0 is the paper's loss)."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy."""
        return {"policy": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        rewards_N = length_normalized_rewards(stats, self.beta)
        margin_B = rewards_N[batch.chosen] - rewards_N[batch.rejected] - self.gamma
        return pair_loss(log_sigmoid_loss(margin_B, self.label_smoothing), rewards_N, stats, batch)
