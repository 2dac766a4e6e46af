"""What every pairwise objective shares: the log-sigmoid loss on a margin, and TRL's names for what is logged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.protocols import Batch, Loss
from ..core.stats import Stats, masked_mean

LOGP = frozenset({"logp"})


def implicit_rewards(stats: Mapping[str, Stats], beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)), summed over each completion's tokens: shape (N,)."""
    return beta * (stats["policy"].sums() - stats["reference"].sums())


def length_normalized_rewards(stats: Mapping[str, Stats], beta: float) -> Tensor:
    """beta / |y| * log pi(y|x), SimPO's reward without a reference: shape (N,); 0 for an empty completion."""
    return beta * masked_mean(stats["policy"].logp_NT, stats["policy"].mask_NT)


def log_sigmoid_loss(margin_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin), one a pair; with smoothing e, the mixture that expects a share e of flipped labels
    (Chowdhury et al., 2403.00409: conservative DPO)."""
    losses = -F.logsigmoid(margin_B)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin_B)
    return losses


def refuse_infinite(what: str, values_NT: Tensor, stats: Stats, batch: Batch) -> None:
    """Name the first emitted token of which a statistic is not finite.

    Raises:
        ValueError: there is one.
    """
    bad = stats.mask_NT & ~torch.isfinite(values_NT)
    if bad.any():
        n, t = bad.nonzero()[0].tolist()
        row = f"row {batch.rows[n]}" if batch.rows else f"completion {n}"
        raise ValueError(
            f"the {what} of token {t} of {row} is {values_NT[n, t].item()}; "
            "do not mask the vocabulary, or leave the row out"
        )


def refuse_unbounded(options: object, *names: str) -> None:
    """Refuse options that are not finite.

    Raises:
        ValueError: there is one.
    """
    for name in names:
        if not math.isfinite(getattr(options, name)):
            raise ValueError(f"{name}={getattr(options, name)} must be a finite number")


def pair_metrics(
    rewards_N: Tensor, stats: Mapping[str, Stats], batch: Batch
) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """Sums and counts over pairs, under TRL's names, so that dashboards carry over."""
    with torch.no_grad():
        chosen, rejected = rewards_N[batch.chosen], rewards_N[batch.rejected]
        logps = stats["policy"].sums()
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logps[batch.chosen],
            "logps/rejected": logps[batch.rejected],
        }
        return {name: (value.detach().sum(), float(len(value))) for name, value in values.items()}


def pair_loss(losses_B: Tensor, rewards_N: Tensor, stats: Mapping[str, Stats], batch: Batch) -> Loss:
    """The mean over pairs of `losses_B`, as sum and count, with the usual metrics."""
    return Loss(losses_B.sum(), float(len(losses_B)), pair_metrics(rewards_N, stats, batch))


def label_metrics(
    rewards_N: Tensor, logps_N: Tensor, label_N: Tensor
) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """Of unpaired data: sums and counts over the rows of each label, under TRL's names."""
    out: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    for side, where in (("chosen", label_N), ("rejected", ~label_N)):
        count = float(where.sum())
        out[f"rewards/{side}"] = (rewards_N[where].detach().sum(), count)
        out[f"logps/{side}"] = (logps_N[where].detach().sum(), count)
    return out
