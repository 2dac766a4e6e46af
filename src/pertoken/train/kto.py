"""KTO — Kahneman-Tversky Optimization: one response a row, each desirable or not.

Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, ICML 2024, arXiv 2402.01306, section 4:

    r = log pi(y|x) / pi_ref(y|x)                                          summed over tokens, in nats
    z0 = max(0, mean over the batch of log pi(y'|x) / pi_ref(y'|x)), y' the response to another x; no gradient
    v(x,y) = lambda_D sigmoid( beta (r - z0) ) if y is desirable, else lambda_U sigmoid( beta (z0 - r) )
    L = mean of lambda_y - v(x,y)

z0 estimates KL(pi || pi_ref) and couples the rows of a batch. The loop puts each row's y' beside it, after the same
prompt (`mismatched`): completions where the column ``mismatched_N`` is True give z0 and have no loss of their own.
`reference_point="batch"` takes the mean over the matched responses instead (cheaper, no y' is computed; larger than the
KL, for those are what is trained on), and "zero" takes z0 = 0, which couples nothing.

Differs from the authors' code: y' is the response of the next row of the data with another prompt; in the paper and
the release it is the next row's in the batch, in TRL the one before. z0 is the mean over the rows of all processes;
there it is the mean of the processes' means, which differs where they have different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.distributed import summed
from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, implicit_rewards, label_metrics

MISMATCHED = "mismatched_N"


def kl_estimate(logratio_N: Tensor, counts: bool = True) -> Tensor:
    """z0, a scalar without gradient: the mean of log-ratios (N,) over all processes, at least 0. Those of a process
    that does not count are left out."""
    share = float(counts)
    total, count = summed(share * logratio_N.sum(), share * logratio_N.new_tensor(float(len(logratio_N))))
    return (total / count.clamp(min=1)).clamp(min=0)


def kto_loss(
    logratio_N: Tensor,
    label_N: Tensor,
    z0: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Losses (N,), each from 0 to its weight, from log-ratios (N,) in nats and labels (N,), True where desirable."""
    weight_N = torch.where(label_N, logratio_N.new_tensor(desirable_weight), logratio_N.new_tensor(undesirable_weight))
    gain_N = torch.where(label_N, logratio_N - z0, z0 - logratio_N)
    return weight_N * torch.sigmoid(-beta * gain_N)  # lambda - lambda sigmoid(beta gain)


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Options of KTO."""

    beta: float = 0.1
    """beta, how fast the value saturates: risk aversion."""
    desirable_weight: float = 1.0
    """lambda_D; keep lambda_D n_D / (lambda_U n_U) between 1 and 4/3 where n_D and n_U, the rows of a label, differ."""
    undesirable_weight: float = 1.0
    """lambda_U."""
    reference_point: Literal["mismatched", "batch", "zero"] = "mismatched"
    """z0: from mismatched responses (the paper), from the batch's own, or 0."""

    data: ClassVar[str] = "unpaired"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.reference_point not in ("mismatched", "batch", "zero"):
            raise ValueError(f"reference_point={self.reference_point!r} is not one of mismatched, batch, zero")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError("desirable_weight and undesirable_weight must not be negative")

    @property
    def mismatched(self) -> bool:
        """Whether the loop puts the response of another example beside each completion."""
        return self.reference_point == "mismatched"

    @property
    def batch_coupled(self) -> bool:
        """Whether a row's loss depends on the others'."""
        return self.reference_point != "zero"

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over matched completions.

        Raises:
            ValueError: data without labels, or a batch without mismatched completions where they are wanted.
        """
        if batch.label_N is None:
            raise ValueError("KTO learns from labels; give unpaired data: prompt, completion and label")
        logratio_N = implicit_rewards(stats, 1.0)
        matched_N = ~batch.columns[MISMATCHED] if MISMATCHED in batch.columns else torch.ones_like(batch.label_N)
        r_N, label_N = logratio_N[matched_N], batch.label_N[matched_N]
        z0 = logratio_N.new_zeros(())
        if self.mismatched:
            if bool(matched_N.all()):
                raise ValueError(
                    f"KTO estimates its KL on responses to other prompts; the batch has none (column {MISMATCHED!r}): "
                    "train with the loop, which adds them, or choose reference_point='batch' or 'zero'"
                )
            z0 = kl_estimate(logratio_N[~matched_N], batch.counts)
        elif self.reference_point == "batch":
            z0 = kl_estimate(r_N, batch.counts)
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        losses_N = kto_loss(r_N, label_N, z0, beta=self.beta, **weights)
        metrics = label_metrics(self.beta * r_N.detach(), stats["policy"].sums().detach()[matched_N], label_N)
        if self.batch_coupled:  # only then does this call see the whole batch
            metrics["kl"] = (z0, 1.0)
            sides = (*metrics["rewards/chosen"], *metrics["rewards/rejected"])
            up, n_up, down, n_down = summed(*(float(batch.counts) * value for value in sides))
            if n_up > 0 and n_down > 0:
                metrics["rewards/margins"] = (up / n_up - down / n_down, 1.0)
        return Loss(losses_N.sum(), float(len(losses_N)), metrics)
