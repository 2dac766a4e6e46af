"""Contrastive estimation of cDPO: how likely a token is to a model of right answers but not to one of wrong answers.

Lin, Liang, Xu, Lin, Wang, Luo, Shi, Li, Yang, Tu, "Critical Tokens Matter", ICML 2025, arXiv 2411.19943. p is the base
fine-tuned on correct responses (positive), q on incorrect ones (negative); z are their logits at one position:

    s_t = softmax( (1 + b) z_p - b z_q )[y_t]        b = 1        proportional to p^(1+b) / q^b over the vocabulary

Values are probabilities in [0, 1] (kind ``probability``): near 0 at tokens that q likes and p does not, which are
critical in a wrong chain; high where p agrees. Both models read the same ids in one pass, and the mixture is made
inside the chunk, so that no (B, T, V) tensor exists. A token outside the support of p or q (a logit of -inf) has no
part in the softmax; the drawn token's s is 0 then. b = 0 is softmax(z_p) and does not look at q. The terminator has an
s like any other token (the release has none for it; `critical-token-dpo` sets its own there), and what the policy did
not emit is 0.

Differs from the authors' code: logits are float32 or better (the release subtracts in the model's dtype), and -inf is
masked (there -inf in z_q becomes +inf).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.credit import Credit
from ..core.lm import LM
from ..core.trace import Trace
from ._logps import completion_joint


def contrastive_logps(z_p: Tensor, z_q: Tensor, b: float = 1.0) -> Tensor:
    """log softmax((1 + b) z_p - b z_q) over the last axis, on the intersection of both supports.

    Args:
        z_p, z_q: logits (..., V) of the positive and the negative model, of one vocabulary.
        b: weight of the contrast, at least 0.

    Returns:
        Log-probs (..., V), float32 or better; -inf outside of the intersection.

    Raises:
        ValueError: vocabularies of two sizes; a negative b; a position where no token has a logit in both.
    """
    if z_p.shape[-1] != z_q.shape[-1]:
        raise ValueError(
            f"logits over {z_p.shape[-1]} and {z_q.shape[-1]} tokens cannot be subtracted; take two models of one "
            "tokenizer and one vocabulary"
        )
    if not 0 <= b < math.inf:
        raise ValueError(f"b={b} must be at least 0 and finite; to swap the models' parts, swap the models")
    if z_p.dtype not in (torch.float32, torch.float64):
        z_p = z_p.float()
    if b == 0:  # not 0 * z_q, which is NaN where q has no support
        return torch.log_softmax(z_p, -1)
    z_q = z_q.to(z_p.dtype)
    both = (z_p != -torch.inf) & (z_q != -torch.inf)  # NaN stays in, so that a broken model is not hidden
    if not bool(both.any(-1).all()):
        raise ValueError("at some position no token has a finite logit in both models; do not mask their vocabularies")
    zero = torch.zeros((), dtype=z_p.dtype, device=z_p.device)
    mixed = (1 + b) * torch.where(both, z_p, zero) - b * torch.where(both, z_q, zero)
    return torch.log_softmax(mixed.masked_fill(~both, -torch.inf), -1)


def contrastive_probability(z_p: Tensor, z_q: Tensor, ids: Tensor, b: float = 1.0) -> Tensor:
    """s of the drawn tokens: logits (..., V), ids (...) -> probabilities (...). Raises as `contrastive_logps`."""
    return contrastive_logps(z_p, z_q, b).gather(-1, ids[..., None])[..., 0].exp()


@dataclass(frozen=True, kw_only=True)
class ContrastiveEstimation:
    """Options of contrastive estimation, and its two models."""

    contrast: float = 1.0
    """b, weight of the contrast (0 leaves the positive model's own probability)."""
    policy: LM | None = None
    """p, the positive model: the base fine-tuned on correct responses."""
    reference: LM | None = None
    """q, the negative model: the base fine-tuned on incorrect responses."""

    def __post_init__(self) -> None:
        if not 0 <= self.contrast < math.inf:
            raise ValueError(
                f"contrast={self.contrast} must be at least 0 and finite; to swap the models' parts, swap the models"
            )

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind probability over the completion of each trace, in order.

        Raises:
            ValueError: a model is missing; tokenizers or vocabularies differ; a value that is not finite.
        """
        if self.policy is None or self.reference is None:
            missing = " and ".join(n for n in ("policy", "reference") if getattr(self, n) is None)
            raise ValueError(
                f"contrastive estimation needs a positive and a negative model; give ContrastiveEstimation({missing}"
                "=...): policy fine-tuned on correct responses, reference on incorrect ones"
            )
        models = {"positive": self.policy, "negative": self.reference}
        found = completion_joint(models, items, self._joint)
        meta = {"contrast": self.contrast, "positive": self.policy.name, "negative": self.reference.name}
        return [
            Credit(
                trace=t, values=np.where(t.mask, s["s"], 0.0), kind="probability", method=_SLUG, version=1, meta=meta
            )
            for t, s in zip(items, found, strict=True)
        ]

    def _joint(self, logits: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        return {"s": contrastive_probability(logits["positive"], logits["negative"], ids, self.contrast)}


_SLUG = "contrastive-estimation"
