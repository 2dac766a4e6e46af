"""The token rewards of an autoregressive reward model: log pi_r(y_t | x, y_<t).

Xu, Sehwag, Koppel, Zhu, An, Huang, Ganesh, "GenARM", ICLR 2025, arXiv 2410.08193 (`arm` trains pi_r):

    r(x, y) = sum_t log pi_r(y_t | x, y_<t)

One forward a response. Values are in nats, at most 0; those of the terminator are among them, and tokens that the
policy did not emit have none. Their sum is the sequence reward, which best-of-N ranks by; it is no score of quality by
itself: it holds what any language model says of the words, and falls with length. Rewards that differ by a function of
the prompt alone are one reward here, so compare responses to one prompt only.

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
class ARMReward:
    """Options of the token reward, and the model it is of."""

    scale: float = 1.0
    """What the log-probs are multiplied by: 1 is the paper's r; beta_r gives what `arm` logs as rewards, alpha what
    `genarm` adds."""
    lm: LM | None = None
    """pi_r, trained by `arm`."""

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward over the completion of each trace, in order.

        Raises:
            ValueError: the model is missing, or its tokenizer differs.
        """
        if self.lm is None:
            raise ValueError("the reward is of a model; give ARMReward(lm=...), loaded with core.lm.load")
        (found,) = completion_logps({"reward model": self.lm}, items).values()
        meta = {"scale": f"{self.scale:g} times nats, at most 0", "lm": self.lm.name}
        return [
            Credit(trace=t, values=self.scale * v, kind="reward", method="arm-reward", version=1, meta=meta)
            for t, v in zip(items, found, strict=True)
        ]
