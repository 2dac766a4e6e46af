"""TDPO — Token-level Direct Preference Optimization (TDPO1, TDPO2).

Zeng, Liu, Ma, Yang, Zhang, Wang, ICML 2024, arXiv 2404.11999. With sums over the tokens t of a response y:

    u(x,y) = sum_t log pi(y_t|.) - log pi_ref(y_t|.)                   D(x,y) = sum_t KL( pi_ref(.|.) || pi(.|.) ) >= 0
    TDPO1: logits = [u(y_w) - u(y_l)] - [D(y_l) - D(y_w)]              gradient through both KLs
    TDPO2: logits = [u(y_w) - u(y_l)] - alpha [D(y_l) - sg(D(y_w))]    sg: no gradient
    L = -log sigmoid(beta * logits), mean over pairs

u and D are in nats and summed over emitted tokens, the terminator included. The KL is forward (the reference comes
first) and over the whole vocabulary: `core.stats` makes it inside the chunk, from both models, so that cached log-probs
of the labels are not enough. Logged rewards are beta * (u + D), as in the release, and so are
``rewards/accuracies``; ``accuracy_without_kl`` compares u alone.

Differs from the authors' code: the reference goes through log_softmax with 0 log 0 = 0 (the release takes log(softmax),
which is NaN where a probability underflows). Its yaml and its function disagree on which variant is the default; here
it is TDPO2, the only one that alpha belongs to. The release advises TDPO1 for low and TDPO2 for higher learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats, masked_sum
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss, refuse_unbounded

KL = "kl_forward:reference"


def tdpo_logits(
    u_chosen: Tensor, u_rejected: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, alpha: float, variant: str
) -> Tensor:
    """What beta multiplies, shape (B,), from log-ratios u and forward KLs D, both summed over tokens, in nats."""
    if variant == "tdpo2" and alpha == 0:  # DPO, whatever the KLs are
        return u_chosen - u_rejected
    if variant == "tdpo1":
        return (u_chosen - u_rejected) - (kl_rejected - kl_chosen)
    return (u_chosen - u_rejected) - alpha * (kl_rejected - kl_chosen.detach())


def tdpo_loss(
    u_chosen: Tensor,
    u_rejected: Tensor,
    kl_chosen: Tensor,
    kl_rejected: Tensor,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> Tensor:
    """Losses (B,) from log-ratios u and forward KLs D of shape (B,), both summed over tokens, in nats."""
    return log_sigmoid_loss(beta * tdpo_logits(u_chosen, u_rejected, kl_chosen, kl_rejected, alpha, variant))


@dataclass(frozen=True, kw_only=True)
class TDPO:
    """Options of TDPO."""

    beta: float = 0.1
    """beta, strength of the constraint to the reference."""
    alpha: float = 0.5
    """alpha, share of the KL difference in TDPO2 (0 is DPO); TDPO1 has none."""
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2"
    """tdpo1: exact likelihood, for low learning rates; tdpo2: no gradient through the chosen KL, for higher ones."""
    length_normalize: bool = False
    """Divide u and D by the response's tokens, so that long responses do not dominate (not in the paper)."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        refuse_unbounded(self, "alpha", "beta")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} must not be negative, which would reward divergence")
        if self.variant not in ("tdpo1", "tdpo2"):
            raise ValueError(f"variant={self.variant!r} is not one of tdpo1, tdpo2")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models, and the KL from the reference's whole distribution to the policy's."""
        return {"policy": LOGP | {KL}, "reference": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs. An infinite KL (a vocabulary that is masked for the policy alone) makes the loss NaN, so
        that the loop stops, saves and names the row; on the chosen side it would pass for a pair without loss."""
        policy = stats["policy"]
        u_N = implicit_rewards(stats, 1.0)
        kl_N = masked_sum(policy.extra[KL], policy.mask_NT)
        kl_N = torch.where(torch.isfinite(kl_N), kl_N, torch.nan)
        if self.length_normalize:
            length_N = policy.lengths().clamp(min=1)
            u_N, kl_N = u_N / length_N, kl_N / length_N
        w, l = batch.chosen, batch.rejected
        losses_B = tdpo_loss(u_N[w], u_N[l], kl_N[w], kl_N[l], self.beta, self.alpha, self.variant)
        result = pair_loss(losses_B, self.beta * (u_N + kl_N).detach(), stats, batch)
        with torch.no_grad():
            right = (u_N[w] > u_N[l]).to(u_N.dtype)
            more = {"accuracy_without_kl": right, "kl/chosen": kl_N[w], "kl/rejected": kl_N[l]}
            result.metrics.update({name: (value.sum(), float(len(value))) for name, value in more.items()})
        return result
