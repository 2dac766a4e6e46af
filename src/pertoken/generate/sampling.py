"""Sampling — what every decoder is measured against: draws of the model itself.

Each token is drawn from the model's distribution at a temperature, cut to the top-k and then the top-p tokens and
renormalised (temperature 0: the likeliest token). Log-probs are recorded under the cut distribution and the model's.

Differs from the authors' code: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.decode import Drawn, LMGuide, Stream, decode
from ..core.lm import LM, Prompt
from ..core.rollout import Sampling as How


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Plain sampling has no options beyond temperature, top-k and top-p."""

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: How | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """See `core.decode.Decoder`."""
        drawn = decode(lm, LMGuide(lm=lm), prompts, n=n, sampling=sampling, seed=seed, stream=stream)
        return [[Drawn(trace) for trace in some] for some in drawn]
