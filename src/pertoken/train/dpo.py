"""DPO — Direct Preference Optimization.

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn, NeurIPS 2023, arXiv 2305.18290, equation 7:

    L = -log sigmoid( beta [log pi(y_w|x)/pi_ref(y_w|x)] - beta [log pi(y_l|x)/pi_ref(y_l|x)] )

Sequence log-probs are sums over response tokens, the terminator included; the loss is the mean over pairs.

Differs from the authors' code: nothing known. `label_smoothing` is the conservative DPO of 2403.00409.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Losses (B,) from summed log-probs (B,) in nats."""
    margin = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    return log_sigmoid_loss(margin, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Options of DPO."""

    beta: float = 0.1
    """beta, strength of the KL constraint to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs whose label is expected to be flipped (0 is plain DPO)."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        rewards_N = implicit_rewards(stats, self.beta)
        losses_B = log_sigmoid_loss(rewards_N[batch.chosen] - rewards_N[batch.rejected], self.label_smoothing)
        return pair_loss(losses_B, rewards_N, stats, batch)
