"""What the methods of DR-IRL share: rewards by inverse RL from demonstrations, and alpha of every prompt."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..core.advantage import Advantages
from ..core.data import Group
from ..core.describe import describe
from ..core.embed import MINILM, Encode, TextEncoder
from ..core.experience import Experience, Rollouts
from ..core.irl import IRL, balanced
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Preparation
from ..core.rewarding import Rewarder, with_row
from ..core.rollout import Sampling, sample
from ..core.trace import Trace
from ._demonstrations import demonstration
from ._dynamic_scaling import data_hardness, responsiveness, scaled, similarity

INACTIVE = 1.1  # max / min of alpha below which scaling does next to nothing
GENERATIONS = Rollouts().generations  # of a policy that teaches rewards, where the method itself draws one completion


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How alpha is made."""

    signals: Literal["both", "data", "model", "none"] = "both"
    """alphaD alphaM, one of them, or neither (alpha = 1: GRPO)."""
    tau: float | None = None
    """tau, bound of (G - mean G)^2; None: (2 standard deviations)^2."""
    refresh_epochs: float = 1.0
    """Passes over the prompts between new greedy answers."""
    symmetric: bool = False
    """Match clauses both ways."""
    scale_encoder: str = MINILM
    """Phi, and the reward's features if they are texts': all-minilm, a folder, or a Hub id."""
    balance: bool = True
    """As many prompts of each category as the rarest has."""
    reward_features: Literal["encoder", "policy"] = "encoder"
    """What the reward models see: the encoder's features, or hidden states of the starting checkpoint."""

    def __post_init__(self) -> None:
        if self.signals not in ("both", "data", "model", "none") or self.reward_features not in ("encoder", "policy"):
            raise ValueError(f"{self}: signals are both, data, model or none; reward_features encoder or policy")
        if (self.tau is not None and not self.tau >= 0) or not self.refresh_epochs > 0:
            raise ValueError(f"tau={self.tau} must not be negative, refresh_epochs={self.refresh_epochs} not 0")


def alphas(
    groups: Sequence[Group],
    said: Sequence[Trace],
    demos: Sequence[Trace],
    rewarder: Rewarder,
    encode: Encode,
    scaling: Scaling,
    say: Callable[[str], None],
) -> np.ndarray:
    """alpha (N,) of N prompts, means within their categories; what was found is told to `say`.

    Args:
        said: the policy's greedy answer to each; demos: its demonstration.
        rewarder: whose gap between the two is G.
    """
    names = np.array([str(g.example.extra.get("category", "")) for g in groups])
    w, empty = similarity([t.text for t in said], [t.text for t in demos], encode, scaling.symmetric)
    credits = rewarder([*demos, *said]).credits
    value = np.array([np.nan if c is None else c.reduce() for c in credits]).reshape(2, -1)
    gap, alpha, removed = value[0] - value[1], np.ones(len(said)), 0
    for name in dict.fromkeys(names.tolist()):
        mine = names == name
        if scaling.signals in ("both", "data"):
            alpha[mine] *= data_hardness(1 - w[mine])
        scored = gap[mine][np.isfinite(gap[mine])]  # rows whose reward failed are left out, and told below
        if scaling.signals in ("both", "model") and len(scored):
            factor, count = responsiveness(scored, scaling.tau)
            alpha[mine] *= factor
            removed += count
            if count == len(scored):
                say(f"dr-irl: warning: tau removes every gap of category {name!r}; raise it (alphaM is 1)")
    ratio, known = alpha.max() / alpha.min(), gap[np.isfinite(gap)]
    say(
        f"dr-irl: alpha from {alpha.min():.3f} to {alpha.max():.3f} (ratio {ratio:.2f}), mean gap "
        f"{known.mean() if len(known) else np.nan:.3f}, {removed} gaps beyond tau, {empty} texts without a clause"
        + (f", {len(gap) - len(known)} prompts without a reward" if len(known) < len(gap) else "")
        + ("; the scaling is inactive" if ratio < INACTIVE else "")
    )
    return alpha


class Demonstrated:
    """Rewards from demonstrations, and their scaling; the options are fields of the method's own."""

    reward: str
    scorer: Any
    reward_folder: str
    irl: IRL
    scaling: Scaling
    rollouts: Rollouts
    encode: Any

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse prompts without a demonstration."""
        for g in groups:
            if not isinstance(g.example.extra.get("demonstration"), str):
                raise ValueError(
                    f"row {g.example.row} has no text in column 'demonstration'; give every prompt a good answer there"
                )

    def encoder(self) -> Any:
        """Phi."""
        return self.encode or TextEncoder(self.scaling.scale_encoder)

    def prepare(self, run: Preparation) -> None:
        """Balance the categories and, unless a reward is named, learn (or read) the IRL rewards."""
        self.balanced(run)
        if not (self.reward or self.scorer is not None):
            run.reward_by({"irl": self.irl_reward(run, self.rollouts)})

    def balanced(self, run: Preparation) -> None:
        """Keep as many prompts of each category as the rarest has, if that is asked.

        Raises:
            ValueError: some prompts have no category and others do (no category would be the rarest).
        """
        names = [str(g.example.extra.get("category", "")) for g in run.groups]
        if "" in names and any(names):
            row = run.groups[names.index("")].example.row
            raise ValueError(f"row {row} has no category and others do; give every prompt one, or none")
        if self.scaling.balance:
            kept = balanced(names, run.config.seed)
            if len(kept) < len(names):
                run.report(f"dr-irl: {len(names) - len(kept)} of {len(names)} prompts left out to balance categories")
            run.groups = [run.groups[i] for i in kept]

    def irl_reward(self, run: Preparation, rollouts: Rollouts) -> Any:
        """The IRL rewards: read from a folder, or learned as a stage of the run, whose answers `rollouts` draws.

        Raises:
            ValueError: rewards that a policy of their own teaches, in several processes.
        """
        if self.irl.irl_policy == "grpo" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("irl_policy='grpo' learns rewards in one process; fit them first, and give reward_folder")
        phi = self.encoder() if self.scaling.reward_features == "encoder" else None
        frozen = None if phi is not None else run.policy.reference()  # the policy itself will change
        if self.reward_folder:
            return run.scorer("irl-reward", folder=self.reward_folder, encoder=phi, lm=frozen)
        blank: Any = run.scorer("irl-reward", irl=self.irl, encoder=phi, lm=frozen)
        every, now = list(range(len(run.groups))), {"lm": run.policy}

        def answers(lm: Any, rows: list[int], n: int, seed: int) -> list[list[Trace]]:
            how, some = dataclasses.replace(rollouts.sampling, temperature=1.0), [run.groups[i] for i in rows]
            drawn = sample(lm, [g.prompt_ids for g in some], n, how, seed=seed)
            return [[with_row(g, t) for t in traces] for g, traces in zip(some, drawn, strict=True)]

        # GRPO compares completions of one prompt, of which PPO draws a single one
        several = rollouts if rollouts.generations > 1 else dataclasses.replace(rollouts, generations=GENERATIONS)

        def draw(number: int, rewards: Any, rows: list[int]) -> list[list[Trace]]:
            judge = {"scorer": rewards, "policy_loss": PolicyLoss(kl_loss=self.irl.irl_beta), "rollouts": several}
            bare = [dataclasses.replace(run.groups[i], traces=(), columns={}) for i in rows]
            steps, before = {"steps": self.irl.irl_policy_steps}, now["lm"] if number > 1 else run.policy
            now["lm"] = run.train("grpo", on=bare, config=steps, start=before, **judge)
            return answers(now["lm"], rows, 1, self.irl.irl_seed + number)

        def make(folder: Path) -> None:
            demos = [demonstration(run.policy, g) for g in run.groups]
            pool = answers(
                run.policy, every, self.irl.irl_pool if self.irl.irl_policy == "pool" else 1, self.irl.irl_seed
            )
            blank.fit(demos, pool, draw=draw, say=run.report).save(folder)

        inputs = {"rewards": blank.identity(), "data": run.data_key(), "policy": run.policy.identity()}
        inputs |= {"rollouts": describe(rollouts), "rows": [g.example.row for g in run.groups]}
        folder = run.stage("irl-reward", inputs, make)
        return run.scorer("irl-reward", folder=str(folder), encoder=phi, lm=frozen)

    def start(self, step: Any) -> None:
        """Buffers of the step's state: alpha of every prompt, and when it was last made (in prompts seen)."""
        step.state.register_buffer(
            "alpha", torch.ones(len(step.groups), dtype=torch.float64, device=step.policy.device)
        )
        step.state.register_buffer("due", torch.zeros((), dtype=torch.float64, device=step.policy.device))
        step.state.place = {_row(g): i for i, g in enumerate(step.groups)}
        step.state.encode = None

    def before_rollouts(self, step: Any, prompts: int) -> dict[str, tuple[float, float]]:
        """Make alpha anew where a pass over the prompts is over. Returns figures to log."""
        state = step.state
        if self.scaling.signals != "none" and state.due <= 0:
            state.due += max(1.0, self.scaling.refresh_epochs * len(step.groups))
            state.encode = state.encode or self.encoder()
            found = self.refresh(step, state.encode)
            state.alpha.copy_(torch.from_numpy(found))
        state.due -= prompts
        alpha = state.alpha
        return {f"alpha/{n}": (float(v), 1.0) for n, v in (("mean", alpha.mean()), ("std", alpha.std(correction=0)))}

    def refresh(self, step: Any, encode: Any) -> np.ndarray:
        """alpha (prompts,) from one greedy answer of the policy to each, told in words."""
        greedy = Sampling(max_new_tokens=self.rollouts.sampling.max_new_tokens, temperature=0.0)
        drawn = step.generate(step.policy, [g.prompt_ids for g in step.groups], 1, greedy, seed=0)
        said = [with_row(g, t) for g, (t,) in zip(step.groups, drawn, strict=True)]
        demos = [demonstration(step.policy, g) for g in step.groups]
        return alphas(step.groups, said, demos, step.rewarder.at(step.batch), encode, self.scaling, step.say)

    def scale(self, found: Advantages, experience: Experience, state: nn.Module | None) -> Advantages:
        """Advantages (after every normalisation) times alpha of each completion's prompt."""
        place: Any = getattr(state, "place", None)
        if self.scaling.signals == "none" or place is None:
            return found
        index = torch.tensor([place[_row(g)] for g in experience.groups], device=found.advantage_NT.device)
        return found._replace(advantage_NT=scaled(found.advantage_NT, state.alpha[index]))  # type: ignore[union-attr,index]


def _row(group: Group) -> tuple[str, int]:
    return group.example.source, group.example.row
