"""BLEUBERI's data step: prompts on which the base model's answers overlap least with their references.

Chang et al., 2025, arXiv 2505.11080. The base model answers every prompt of a pool once (temperature 0.7, top-p 0.9,
512 tokens); each answer is scored (`score/bleuberi.py`; a blank answer, or a score that is no number, has 0); of N
prompts, k are kept: ``hard`` the first of the stable ascending order, ``easy`` of the stable descending one, ``medium``
the slice of the ascending order from (N - k) // 2, ``random`` a seeded draw. They come back from the best to the worst.

Differs from the authors' code: nothing known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..core.data import Example, encode
from ..core.lm import LM
from ..core.options import known_values
from ..core.protocols import Weights
from ..core.rewarding import with_row
from ..core.rollout import Sampling, sample


def chosen(scores: Sequence[float], k: int, how: str = "hard", seed: int = 0) -> list[int]:
    """Indices of the k prompts that are kept, by score from the highest to the lowest; equals keep the pool's order."""
    x = np.nan_to_num(np.asarray(scores, np.float64), nan=0.0)
    n = len(x)
    if k >= n:
        kept = np.arange(n)
    elif how == "random":
        kept = np.sort(np.random.default_rng(seed).choice(n, k, replace=False))
    elif how == "easy":
        kept = np.argsort(-x, kind="stable")[:k]
    else:
        start = (n - k) // 2 if how == "medium" else 0
        kept = np.argsort(x, kind="stable")[start : start + k]
    return kept[np.argsort(-x[kept], kind="stable")].tolist()


@dataclass(frozen=True, kw_only=True)
class BleuberiSelect:
    """Selector of prompts by how badly the model answers them."""

    lm: LM | None = None
    """The base model."""
    scorer: Any = None
    """From Python: what scores the answers, for example `Bleuberi()`, which reads the rows' references."""
    keep: int = 5000
    """k."""
    how: Literal["hard", "easy", "medium", "random"] = "hard"
    """Which ones."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512, temperature=0.7, top_p=0.9))
    """How the pool is answered."""
    draw: int = 0
    """Seed of the answers and of ``random``."""

    def __post_init__(self) -> None:
        known_values(self)
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} leaves no prompt; give 1 or more")

    def weights(self, examples: Sequence[Example]) -> Weights:
        """1 for what is kept, 0 for the rest; the scores, and the order in which the kept ones come.

        Raises:
            ValueError: no model, no scorer; a row that cannot be answered.
        """
        if self.lm is None or self.scorer is None:
            raise ValueError(
                "bleuberi-select answers the prompts with a model and scores the answers; give lm and scorer"
            )
        prompts = [Example(prompt=e.prompt, kind="prompt", row=e.row, extra=e.extra) for e in examples]
        groups, report = encode(prompts, self.lm)
        if len(groups) < len(examples):
            raise ValueError(f"{len(examples) - len(groups)} prompts cannot be used: {'; '.join(report.lines()[1:])}")
        drawn = sample(self.lm, [g.prompt_ids for g in groups], 1, self.sampling, seed=self.draw)
        traces = [with_row(g, t) for g, (t,) in zip(groups, drawn, strict=True)]
        values = [
            0.0 if not t.text.strip() else c.reduce() for t, c in zip(traces, self.scorer.score(traces), strict=True)
        ]
        return self.pick(values)

    def pick(self, scores: Sequence[float]) -> Weights:
        """The choice from scores that are known already."""
        order = chosen(scores, self.keep, self.how, self.draw)
        weights = np.zeros(len(scores))
        weights[order] = 1.0
        known = {"method": "bleuberi-select", "how": self.how, "keep": self.keep, "seed": self.draw}
        return Weights(weights, np.asarray(scores, np.float64), known, tuple(order))


def agreement(scores: Sequence[tuple[float, float]], human: Sequence[int]) -> float:
    """Share of pairs in which the metric's winner is the human's (0: the first, 1: the second); a tie wins nothing."""
    wins = [(a > b and h == 0) or (b > a and h == 1) for (a, b), h in zip(scores, human, strict=True)]
    return float(np.mean(wins))
