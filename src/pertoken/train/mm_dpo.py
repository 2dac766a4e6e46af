"""MM-DPO — DPO with Dynamic Reward Scaling, of MM-RLHF: The Next Step Forward in Multimodal LLM Alignment.

Zhang et al. (Kwai, NJU, USTC), 2025, arXiv 2502.10391. delta is the margin of a REWARD MODEL (not of the policy), from
the data's columns ``score_chosen``, ``score_rejected``; beta is one number a pair, without gradient:

    delta = r(y_w) - r(y_l)                    beta(delta) = beta_ori ( 1 + w ( 1 - exp(-k delta) ) ) >= 1e-3
    L_MM-DPO = -log sigmoid( beta(delta) [ log pi/pi_ref(y_w) - log pi/pi_ref(y_l) ] )
    L = dpo_alpha L_MM-DPO + gamma L_SFT(y_w), mean over pairs

Log-ratios are sums over tokens, in nats; L_SFT is minus the MEAN log-prob of the chosen response's tokens, so that
gamma means the same for short and long ones. Units: k is per unit of the reward, or, with `standardize`, per standard
deviation of delta over the training pairs (divided by it, not shifted: the sign says whether the reward model agrees
with the label). exp(-k delta) explodes for very negative delta, so delta counts as -5 below that; nothing explodes
above, where the limit is beta_ori (1 + w). Logged rewards are with beta_ori.

`mode="batch_beta"` is the rule that the released file really runs (its ``implicit_beta=True``): one beta a batch, from
the policy's own margins m and a random 80 % of them, likelier near the mean; in evaluation it is beta_ori.

    beta = beta_ori ( 1 + w ( mean of the drawn m - mean m ) ) >= 1e-3    P(draw) ~ exp(-z^2/2), z = (m - mean) / std

Differs from the authors' code: its L_SFT is one mean over all chosen tokens of a batch (`sft="batch"`); its
``label_smoothing`` is 1 for none, here 0; a pair without a score gets its factor 1 (beta_ori (1 + w)), here a missing
column is refused and a NaN, or a held-out pair without one, has delta = 0 (beta_ori). delta has no bound there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.data import Group
from ..core.distributed import gathered, summed
from ..core.examples import ranked_pairs
from ..core.protocols import Batch, Loss, Preparation
from ..core.stats import Stats, masked_mean
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss

COLUMN = "beta"
FLOOR = 1e-3  # of beta
D_MAX = 5.0  # delta is at least -D_MAX
SHARE = 0.8  # of a batch's margins that set its beta


def dynamic_beta(delta: Tensor, beta: float = 0.1, w: float = 0.5, k: float = 0.5, d_max: float = D_MAX) -> Tensor:
    """beta(delta), elementwise and without gradient; beta itself where delta is not a number."""
    delta = delta.detach()
    factor = -torch.expm1(-k * delta.clamp(min=-d_max))
    factor = factor.clamp(min=-1e30)  # of a huge k: w = 0 times infinity would be NaN
    scaled = (beta * (1 + w * factor)).clamp(min=FLOOR)
    return torch.where(delta.isnan(), torch.full_like(scaled, beta), scaled)


def batch_beta(margin_B: Tensor, beta: float, w: float, generator: torch.Generator | None = None) -> Tensor:
    """The release's one beta of a batch, a scalar without gradient, from the policy's margins (B,) in nats.

    Raises:
        ValueError: fewer than two margins, which have no spread.
    """
    n = len(margin_B)
    if n < 2:
        raise ValueError(
            f"batch_beta looks at the spread of a batch's margins and this batch has {n}; choose a batch size that "
            "leaves at least two pairs in the last batch of an epoch, or mode='reward_margin'"
        )
    m = margin_B.detach().double().cpu().sort().values  # so that the draw does not depend on the order of the pairs
    z = (m - m.mean()) / (m.std() + 1e-7)  # n - 1; equal margins are drawn alike
    drawn = torch.multinomial(torch.exp(-0.5 * z**2), int(n * SHARE), replacement=False, generator=generator)
    return (beta * (1 + w * (m[drawn].mean() - m.mean()))).clamp(min=FLOOR).to(margin_B)


class Draws(nn.Module):
    """Where the draws of batch_beta come from: a seed and how many batches were drawn, both in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(1 << 62, ()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def next(self) -> torch.Generator:
        """The generator of the next batch, the same on every process."""
        self.batches += 1
        return torch.Generator().manual_seed((int(self.seed) + int(self.batches)) % (1 << 63))


@dataclass(frozen=True, kw_only=True)
class MMDPO:
    """Options of MM-DPO."""

    beta: float = 0.1
    """beta_ori, strength of the constraint to the reference where delta = 0."""
    w: float = 0.5
    """w, most that beta grows by, as a share (the release's script: 0.1; 0 is DPO)."""
    k: float = 0.5
    """k, how fast it grows with delta, per unit of the reward (or of its standard deviation)."""
    gamma: float = 0.25
    """gamma, weight of the SFT term on the chosen response."""
    dpo_alpha: float = 1.0
    """Weight of the preference term."""
    label_smoothing: float = 0.0
    """Share of pairs expected to be flipped; 0 is none (the release counts the other way round)."""
    mode: Literal["reward_margin", "batch_beta"] = "reward_margin"
    """The paper's rule from a reward model's scores, or the released file's, which needs no scores."""
    standardize: bool = False
    """Divide delta by its standard deviation over the training pairs, so that k does not depend on the reward."""
    drop_disagreeing: bool = False
    """Leave out training pairs with delta <= 0, on which the reward model disagrees with the label."""
    sft: Literal["pair", "batch"] = "pair"
    """L_SFT: mean over each response's tokens, then over pairs; or (the release) over all chosen tokens of a batch."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not FLOOR <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be finite and at least {FLOOR}, below which no pair's beta falls")
        for name in ("w", "gamma", "dpo_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.k < math.inf:
            raise ValueError(f"k={self.k} must be above 0; to switch the scaling off, set w=0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5); 0 is ordinary DPO here")
        if self.mode not in ("reward_margin", "batch_beta") or self.sft not in ("pair", "batch"):
            raise ValueError(f"mode={self.mode!r} and sft={self.sft!r}: reward_margin or batch_beta, pair or batch")

    @property
    def batch_coupled(self) -> bool:
        """Whether a batch is more than its pairs."""
        return self.mode == "batch_beta" or self.sft == "batch"

    @property
    def stochastic(self) -> bool:
        """Whether it draws."""
        return self.mode == "batch_beta"

    @property
    def least_pairs(self) -> int:
        """Fewest pairs of a batch."""
        return 2 if self.mode == "batch_beta" else 1

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def init_state(self, config: Any) -> nn.Module | None:
        """Where draws come from, if there are any."""
        return Draws() if self.mode == "batch_beta" else None

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse data without any scores, before anything runs; held-out pairs alone need none."""
        bare = self.mode == "reward_margin" and all(g.example.scores is None for g in groups)
        for group in groups[:bare]:
            _delta(group, trains=True)

    def prepare(self, run: Preparation) -> None:
        """Give every group the column ``beta``, and report how the reward model sees the labels.

        Raises:
            ValueError: a training pair without scores; no pair left; equal deltas that are to be standardised.
        """
        if self.mode == "batch_beta":
            return
        deltas = np.array([_delta(g, trains=i < len(run.groups)) for i, g in enumerate(run.every)])
        train, finite = deltas[: len(run.groups)], np.isfinite(deltas)
        known = train[np.isfinite(train)]
        if len(missing := np.flatnonzero(~finite)):
            row = run.every[missing[0]].example.row
            run.report(
                f"mm-dpo: warning: {len(missing)} pairs have no finite delta (row {row} first): beta is beta_ori"
            )
        if len(known) > 1 and np.ptp(known) == 0:
            found = f"all {len(known)} training pairs have delta = {known[0]:g}"
            if self.standardize:
                raise ValueError(f"{found}, which has no standard deviation; give graded scores, or standardize=False")
            run.report(f"mm-dpo: warning: {found}, so all have the same beta: this is DPO; give graded scores")
        unit = float(known.std()) if self.standardize and len(known) > 1 else 1.0
        scaled = torch.from_numpy(np.where(finite, deltas, np.nan) / unit)
        betas = dynamic_beta(scaled, self.beta, self.w, self.k).tolist()
        for group, beta in zip(run.every, betas, strict=True):
            group.add_column(COLUMN, beta)
        against, floor = int((known <= 0).sum()), int(np.sum(np.array(betas[: len(train)]) <= FLOOR))
        unit_said = f"unit: standard deviation {unit:.4g}" if self.standardize else "unit: the reward's own"
        run.report(
            f"mm-dpo: delta <= 0 in {against} of {len(known)} training pairs ({unit_said}); beta {min(betas):.4g} to "
            f"{max(betas):.4g}, mean {np.mean(betas):.4g}, {floor} at the floor"
        )
        if self.drop_disagreeing:
            run.groups = [g for g, d in zip(run.groups, train, strict=True) if not d <= 0]
            run.report(f"mm-dpo: {against} training pairs with delta <= 0 were dropped (drop_disagreeing)")
            if not run.groups:
                raise ValueError("drop_disagreeing left no training pair; look at the scores, or switch it off")

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.from_numpy(rng.uniform(0.05, 0.15, len(mask_NT)))}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs.

        Raises:
            ValueError: there is no column ``beta``; batch_beta with a batch of one pair.
        """
        u_N = implicit_rewards(stats, 1.0)
        beta_B = self._beta(u_N[batch.chosen] - u_N[batch.rejected], batch, state)
        margin_B = beta_B * u_N[batch.chosen] - beta_B * u_N[batch.rejected]  # in this order, w = 0 is DPO to the bit
        preference_B = self.dpo_alpha * log_sigmoid_loss(margin_B, self.label_smoothing)
        nll_B = -masked_mean(stats["policy"].logp_NT, stats["policy"].mask_NT)[batch.chosen]
        sft_B = self._per_batch(nll_B, stats["policy"].lengths()[batch.chosen], batch) if self.sft == "batch" else nll_B
        losses_B = preference_B + self.gamma * sft_B if self.gamma else preference_B
        result = pair_loss(losses_B, self.beta * u_N.detach(), stats, batch)
        result.metrics["beta/mean"] = (beta_B.sum(), result.count)
        result.metrics["sft/chosen"] = (sft_B.detach().sum(), result.count)
        return result

    def _beta(self, margin_B: Tensor, batch: Batch, state: nn.Module | None) -> Tensor:
        if self.mode == "batch_beta":
            if not isinstance(state, Draws) or not state.training:
                return torch.full_like(margin_B, self.beta).detach()
            everywhere = gathered(margin_B.detach()[: None if batch.counts else 0])
            return batch_beta(everywhere, self.beta, self.w, state.next()).expand(len(margin_B))
        if COLUMN not in batch.columns:
            raise ValueError(f"MM-DPO needs the column {COLUMN!r}, which is not there; run prepare, or add it")
        return batch.columns[COLUMN][batch.chosen].detach().to(margin_B)

    def _per_batch(self, nll_B: Tensor, length_B: Tensor, batch: Batch) -> Tensor:
        """What each pair adds to the mean over all chosen tokens, scaled so that their mean over pairs is that mean."""
        own = length_B.to(nll_B) * float(batch.counts)
        pairs, tokens = summed(torch.full_like(own, float(batch.counts)).sum(), own.sum())
        return nll_B * length_B * (pairs / tokens.clamp(min=1))


def _delta(group: Group, *, trains: bool) -> float:
    scores = group.example.scores if trains else group.example.scores or (math.nan, math.nan)
    if scores is None:
        raise ValueError(
            f"row {group.example.row} has no scores; MM-DPO needs a reward model's: columns score_chosen and "
            "score_rejected (or mode='batch_beta', which looks at the policy's own margins)"
        )
    return float(scores[0]) - float(scores[1])


__all__ = ["MMDPO", "batch_beta", "dynamic_beta", "ranked_pairs"]
