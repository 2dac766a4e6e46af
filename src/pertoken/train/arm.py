"""ARM — the Autoregressive Reward Model of GenARM, trained from pairs.

Xu, Sehwag, Koppel, Zhu, An, Huang, Ganesh, "GenARM: Reward Guided Generation with Autoregressive Reward Model for
Test-time Alignment", ICLR 2025, arXiv 2410.08193. The reward of a response is its log-prob under a normalised language
model pi_r, so that every next token has a reward, in one forward:

    r(x, y) = sum_t log pi_r(y_t | x, y_<t)
    L = -log sigmoid( beta_r [r(x, y_w) - r(x, y_l)] )

Sums over response tokens in nats, the terminator included (else a guided model never stops), not divided by length; no
reference model: it is DPO with the reference's log-probs at 0. The loss is the mean over pairs. As short responses
have large sums, ``lengths/...`` (tokens) are logged beside ``rewards/...`` (beta_r times the sum).
pi_r starts from the SFT model and is trained with LoRA, or whole. `arm-reward` scores with it, `genarm` decodes.

Differs from the authors' code: nothing known. Their TRL trainer has the target margin gamma, label smoothing and the
hinge loss, which are options here, and a length-normalised reward "for testing only", which is not (see `simpo`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, log_sigmoid_loss, pair_loss, refuse_unbounded


def arm_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    beta: float = 0.05,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    form: str = "sigmoid",
) -> Tensor:
    """Losses (B,) from summed log-probs (B,) in nats: of m = beta (chosen - rejected) - gamma."""
    margin_B = beta * (chosen_B - rejected_B) - gamma
    return torch.relu(1 - margin_B) if form == "hinge" else log_sigmoid_loss(margin_B, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class ARM:
    """Options of the autoregressive reward model."""

    beta: float = 0.05
    """beta_r, scale of the reward: 0.05 on HH-RLHF, 0.5 and 0.01 on SafeRLHF (helpful, harmless), 0.1 for Tulu 2."""
    gamma: float = 0.0
    """gamma, target margin between rewards (0: none)."""
    label_smoothing: float = 0.0
    """Share of pairs whose label is expected to be flipped (sigmoid only)."""
    form: Literal["sigmoid", "hinge"] = "sigmoid"
    """-log sigmoid(m), or max(0, 1 - m), of the margin m = beta_r (r_w - r_l) - gamma."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        refuse_unbounded(self, "beta", "gamma")
        if not self.beta > 0:
            raise ValueError(
                f"beta={self.beta} must be above 0; to steer away from a reward, decode with alpha below 0"
            )
        if self.form not in ("sigmoid", "hinge"):
            raise ValueError(f"form={self.form!r} is not one of sigmoid, hinge")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.label_smoothing and self.form == "hinge":
            raise ValueError("the hinge loss has no label smoothing; leave label_smoothing out, or take form='sigmoid'")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the reward model, which is the policy that is trained."""
        return {"policy": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        sums_N = stats["policy"].sums()
        losses_B = arm_loss(
            sums_N[batch.chosen],
            sums_N[batch.rejected],
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
            form=self.form,
        )
        found = pair_loss(losses_B, self.beta * sums_N, stats, batch)
        length_N = stats["policy"].mask_NT.sum(1)
        for side, where in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            found.metrics[f"lengths/{side}"] = (float(length_N[where].sum()), float(len(where)))
        return found
