"""DPO-S: DPO whose pairs count by how hard their prompts are, as rewards from demonstrations see it.

Cheng et al., "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM Alignment", ICLR 2026, arXiv
2503.18991; beside GRPO-S (`dr_irl`, which has alpha's equations), the offline trainer that the paper scales:

    L = mean_i alpha_i ( -log sigmoid( beta [ log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) ] ) )

The mean divides by the number of pairs, not by the sum of alpha. The demonstration of a pair is its column
``demonstration`` or, without one, its chosen response; the generated text is one greedy answer of the starting
checkpoint. alpha is made once, before training: a pass over pairs samples nothing. Held-out pairs count 1 each.

Differs from the authors' code: there is none in public; that DPO-S multiplies the loss is all that is known of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..core.data import Group
from ..core.describe import describe
from ..core.experience import Rollouts
from ..core.irl import IRL
from ..core.protocols import Batch, Loss, Preparation
from ..core.rewarding import Rewarder, make_rewarder, with_row
from ..core.rollout import Sampling, sample
from ..core.stats import Stats
from ._demonstrated import Demonstrated, Scaling, alphas
from ._demonstrations import demonstration
from ._dynamic_scaling import scaled
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss

COLUMN = "alpha"


@dataclass(frozen=True, kw_only=True)
class DRIRLDPO(Demonstrated):
    """Options of DPO-S."""

    beta: float = 0.1
    """beta, strength of the KL constraint to the reference."""
    reward: str = ""
    """Scorers in the place of the IRL rewards: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python, likewise: a scorer, a callable from text to a number, or {name: either}."""
    reward_folder: str = ""
    """IRL rewards that were saved; else they are learned first, from the demonstrations."""
    irl: IRL = field(default_factory=IRL)
    """How rewards are learned."""
    scaling: Scaling = field(default_factory=Scaling)
    """How alpha is made (its refresh_epochs has no use here)."""
    answers: Rollouts = field(default_factory=Rollouts)
    """How prompts are answered: for the IRL rewards, and (greedily, as long) for alpha."""
    encode: Any = None
    """From Python: texts -> vectors (N, H), in the place of the encoder."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def check(self, groups: Sequence[Group]) -> None:
        """Nothing: a pair without a demonstration has its chosen response."""

    def prepare(self, run: Preparation) -> None:
        """Balance the categories, learn (or read) the rewards, and give every pair the column ``alpha``."""
        self.balanced(run)
        for group in run.held_out:
            group.add_column(COLUMN, 1.0)
        if self.scaling.signals == "none":
            found = np.ones(len(run.groups))
        else:
            found = self._alphas(run)
        for group, alpha in zip(run.groups, found.tolist(), strict=True):
            group.add_column(COLUMN, alpha)

    def _alphas(self, run: Preparation) -> np.ndarray:
        named = self.reward or self.scorer is not None
        rewarder = (
            make_rewarder(self.reward, self.scorer, run.scorer, self.answers.on_error)
            if named
            else Rewarder({"irl": self.irl_reward(run, self.answers)}, None, self.answers.on_error)
        )

        def make(folder: Path) -> None:
            greedy = Sampling(max_new_tokens=self.answers.sampling.max_new_tokens, temperature=0.0)
            drawn = sample(run.policy, [g.prompt_ids for g in run.groups], 1, greedy, seed=0)
            said = [with_row(g, t) for g, (t,) in zip(run.groups, drawn, strict=True)]
            demos = [demonstration(run.policy, g) for g in run.groups]
            found = alphas(run.groups, said, demos, rewarder, self.encoder(), self.scaling, run.report)
            np.save(folder / "alpha.npy", found)

        inputs = {"scorers": describe(rewarder.scorers), "weights": rewarder.weights, "scaling": describe(self.scaling)}
        inputs |= {"encode": describe(self.encode), "longest": self.answers.sampling.max_new_tokens}
        inputs |= {"data": run.data_key(), "policy": run.policy.identity()}
        inputs |= {"rows": [g.example.row for g in run.groups]}
        return np.load(run.stage("alpha", inputs, make) / "alpha.npy")

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.from_numpy(rng.uniform(0.6, 1.7, len(mask_NT)))}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs of alpha times DPO's loss.

        Raises:
            ValueError: there is no column ``alpha``.
        """
        if COLUMN not in batch.columns:
            raise ValueError(f"DPO-S needs the column {COLUMN!r}, which is not there; run prepare, or add it")
        rewards_N = implicit_rewards(stats, self.beta)
        losses_B = log_sigmoid_loss(rewards_N[batch.chosen] - rewards_N[batch.rejected])
        return pair_loss(scaled(losses_B, batch.columns[COLUMN][batch.chosen]), rewards_N, stats, batch)
