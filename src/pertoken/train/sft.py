"""SFT — supervised fine-tuning: imitate the response. The baseline that every preference method starts from.

The negative log-likelihood of the emitted tokens of a response y of |y| tokens, prompts left out:

    L = - sum_i sum_t log pi(y_it | x_i, y_i,<t) / sum_i |y_i|          average="token", the default
    L = - 1/n sum_i 1/|y_i| sum_t log pi(y_it | x_i, y_i,<t)            average="sequence"

Log-probs are in nats; the terminator is a token of the response. A token mean lets long responses weigh more. It is a
mean over the whole update (sum and count), however the batch is cut. Pairs are turned into their chosen responses by
the data layer.

Differs from the authors' code: there is none. TRL 1.16's SFTTrainer (loss "nll") has the same token mean over a batch,
but of all tokens when the data are plain text; it logs entropy, too, which would cost a pass over the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats, masked_mean, masked_sum


def sft_loss(logp_NT: Tensor, mask_NT: Tensor, average: str = "token") -> tuple[Tensor, Tensor]:
    """Sum of the loss and what it is a sum over (emitted tokens, or completions), from log-probs (N, T) in nats."""
    if average == "sequence":
        return -masked_mean(logp_NT, mask_NT).sum(), torch.tensor(float(len(logp_NT)))
    return -masked_sum(logp_NT, mask_NT).sum(), mask_NT.sum()


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Options of SFT."""

    average: Literal["token", "sequence"] = "token"
    """Mean over all tokens of the batch, or over responses of each one's mean."""

    data: ClassVar[str] = "sft"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.average not in ("token", "sequence"):
            raise ValueError(f"average={self.average!r} is not one of token, sequence")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs, and ranks for the accuracy."""
        return {"policy": frozenset({"logp", "rank"})}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over emitted tokens, or over completions."""
        policy = stats["policy"]
        total, count = sft_loss(policy.logp_NT, policy.mask_NT, self.average)
        with torch.no_grad():
            tokens, completions = policy.mask_NT.sum(), float(len(policy.mask_NT))
            right = ((policy.extra["rank"] == 0) & policy.mask_NT).sum()
            metrics = {
                "mean_token_accuracy": (right, tokens),
                "logps/chosen": (policy.sums().sum(), completions),
                "completions/mean_length": (tokens, completions),
            }
        return Loss(total, count, metrics)
