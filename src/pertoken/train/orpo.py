"""ORPO — Odds Ratio Preference Optimization: one stage, without a reference model.

Hong, Lee, Thorne, EMNLP 2024, arXiv 2403.07691, equations 4, 6 and 7. P(y|x) is the geometric mean of the probabilities
of a response's tokens, log P(y|x) = 1/|y| log pi(y|x):

    odds(y|x) = P(y|x) / (1 - P(y|x))           L_OR = -log sigmoid( log [ odds(y_w|x) / odds(y_l|x) ] )
    L = L_SFT + lambda L_OR                     L_SFT = -log P(y_w|x)

Log-probs are in nats; the loss is the mean over pairs, each pair's L_SFT being a mean over its own tokens.

Differs from the authors' code: that averages L_SFT over all tokens of the batch and, unless told otherwise, of the
prompt, too; so does TRL 1.16 (its beta is lambda). Both round log-odds where a response is nearly certain (the release
computes log sigmoid in two steps and the loss in bfloat16); here log P is held a rounding error below 0 and the result
is finite everywhere. TRL logs ``logps/...`` as means over tokens; here they are sums, as in every other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, length_normalized_rewards, log_sigmoid_loss, pair_loss


def log_odds(logp: Tensor) -> Tensor:
    """log (p / (1 - p)) from log p <= 0, of any shape, finite with finite gradients up to p = 1.

    1 - p is -expm1(log p), which is exact near p = 1; far from it, an error of 1 - p is lost beside log p.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def orpo_loss(chosen_B: Tensor, rejected_B: Tensor, *, lam: float = 0.1) -> Tensor:
    """Losses (B,) from mean log-probs a token (B,) in nats."""
    return -chosen_B + lam * log_sigmoid_loss(log_odds(chosen_B) - log_odds(rejected_B))


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """Options of ORPO."""

    lam: float = 0.1
    """lambda, weight of the odds-ratio loss (TRL: beta); 0 is SFT on the chosen responses, by sequence means."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ValueError(f"lam={self.lam} must not be negative")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy."""
        return {"policy": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        mean_N = length_normalized_rewards(stats, 1.0)
        chosen_B, rejected_B = mean_N[batch.chosen], mean_N[batch.rejected]
        result = pair_loss(orpo_loss(chosen_B, rejected_B, lam=self.lam), self.lam * mean_N, stats, batch)
        with torch.no_grad():
            odds_B = log_odds(chosen_B) - log_odds(rejected_B)
            named = {"nll_loss": -chosen_B, "log_odds_ratio": -log_sigmoid_loss(odds_B), "log_odds_chosen": odds_B}
            result.metrics.update({name: (value.sum(), float(len(value))) for name, value in named.items()})
        return result
