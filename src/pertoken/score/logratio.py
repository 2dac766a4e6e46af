"""The implicit token reward of two models. Rafailov et al., NeurIPS 2023, arXiv 2305.18290, equation 5; by token:
Rafailov, Hejna, Park, Finn, arXiv 2404.12358.

    r_t = beta * ( log pi(y_t|x,y_<t) - log pi_ref(y_t|x,y_<t) )

Values are in nats times beta and come as credit of kind ``logratio``: an amount that sums over tokens to DPO's
sequence reward, as ``reward`` does, and a name that keeps it from being added to a reward of another scale unnoticed.
The terminator has a value like any other token. ``beta=1`` gives the plain log-ratio.

Differs from the authors' code: nothing known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.credit import Credit
from ..core.lm import LM
from ..core.trace import Trace
from ._logps import completion_logps


@dataclass(frozen=True, kw_only=True)
class LogRatio:
    """Options of the implicit reward, and the two models it is of."""

    beta: float = 0.1
    """beta, the one that the policy was trained with."""
    policy: LM | None = None
    """pi, a trained model."""
    reference: LM | None = None
    """pi_ref, the model it was trained from."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind logratio over the completion of each trace, in order.

        Raises:
            ValueError: a model is missing, or tokenizers differ.
        """
        if self.policy is None or self.reference is None:
            missing = " and ".join(n for n in ("policy", "reference") if getattr(self, n) is None)
            raise ValueError(f"the log-ratio is of two models; give LogRatio({missing}=...), loaded with core.lm.load")
        logps = completion_logps({"policy": self.policy, "reference": self.reference}, items)
        meta = {"beta": self.beta, "policy": self.policy.name, "reference": self.reference.name}
        return [
            Credit(trace=trace, values=self.beta * (p - r), kind="logratio", method="logratio", version=1, meta=meta)
            for trace, p, r in zip(items, logps["policy"], logps["reference"], strict=True)
        ]
