"""IPO — Identity Preference Optimization.

Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos, AISTATS 2024, arXiv 2310.12036, equation 17:

    h = log [ pi(y_w|x) pi_ref(y_l|x) / ( pi(y_l|x) pi_ref(y_w|x) ) ]          L = ( h - 1/(2 tau) )^2

Sequence log-probs are sums over response tokens in nats, the terminator included; the loss is the mean over pairs. It
is zero at h = 1/(2 tau), so that a pair which is far enough apart is not pushed any further, and pulled back beyond.

Differs from the authors' code: the paper's experiments are bandits, and no code for language models is known. TRL 1.16
(loss "ipo", its beta is tau) divides each log-ratio by its response's tokens and reports that the authors confirmed
this for the paper's results; that is `length_average=True`. The default is the paper's equation, with sums. Logged
rewards are tau times summed log-ratios in both, as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..core.protocols import Batch, Loss
from ..core.stats import Stats
from ._preference import LOGP, implicit_rewards, pair_loss


def ipo_loss(h_B: Tensor, tau: float = 0.1) -> Tensor:
    """Losses (B,) from differences (B,) of log-ratios, chosen less rejected, in nats (a token, if averaged)."""
    return (h_B - 1 / (2 * tau)).square()


@dataclass(frozen=True, kw_only=True)
class IPO:
    """Options of IPO."""

    tau: float = 0.1
    """tau, strength of the regularisation towards the reference (TRL: beta)."""
    length_average: bool = False
    """Divide each log-ratio by its response's tokens, as TRL does; the paper's equation sums."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau} must be above 0")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        logratio_N = implicit_rewards(stats, 1.0)
        score_N = logratio_N / stats["policy"].lengths().clamp(min=1) if self.length_average else logratio_N
        losses_B = ipo_loss(score_N[batch.chosen] - score_N[batch.rejected], self.tau)
        return pair_loss(losses_B, self.tau * logratio_N, stats, batch)
