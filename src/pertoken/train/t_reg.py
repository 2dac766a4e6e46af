"""T-REG — Preference Optimization with Token-Level Reward Regularization.

Zhou, Zhang, Zhao, Meng (Zoom), ACL 2025, arXiv 2412.02685. rhat_t is a reward of token t that is computed once before
training and gets no gradient (by default self-generated: scorer `contrastive-prompt`); sums run over tokens:

    L_REG(x,y) = - sum_t beta rhat_t log pi(y_t|x,y_<t)
    w = sigmoid( r(y_l) - r(y_w) ), no gradient                         r = beta sum_t log pi/pi_ref (DPO's reward)
    L = L_DPO + alpha w ( L_REG(x,y_w) + L_REG(x,y_l) ), mean over pairs

Both regularisers have the same sign. The gradient is DPO's with tilted token weights:

    -beta w [ sum_t (1 + alpha rhat_t) grad log pi(y_w,t) - sum_t (1 - alpha rhat_t) grad log pi(y_l,t) ]

SimPO (`base="simpo"`): r = beta/|y| sum_t log pi, w = sigmoid(r(y_l) - r(y_w) + gamma), and L_REG is divided by |y|.

Units: log-probs in nats; rhat in (-0.5, 0.5) from `contrastive` and `dpo`, 1 or 0 from `sft`, as given from `credit`.
`dpo` (the paper's ablation) trains a DPO model and takes rhat = sigmoid(log pi_dpo - log pi_ref) - 0.5; the squashing
is our reading, so that |rhat| < 0.5 holds there too. `alpha=0` is DPO (SimPO) to the bit and prepares nothing.

Differs from the authors' code: it was not released when this was written. The SimPO form is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.data import Group
from ..core.protocols import Batch, Loss, Preparation, as_scorer
from ..core.stats import Stats, masked_mean, masked_sum
from ._preference import (
    LOGP,
    implicit_rewards,
    length_normalized_rewards,
    log_sigmoid_loss,
    pair_loss,
    refuse_infinite,
    refuse_unbounded,
)

COLUMN = "token_reward"
INERT = 0.01  # mean |rhat| below which the regulariser does next to nothing
_CHOICES = {
    "base": ("dpo", "simpo"),
    "weight": ("sequence", "static"),
    "token_reward": ("contrastive", "dpo", "credit", "sft"),
    "scope": ("both", "chosen"),
}


def token_reward_from_logratio(logp_better: Tensor, logp_worse: Tensor) -> Tensor:
    """rhat = sigmoid(logp_better - logp_worse) - 0.5, elementwise and without gradient, any shape; computed as
    tanh(x/2)/2, so that swapping the arguments negates it exactly.

    Raises:
        ValueError: a log-prob that is not finite (says where).
    """
    for logp in (logp_better, logp_worse):
        bad = (~torch.isfinite(logp)).nonzero()
        if len(bad):
            where = tuple(bad[0].tolist())
            raise ValueError(f"the log-prob of token {where} is {logp[where].item()}; do not mask the vocabulary")
    return 0.5 * torch.tanh(0.5 * (logp_better - logp_worse)).detach()


def regularizer(logp_NT: Tensor, token_reward_NT: Tensor, mask_NT: Tensor, beta: float, mean: bool = False) -> Tensor:
    """L_REG of each completion, shape (N,): a sum over its tokens (or, for SimPO, their mean); 0 if it has none."""
    rhat_NT = torch.where(mask_NT, token_reward_NT.detach().to(logp_NT), torch.zeros_like(logp_NT))
    return -beta * (masked_mean if mean else masked_sum)(rhat_NT * logp_NT, mask_NT)


def t_reg_loss(margin_B: Tensor, reg_B: Tensor, alpha: float = 0.25, weight: str = "sequence") -> Tensor:
    """Losses (B,) of pairs.

    Args:
        margin_B: r(y_w) - r(y_l), for SimPO less gamma.
        reg_B: L_REG(x,y_w) + L_REG(x,y_l), or the first alone.
        alpha: weight of the regulariser.
        weight: ``sequence`` (w = sigmoid(-margin), no gradient) or ``static`` (w = 1).
    """
    w_B = torch.sigmoid(-margin_B).detach() if weight == "sequence" else torch.ones_like(margin_B)
    return log_sigmoid_loss(margin_B) + alpha * w_B * reg_B


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """How the model is asked for its own token rewards: options of the scorer `contrastive-prompt`."""

    axis: str = "helpfulness"
    """helpfulness (the paper's four axes) or tone."""
    draft: bool = True
    """Show the response as a draft to revise; switch it off for small models."""
    better: str = ""
    """A prompt of your own with {question} and {draft}; overrides axis and draft."""
    worse: str = ""
    """Its opposite."""


@dataclass(frozen=True, kw_only=True)
class TReg:
    """Options of T-REG."""

    alpha: float = 0.25
    """alpha, weight of the regulariser; searched in 0.1, 0.25, 0.5."""
    beta: float = 0.1
    """beta of the base: 0.01 to 0.1 for DPO, 2 to 10 for SimPO."""
    base: Literal["dpo", "simpo"] = "dpo"
    """The sequence-level loss that is regularised."""
    gamma: float = 1.0
    """gamma, SimPO's target margin: 0.3 to 0.5 of beta. DPO has none."""
    weight: Literal["sequence", "static"] = "sequence"
    """w: sigmoid of the pair's negative margin, or 1 (ablation)."""
    token_reward: Literal["contrastive", "dpo", "credit", "sft"] = "contrastive"
    """Where rhat comes from: the model itself; a DPO model (ablation); the data's column token_reward, which any credit
    can fill; or 1 on the chosen and 0 on the rejected response (the SFT baseline)."""
    scope: Literal["both", "chosen"] = "both"
    """Which responses are regularised (chosen: ablation)."""
    contrastive: Contrastive = field(default_factory=Contrastive)
    """The two prompts."""
    scorer: Any = None
    """From Python: any scorer, or a callable from a trace to one value a token, in place of `contrastive-prompt`."""

    data: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        refuse_unbounded(self, "alpha", "beta", "gamma")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if self.base == "simpo" and self.gamma < 0:
            raise ValueError(f"gamma={self.gamma}: a target margin is not negative; 0.3 to 0.5 of beta")
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} must not be negative; to turn rhat round, swap better and worse")

    @property
    def models(self) -> tuple[str, ...]:
        """DPO has a reference, SimPO none."""
        return ("reference",) if self.base == "dpo" else ()

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy, and of the reference if there is one."""
        return {name: LOGP for name in ("policy", *self.models)}

    def prepare(self, run: Preparation) -> None:
        """Give every group the column ``token_reward``, one value a completion token, and report mean |rhat|.

        Raises:
            ValueError: ``token_reward="credit"`` and a row without that column.
        """
        if self.base == "simpo" and self.beta < 1:
            run.report(f"t-reg: warning: beta={self.beta} is of DPO's scale; SimPO's is 2 to 10, with gamma half of it")
        if self.alpha == 0:
            return
        if self.token_reward == "credit":
            _check_column(run.every)
        else:
            for group, values in zip(run.every, self._token_rewards(run), strict=True):
                group.add_column(COLUMN, [v * trace.mask for v, trace in zip(values, group.traces, strict=True)])
        own = self.token_reward == "contrastive" and self.scorer is not None
        _report(run, "scorer" if own else self.token_reward)

    def _token_rewards(self, run: Preparation) -> list[list[np.ndarray]]:
        if self.token_reward == "sft":
            return [[np.full(len(trace), 1.0 - k) for k, trace in enumerate(group.pair)] for group in run.every]
        if self.token_reward == "dpo":
            trained = run.train("dpo", beta=self.beta if self.base == "dpo" else 0.1)  # SimPO's is of another scale
            ratios = run.credits("dpo-logratio", run.scorer("logratio", beta=1.0, policy=trained))
            squash = lambda v: token_reward_from_logratio(torch.tensor(v), torch.zeros(len(v))).numpy()
            return [[squash(values) for values in completions] for completions in ratios]
        if self.scorer is not None:
            return run.credits("token-reward", as_scorer(self.scorer, on="trace"))
        return run.credits("token-reward", run.scorer("contrastive-prompt", **asdict(self.contrastive)))

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.from_numpy(rng.uniform(-0.5, 0.5, tuple(mask_NT.shape))) * mask_NT}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs.

        Raises:
            ValueError: there is no column ``token_reward``; a log-prob that is not finite (says where).
        """
        for name in self.stats:
            refuse_infinite(f"{name}'s log-prob", stats[name].logp_NT, stats[name], batch)
        policy, simpo = stats["policy"], self.base == "simpo"
        rewards_N = length_normalized_rewards(stats, self.beta) if simpo else implicit_rewards(stats, self.beta)
        margin_B = rewards_N[batch.chosen] - rewards_N[batch.rejected]
        margin_B = margin_B - self.gamma if simpo else margin_B
        if self.alpha == 0:
            return pair_loss(log_sigmoid_loss(margin_B), rewards_N, stats, batch)
        if COLUMN not in batch.columns:
            raise ValueError(f"T-REG needs the column {COLUMN!r}, which is not there; run prepare, or add it")
        rhat_NT = batch.columns[COLUMN]
        reg_N = regularizer(policy.logp_NT, rhat_NT, policy.mask_NT, self.beta, mean=simpo)
        reg_B = reg_N[batch.chosen] + reg_N[batch.rejected] if self.scope == "both" else reg_N[batch.chosen]
        result = pair_loss(t_reg_loss(margin_B, reg_B, self.alpha, self.weight), rewards_N, stats, batch)
        with torch.no_grad():
            pairs, w_B = float(len(reg_B)), torch.sigmoid(-margin_B)
            size = masked_sum(rhat_NT.abs().to(reg_N.dtype), policy.mask_NT).sum()
            result.metrics["reg/weight"] = (w_B.sum() if self.weight == "sequence" else pairs, pairs)
            result.metrics["reg/chosen"] = (reg_N[batch.chosen].sum(), pairs)
            result.metrics["reg/rejected"] = (reg_N[batch.rejected].sum(), pairs)
            result.metrics["reg/token_reward"] = (size, policy.lengths().sum())
        return result


def _check_column(groups: list[Group]) -> None:
    """Every row has token rewards of its own: added to its group, or read with the data."""
    for group in groups:
        if COLUMN not in group.columns and COLUMN in group.example.extra:
            group.add_column(COLUMN, group.example.extra[COLUMN])
        values = group.columns.get(COLUMN)
        if not isinstance(values, list) or not all(np.ndim(v) for v in values):
            raise ValueError(
                f"token_reward='credit' needs the column {COLUMN!r} with one value a token, which row "
                f"{group.example.row} lacks; score the data and add it: group.add_column({COLUMN!r}, [c.values ...])"
            )


def _report(run: Preparation, source: str) -> None:
    """Say how large the token rewards are, and what is odd about the pairs."""
    size, tokens, empty, same = 0.0, 0, [], []
    for group in run.every:
        for trace, values in zip(group.traces, group.columns[COLUMN], strict=True):
            size += float(np.abs(np.asarray(values)[trace.mask]).sum())
            tokens += int(trace.mask.sum())
        if not all(len(trace) for trace in group.traces):
            empty.append(group.example.row)
        elif len({trace.completion_ids for trace in group.traces}) < len(group.traces):
            same.append(group.example.row)
    mean = size / max(tokens, 1)
    run.report(f"t-reg: mean |rhat| {mean:.4f} on {tokens} tokens ({source})")
    if mean < INERT:
        advice = "a small model answers to axis='tone' with draft=False" if source == "contrastive" else "scale it up"
        run.report(f"t-reg: warning: mean |rhat| is below {INERT}, so the regulariser is nearly inert; {advice}")
    if empty:
        run.report(f"t-reg: warning: an empty response in {len(empty)} pairs (row {empty[0]} first): its L_REG is 0")
    if same:
        run.report(f"t-reg: warning: identical responses in {len(same)} pairs (row {same[0]} first): only rhat trains")
