"""The one loss of policy gradients: log-probs, advantages and a mask in, losses a token out.

    rho_t = pi(y_t) / pi_old(y_t)
    token     L_t = -min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t )                  PPO, GRPO (1707.06347)
    sequence  the same with s = exp( mean_t log rho_t ), its gradient through log pi(y_t)      GSPO (2507.18071)
    macro     the same with s = exp( sum of log rho over the token's macro action )            MA-RLHF (2410.02743)
    cispo     L_t = -stop( clip(rho_t, 1 - eps, 1 + eps_high) ) A_t log pi(y_t)                CISPO (2506.13585)

Clip-higher and the token mean over the batch: DAPO (2503.14476); a fixed divisor: Dr. GRPO (2503.20783); dual clip
(1912.09729): where A < 0, L_t is at most -c A_t; truncated importance sampling: a weight min(pi_old / mu, C), without
gradient, for tokens that were drawn from mu (another engine, a temperature) rather than from pi_old.

Log-ratios are cut at +-20 before exp. Nothing here knows where an advantage comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .stats import masked_mean, masked_sum

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
_LARGEST = 20.0


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Options of the policy loss."""

    clip: float = 0.2
    """eps: the ratio is held in [1 - eps, 1 + eps]."""
    clip_high: float | None = None
    """eps_high, where it differs from eps (DAPO: 0.28)."""
    dual_clip: float | None = None
    """c > 1: bound of the ratio where the advantage is negative (3)."""
    ratio: Literal["token", "sequence", "macro", "cispo"] = "token"
    """Of single tokens, of the whole sequence (GSPO; clip about 3e-4), the product over a macro action (where the
    method has them), or CISPO's weight."""
    aggregate: Literal["token", "sequence", "constant", "sum"] = "token"
    """Mean over all tokens of the batch; mean over sequences of their token means; of their token sums by
    max_new_tokens (Dr. GRPO: constant); or of their token sums."""
    importance_cap: float | None = None
    """C: weight min(pi_old / mu, C) for what was drawn from mu; None: off."""
    kl_loss: float = 0.0
    """Weight of a KL penalty to the reference in the loss (k3: exp(d) - d - 1, d = log pi_ref - log pi)."""

    def __post_init__(self) -> None:
        if not (self.clip >= 0 and (self.clip_high is None or self.clip_high >= 0) and self.kl_loss >= 0):
            raise ValueError(f"{self}: clip, clip_high and kl_loss must not be negative")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} bounds a ratio from above; give more than 1, for example 3")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap} must be above 0, for example 2")
        for name, known in (("ratio", ("token", "sequence", "macro", "cispo")), ("aggregate", _AGGREGATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")


_AGGREGATES = ("token", "sequence", "constant", "sum")


def log_ratio(logp_NT: Tensor, old_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log pi - log pi_old, cut at +-20; 0 where the mask does not hold."""
    return torch.where(mask_NT, logp_NT - old_NT, 0.0).clamp(-_LARGEST, _LARGEST)


def policy_losses(
    logp_NT: Tensor,
    old_NT: Tensor,
    advantage_NT: Tensor,
    mask_NT: Tensor,
    options: PolicyLoss,
    sampled_NT: Tensor | None = None,
    macro_NT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Losses (N, T) of tokens, 0 where the mask does not hold, and what is logged of the ratios.

    Args:
        logp_NT: log pi, with gradient. old_NT: log pi_old, of the policy that was trained when the tokens were drawn.
        advantage_NT: advantages, without gradient.
        sampled_NT: log mu, under which the tokens were really drawn; only `importance_cap` asks for it.
        macro_NT: int64, the number of each token's macro action; only ``ratio="macro"`` asks for it.

    Raises:
        ValueError: the ratio of macro actions is asked for, and there are none; or importance sampling, without mu.
    """
    zero = torch.zeros((), dtype=logp_NT.dtype, device=logp_NT.device)
    advantage_NT = torch.where(mask_NT, advantage_NT.detach().to(logp_NT.dtype), zero)
    log_ratio_NT = log_ratio(logp_NT, old_NT.detach(), mask_NT)
    through_NT = logp_NT - logp_NT.detach()  # 0, exactly, with the gradient of log pi
    if options.ratio == "sequence":
        mean_N1 = masked_mean(log_ratio_NT, mask_NT)[:, None].detach()
        ratio_NT = torch.exp(torch.where(mask_NT, mean_N1 + through_NT, zero))
    elif options.ratio == "macro":
        if macro_NT is None:
            raise ValueError('ratio="macro" needs macro actions, which ma-rlhf makes; give ratio="token" here')
        sums_NT = torch.zeros_like(log_ratio_NT).scatter_add(1, macro_NT, log_ratio_NT.detach())
        product_NT = sums_NT.gather(1, macro_NT).clamp(-_LARGEST, _LARGEST)
        # each token carries its macro's ratio; its gradient is through its own log-prob, so that those of a macro's
        # tokens add up to the gradient of the product
        ratio_NT = torch.exp(torch.where(mask_NT, product_NT + through_NT, zero))
    else:
        ratio_NT = torch.exp(log_ratio_NT)
    high = options.clip if options.clip_high is None else options.clip_high
    clipped_NT = ratio_NT.clamp(1 - options.clip, 1 + high)
    if options.ratio == "cispo":
        losses_NT = -clipped_NT.detach() * advantage_NT * torch.where(mask_NT, logp_NT, zero)
    else:
        losses_NT = torch.maximum(-ratio_NT * advantage_NT, -clipped_NT * advantage_NT)
        if options.dual_clip is not None:
            bounded_NT = torch.minimum(losses_NT, -options.dual_clip * advantage_NT)
            losses_NT = torch.where(advantage_NT < 0, bounded_NT, losses_NT)
    if options.importance_cap is not None:
        if sampled_NT is None:
            raise ValueError(
                "importance_cap needs the log-probs under which tokens were drawn, and the generator recorded none; "
                "record sampled_logps in its traces, or leave importance_cap out"
            )
        weight_NT = torch.exp(log_ratio(old_NT.detach(), sampled_NT, mask_NT)).clamp(max=options.importance_cap)
        losses_NT = losses_NT * weight_NT
    with torch.no_grad():
        tokens = mask_NT.sum()
        low_NT = mask_NT & (ratio_NT < 1 - options.clip) & (advantage_NT < 0)
        high_NT = mask_NT & (ratio_NT > 1 + high) & (advantage_NT > 0)
        metrics: Metrics = {
            "clip_ratio/low_mean": (low_NT.sum(), tokens),
            "clip_ratio/high_mean": (high_NT.sum(), tokens),
            "policy/ratio": (masked_sum(ratio_NT, mask_NT).sum(), tokens),
            "policy/approxkl": (0.5 * masked_sum(log_ratio_NT.square(), mask_NT).sum(), tokens),
        }
    return torch.where(mask_NT, losses_NT, zero), metrics


def kl_losses(logp_NT: Tensor, reference_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """k3 estimator of KL(pi || pi_ref) a token, with gradient; 0 where the mask does not hold."""
    back_NT = log_ratio(reference_NT.detach(), logp_NT, mask_NT)
    return torch.exp(back_NT) - back_NT - 1


def value_losses(value_NT: Tensor, old_NT: Tensor, return_NT: Tensor, mask_NT: Tensor, clip: float | None) -> Tensor:
    """0.5 max( (V - R)^2, (clip(V, V_old +- eps) - R)^2 ) a token; 0 where the mask does not hold."""
    error_NT = torch.where(mask_NT, value_NT - return_NT, 0.0).square()
    if clip is not None:
        held_NT = old_NT + (value_NT - old_NT).clamp(-clip, clip)
        error_NT = torch.maximum(error_NT, torch.where(mask_NT, held_NT - return_NT, 0.0).square())
    return 0.5 * error_NT


def aggregated(losses_NT: Tensor, mask_NT: Tensor, how: str, longest: int = 0) -> tuple[Tensor, Tensor]:
    """Sum and count of losses, whose quotient over a batch is their mean as `aggregate` says.

    Args:
        longest: for ``constant``: tokens that a sequence may have.
    """
    kept_N = mask_NT.any(1)  # a completion whose tokens are all masked does not count
    if how == "token":
        return masked_sum(losses_NT, mask_NT).sum(), mask_NT.sum()
    if how == "sequence":
        return masked_mean(losses_NT, mask_NT).sum(), kept_N.sum()
    return masked_sum(losses_NT, mask_NT).sum() / (longest if how == "constant" else 1), kept_N.sum()
