"""Rewards on tokens to advantages on tokens, and to what a critic learns.

Everything takes rewards (N, T) of N completions, with what a sequence earned on its last token; `mask_NT` says which
tokens the policy emitted. Tokens that it did not emit (tool outputs) are passed over: the next state's value is that of
the next emitted token. Where papers differ (whitening over what, which variance, an epsilon where), it is an option.

GAE: Schulman et al., arXiv 1506.02438; over macro actions: Chai et al., 2410.02743; GRPO: Shao et al., 2402.03300
(outcome and process supervision); without the standard deviation: Liu et al., 2503.20783; leave-one-out: Ahmadian et
al., 2402.14740; REINFORCE++: Hu et al., 2501.03262.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .distributed import summed
from .stats import masked_sum


class Advantages(NamedTuple):
    """Advantages (N, T), 0 where the mask does not hold; and the critic's targets (N, T), or None without a critic.

    An objective may add further columns (N, T) that its loss asks for.
    """

    advantage_NT: Tensor
    return_NT: Tensor | None = None
    columns: Mapping[str, Tensor] = MappingProxyType({})


def gae(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float | Tensor = 1.0, lam: float = 0.95
) -> Advantages:
    """Generalised advantage estimates, not whitened, and returns = advantages + values.

    delta_t = r_t + gamma V_{t+1} - V_t,      A_t = delta_t + gamma lam A_{t+1},      V = A = 0 beyond the end

    Args:
        gamma: discount a step, or (N, T), float64: from each step to the next.
    """
    gamma_NT, decay_NT = (
        torch.as_tensor(g, dtype=torch.float64).to(rewards_NT).expand_as(rewards_NT) for g in (gamma, gamma * lam)
    )
    advantage_NT = torch.zeros_like(rewards_NT)
    value_N, later_N = torch.zeros_like(rewards_NT[:, 0]), torch.zeros_like(rewards_NT[:, 0])
    for t in reversed(range(rewards_NT.shape[1])):
        here_N = mask_NT[:, t]
        delta_N = rewards_NT[:, t] + gamma_NT[:, t] * value_N - values_NT[:, t]
        later_N = torch.where(here_N, delta_N + decay_NT[:, t] * later_N, later_N)
        value_N = torch.where(here_N, values_NT[:, t], value_N)
        advantage_NT[:, t] = torch.where(here_N, later_N, 0.0)
    return Advantages(advantage_NT, advantage_NT + torch.where(mask_NT, values_NT, 0.0))


Sigma = Literal["equal", "unit", "position"]


def macro_weights(macro_NT: Tensor, mask_NT: Tensor, how: Sigma = "equal", dtype: torch.dtype | None = None) -> Tensor:
    """sigma: the weight of a token within its macro action, (N, T), 0 outside the mask; 1 in sum over a macro.

    Args:
        macro_NT: int64, the number of each token's macro, counted from 0 along the row (`segment.macro_ids`).
        how: equal 1 / |omega|; unit: all on the last token; position: in proportion to 1/i for the i-th of a macro.
    """
    dtype = dtype or torch.get_default_dtype()
    if how == "unit":
        upto_NT = mask_NT.long().cumsum(1)
        last_NT = torch.zeros_like(macro_NT).scatter_reduce(1, macro_NT, torch.where(mask_NT, upto_NT, 0), "amax")
        return (mask_NT & (upto_NT == last_NT.gather(1, macro_NT))).to(dtype)
    if how == "equal":
        weight_NT = mask_NT.to(dtype)
    else:
        upto_NT = mask_NT.long().cumsum(1)
        before_NT = torch.full_like(macro_NT, macro_NT.shape[1]).scatter_reduce(
            1, macro_NT, torch.where(mask_NT, upto_NT - 1, macro_NT.shape[1]), "amin"
        )
        rank_NT = (upto_NT - before_NT.gather(1, macro_NT)).clamp(min=1)
        weight_NT = torch.where(mask_NT, 1 / rank_NT.to(dtype), 0.0)
    return torch.where(mask_NT, weight_NT / _macro_sums(weight_NT, macro_NT).gather(1, macro_NT), 0.0)


def _macro_sums(values_NT: Tensor, macro_NT: Tensor) -> Tensor:
    """Sums over macros, (N, T): the k-th column is the k-th macro's, 0 where there is none."""
    return torch.zeros_like(values_NT).scatter_add(1, macro_NT, values_NT)


def macro_gae(
    rewards_NT: Tensor,
    values_NT: Tensor,
    macro_NT: Tensor,
    mask_NT: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    sigma: Sigma = "equal",
    per: Literal["macro", "token"] = "macro",
) -> Advantages:
    """`gae` over macro actions, each token having its macro's advantage and return; with single tokens it is `gae`.

    r_tau = sum_i sigma_i r_i,    V_tau = sum_i sigma_i V_i,    delta_tau = r_tau + gamma V_{tau+1} - V_tau,
    A_tau = delta_tau + gamma lam A_{tau+1},    R_tau = A_tau + V_tau

    Args:
        macro_NT: int64, the number of each token's macro, counted from 0 along the row; macros without a token that
            was emitted are passed over.
        sigma: see `macro_weights`; the same for rewards and values.
        per: gamma discounts a macro, or each of its tokens (gamma^|omega| in place of gamma; lam stays one a macro).
    """
    sigma_NT = macro_weights(macro_NT, mask_NT, sigma, rewards_NT.dtype)
    totals = [_macro_sums(torch.where(mask_NT, sigma_NT * x, 0.0), macro_NT) for x in (rewards_NT, values_NT)]
    length_NM = _macro_sums(mask_NT.double(), macro_NT)
    found = gae(totals[0], totals[1], length_NM > 0, gamma**length_NM if per == "token" else gamma, lam)
    assert found.return_NT is not None
    spread = [torch.where(mask_NT, x.gather(1, macro_NT), 0.0) for x in (found.advantage_NT, found.return_NT)]
    return Advantages(spread[0], spread[1])


def rewards_to_go(rewards_NT: Tensor, mask_NT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each emitted token on: (N, T)."""
    return gae(rewards_NT, torch.zeros_like(rewards_NT), mask_NT, gamma, 1.0).advantage_NT


def whiten(
    values_NT: Tensor, mask_NT: Tensor, *, ddof: int = 0, eps: float = 1e-8, floor: bool = False, shift: bool = True
) -> Tensor:
    """Values with mean 0 and variance 1 over all tokens where the mask holds, over all processes; 0 elsewhere.

    Args:
        ddof: 0 or 1, what the variance is divided by less than the number of tokens.
        eps: added to the variance (TRL); with `floor`, what the variance is at least (OpenRLHF).
        shift: take the mean away, too.
    """
    zero = torch.zeros((), dtype=values_NT.dtype, device=values_NT.device)
    total, count = summed(masked_sum(values_NT, mask_NT).sum(), mask_NT.sum().to(values_NT.dtype))
    mean = total / count.clamp(min=1)
    centred_NT = torch.where(mask_NT, values_NT - mean, zero)
    variance = summed(centred_NT.square().sum())[0] / (count - ddof).clamp(min=1)
    scale = (variance.clamp(min=eps) if floor else variance + eps).rsqrt()
    return torch.where(mask_NT, (centred_NT if shift else values_NT) * scale, zero)


def group_index(groups_N: Tensor) -> tuple[Tensor, int]:
    """Groups counted from 0, (N,), and how many there are."""
    found, index_N = torch.unique(groups_N, return_inverse=True)
    return index_N, len(found)


def _group_sums(values_N: Tensor, index_N: Tensor, groups: int) -> Tensor:
    return values_N.new_zeros(groups).index_add(0, index_N, values_N)


def group_normalised(
    scores_N: Tensor, groups_N: Tensor, *, std: bool = True, ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """(score - mean of its group) / (std of its group + eps), or the difference alone: (N,).

    Scores that are all equal, and a score alone in its group, have 0.

    Args:
        groups_N: which prompt a completion answers.
        ddof: of the standard deviation: 1 is TRL's and verl's, 0 is the biased one.
        eps: 1e-4 is TRL's, 1e-6 verl's; 0 divides by the standard deviation itself.
    """
    index_N, groups = group_index(groups_N)
    count_G = _group_sums(torch.ones_like(scores_N), index_N, groups)
    centred_N = scores_N - (_group_sums(scores_N, index_N, groups) / count_G)[index_N]
    equal_N = _all_equal(scores_N, index_N, groups)[index_N]
    if std:
        variance_G = _group_sums(centred_N.square(), index_N, groups) / (count_G - ddof).clamp(min=1)
        scale_N = variance_G.sqrt()[index_N] + eps
        centred_N = centred_N / torch.where(equal_N, 1.0, scale_N)
    return torch.where(equal_N, 0.0, centred_N)


def leave_one_out(scores_N: Tensor, groups_N: Tensor) -> Tensor:
    """Score less the mean of the other scores of its group: (N,); 0 for a score alone in its group."""
    index_N, groups = group_index(groups_N)
    others_N = (_group_sums(torch.ones_like(scores_N), index_N, groups) - 1)[index_N]
    rest_N = _group_sums(scores_N, index_N, groups)[index_N] - scores_N
    return torch.where(others_N > 0, scores_N - rest_N / others_N.clamp(min=1), 0.0)


def zero_variance(scores_N: Tensor, groups_N: Tensor) -> Tensor:
    """bool (N,): all scores of the completion's group are the same, so that nothing can be learned from it."""
    index_N, groups = group_index(groups_N)
    return _all_equal(scores_N, index_N, groups)[index_N]


def _all_equal(scores_N: Tensor, index_N: Tensor, groups: int) -> Tensor:
    low = scores_N.new_full((groups,), torch.inf).scatter_reduce(0, index_N, scores_N, "amin")
    high = scores_N.new_full((groups,), -torch.inf).scatter_reduce(0, index_N, scores_N, "amax")
    # sums of the same token rewards in another order differ by rounding, which eps=0 would blow up to +-1
    return high - low <= 16 * torch.finfo(scores_N.dtype).eps * torch.maximum(low.abs(), high.abs())


def on_tokens(values_N: Tensor, mask_NT: Tensor) -> Tensor:
    """A number a completion on each of its emitted tokens: (N, T)."""
    return torch.where(mask_NT, values_N[:, None], torch.zeros((), dtype=values_N.dtype, device=values_N.device))


def on_last(values_N: Tensor, mask_NT: Tensor) -> Tensor:
    """A number a completion on the last token where the mask holds: (N, T); nowhere if it holds for none."""
    last_N = mask_NT.shape[1] - 1 - mask_NT.flip(1).int().argmax(1)
    here_NT = mask_NT & (torch.arange(mask_NT.shape[1], device=mask_NT.device) == last_N[:, None])
    return torch.where(here_NT, values_N[:, None], torch.zeros((), dtype=values_N.dtype, device=values_N.device))


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Advantages of an actor-critic."""

    gamma: float = 1.0
    """gamma, discount a token."""
    lam: float = 0.95
    """lambda of GAE: 1 sums the rewards to come, 0 looks one step ahead."""
    whitening: Literal["none", "biased", "unbiased"] = "biased"
    """Advantages over the whole buffer to mean 0 and variance 1: the variance of OpenRLHF (biased, at least 1e-8), of
    TRL (unbiased, plus 1e-8), or none. Returns are never whitened."""

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"gamma={self.gamma} and lam={self.lam} must lie between 0 and 1")
        if self.whitening not in ("none", "biased", "unbiased"):
            raise ValueError(f"whitening={self.whitening!r} is not one of none, biased, unbiased")

    def whitened(self, advantage_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Advantages as the option `whitening` says."""
        if self.whitening == "none":
            return advantage_NT
        return whiten(advantage_NT, mask_NT, ddof=int(self.whitening == "unbiased"), floor=self.whitening == "biased")

    def compute(self, rewards_NT: Tensor, values_NT: Tensor | None, groups_N: Tensor, mask_NT: Tensor) -> Advantages:
        """See `protocols.Advantage`; without values, those of a critic that says 0 (and no returns)."""
        values = torch.zeros_like(rewards_NT) if values_NT is None else values_NT
        found = gae(rewards_NT, values, mask_NT, self.gamma, self.lam)
        return Advantages(self.whitened(found.advantage_NT, mask_NT), None if values_NT is None else found.return_NT)


@dataclass(frozen=True, kw_only=True)
class GroupNormalised:
    """GRPO's advantages: a completion against the others of its prompt."""

    std: bool = True
    """Divide by the group's standard deviation (off: Dr. GRPO)."""
    ddof: int = 1
    """Of that deviation: 1 unbiased (TRL, verl), 0 biased."""
    eps: float = 1e-4
    """Added to the deviation."""
    supervision: Literal["outcome", "process"] = "outcome"
    """outcome: the sum of a completion's rewards, normalised, on all its tokens. process: token rewards are normalised
    by mean and deviation of all non-zero ones of the group, and a token has the sum of those from it on."""

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1) or not self.eps >= 0:
            raise ValueError(f"ddof={self.ddof} must be 0 or 1, and eps={self.eps} not negative")
        if self.supervision not in ("outcome", "process"):
            raise ValueError(f"supervision={self.supervision!r} is not one of outcome, process")

    def compute(self, rewards_NT: Tensor, values_NT: Tensor | None, groups_N: Tensor, mask_NT: Tensor) -> Advantages:
        """See `protocols.Advantage`."""
        how = {"std": self.std, "ddof": self.ddof, "eps": self.eps}
        if self.supervision == "outcome":
            return Advantages(on_tokens(group_normalised(masked_sum(rewards_NT, mask_NT), groups_N, **how), mask_NT))
        steps_NT = mask_NT & (rewards_NT != 0)
        normal = group_normalised(rewards_NT[steps_NT], groups_N[:, None].expand_as(steps_NT)[steps_NT], **how)
        normal_NT = torch.zeros_like(rewards_NT).masked_scatter(steps_NT, normal)
        return Advantages(rewards_to_go(normal_NT, mask_NT))


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """RLOO's advantages: a completion's reward less the mean of the others' of its prompt."""

    def compute(self, rewards_NT: Tensor, values_NT: Tensor | None, groups_N: Tensor, mask_NT: Tensor) -> Advantages:
        """See `protocols.Advantage`."""
        return Advantages(on_tokens(leave_one_out(masked_sum(rewards_NT, mask_NT), groups_N), mask_NT))


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """REINFORCE++'s advantages: rewards to go (their KL penalty among them), whitened over the whole buffer."""

    gamma: float = 1.0
    """gamma, discount a token."""
    baseline: bool = False
    """Take the mean of the prompt's group from each completion's reward first (REINFORCE++-baseline)."""

    def compute(self, rewards_NT: Tensor, values_NT: Tensor | None, groups_N: Tensor, mask_NT: Tensor) -> Advantages:
        """See `protocols.Advantage`."""
        to_go_NT = rewards_to_go(rewards_NT, mask_NT, self.gamma)
        if self.baseline:
            scores_N = masked_sum(rewards_NT, mask_NT)
            to_go_NT = on_tokens(group_normalised(scores_N, groups_N, std=False), mask_NT)
        return Advantages(whiten(to_go_NT, mask_NT, floor=True))
