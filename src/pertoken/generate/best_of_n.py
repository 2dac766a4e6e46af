"""Best of n — draw several continuations and keep the one that a reward likes best: the baseline of guided decoding.

    y* = argmax_{i <= N} r(x, y_i),   y_i ~ p(. | x)

Its KL from the model is at most log N - (N - 1)/N nats (Beirami et al., arXiv 2401.01879). n draws are the best of n
groups of N each. The reward's credit comes with each; ties go to the first drawn.

Differs from the authors' code: there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.decode import Drawn, Stream
from ..core.lm import LM, Prompt
from ..core.protocols import as_scorer
from ..core.rollout import Sampling, sample


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Options of best of n."""

    candidates: int = 8
    """N, draws that one is chosen from."""
    reward: str = "vader"
    """Scorers and their weights: vader, or vader + 0.5*bleuberi."""
    scorer: Any = None
    """From Python, in its place: a scorer, or a callable from text to a number."""

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be 1 (plain sampling) or more")

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """See `core.decode.Decoder`; nothing is streamed, as the choice comes last. ``meta``: the reward of each
        candidate and the place of the chosen one.

        Raises:
            ValueError: no scorer.
        """
        if self.scorer is None:
            raise ValueError("best-of-n has no scorer; give scorer=..., or use it through pertoken generate --reward")
        scorer = as_scorer(self.scorer)
        out = []
        for some in sample(lm, prompts, n * self.candidates, sampling, seed=seed):
            row = []
            for start in range(0, len(some), self.candidates):
                part = some[start : start + self.candidates]
                credits = [dataclasses.replace(c, method="best-of-n") for c in scorer.score(part)]
                rewards = [c.reduce() for c in credits]
                best = max(range(len(part)), key=rewards.__getitem__)
                meta = {"rewards": rewards, "chosen": best}
                row.append(Drawn(part[best], credit=credits[best], meta=meta))
            out.append(row)
        return out
