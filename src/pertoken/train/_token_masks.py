"""What preference objectives with a weight a token share: TDPO1's sums under masks, and what is logged of them.

    u(y) = sum_t M_u,t ( log pi(y_t|.) - log pi_ref(y_t|.) )      d(y) = sum_t M_d,t KL( pi_ref(.|y_<t) || pi(.|y_<t) )
    L = -log sigmoid( beta [ (u(y_w) - u(y_l)) - (d(y_l) - d(y_w)) ] )

With all masks 1 this is TDPO1: no gradient stops at either KL. Sums run over emitted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.protocols import Batch, Loss
from ..core.stats import Stats, masked_mean, masked_sum
from ._preference import log_sigmoid_loss, pair_loss

KL = "kl_forward:reference"
READS = "the state before each token: a token that matters is expected there"  # what a map of weights must say
Masks = Mapping[str, Tensor]  # "u", "d" -> (N, T); one that is missing is 1 everywhere


def masked_terms(stats: Mapping[str, Stats], masks: Masks) -> tuple[Tensor, Tensor]:
    """u and d of each completion, (N,) each, in nats."""
    policy, mask_NT = stats["policy"], stats["policy"].mask_NT
    terms = []
    for side, x_NT in (("u", policy.logp_NT - stats["reference"].logp_NT), ("d", policy.extra[KL])):
        # what stands on other tokens may be NaN, which a product would hand to the mask's gradient
        x_NT = torch.where(mask_NT, x_NT, torch.zeros_like(x_NT))
        terms.append(masked_sum(x_NT * masks[side] if side in masks else x_NT, mask_NT))
    return terms[0], terms[1]


def masked_losses(u_N: Tensor, d_N: Tensor, batch: Batch, beta: float) -> Tensor:
    """Losses (B,) of pairs, from the masked u and d of their completions."""
    w, l = batch.chosen, batch.rejected
    return log_sigmoid_loss(beta * ((u_N[w] - u_N[l]) - (d_N[l] - d_N[w])))


def masked_loss(
    stats: Mapping[str, Stats], batch: Batch, masks: Masks, beta: float, extra_B: Tensor | float = 0.0
) -> Loss:
    """The mean over pairs, `extra_B` added to each pair's loss, with metrics.

    Rewards, and accuracies with them, are beta (u - d): the log-ratio plus the NEGATIVE KL, as the authors log them.
    ``loss_accuracy`` is the share of pairs on the right side of the loss, by u + d (TDPO's ``rewards/accuracies``), and
    ``accuracy_without_masks`` that of the policy alone, by plain log-ratios. KLs are positive sums over response
    tokens, as they are and weighted; their margins are the mean of |chosen - rejected|.
    """
    u_N, d_N = masked_terms(stats, masks)
    losses_B = masked_losses(u_N, d_N, batch, beta) + extra_B
    result = pair_loss(losses_B, (beta * (u_N - d_N)).detach(), stats, batch)
    with torch.no_grad():
        w, l, pairs = batch.chosen, batch.rejected, float(len(losses_B))
        plain_N, kl_N = masked_terms(stats, {})
        for name, x_N in (("loss_accuracy", u_N + d_N), ("accuracy_without_masks", plain_N)):
            result.metrics[name] = ((x_N[w] > x_N[l]).to(x_N.dtype).sum(), pairs)
        for name, x_N in (("kl", kl_N), ("weighted_kl", d_N)):
            result.metrics[f"{name}/chosen"] = (x_N[w].sum(), pairs)
            result.metrics[f"{name}/rejected"] = (x_N[l].sum(), pairs)
            result.metrics[f"{name}/margin"] = ((x_N[w] - x_N[l]).abs().sum(), pairs)
    return result


@torch.no_grad()
def mask_metrics(masks: Masks, mask_NT: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each mask and side, means over the sequences that have a token: ``sparsity/`` (percentage of exact zeros),
    ``l1/`` (sum of weights) and ``mean_mask/`` (what the mask multiplies beta by)."""
    out = {}
    for side, m_NT in masks.items():
        zero_N = 100 * masked_mean((m_NT == 0).to(m_NT.dtype), mask_NT)
        for where, rows in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            counted = mask_NT[rows].any(1).to(m_NT.dtype).sum()
            for name, x_N in (
                ("sparsity", zero_N),
                ("l1", masked_sum(m_NT.abs(), mask_NT)),
                ("mean_mask", masked_mean(m_NT, mask_NT)),
            ):
                out[f"{name}/{side}_{where}"] = (x_N[rows].sum(), counted)
    return out
