"""RTO — Reinforced Token Optimization: PPO with a DPO model's log-ratio as the reward of each token.

Zhong, Shan, Feng, Xiong, Cheng, Zhao, He, Bian, Wang, "DPO Meets PPO: Reinforced Token Optimization for RLHF", ICML
2025, arXiv 2404.18922. Stage 1 trains pi_dpo on pairs by DPO, and freezes it. Stage 2 is PPO from the starting model
(not from pi_dpo) on prompts, with the reward of token y_h (equation 4.7)

    r_h = beta_1 log( pi_dpo(y_h) / pi_ref(y_h) ) - beta_2 log( pi(y_h) / pi_ref(y_h) ) + 1[h = H] beta_3 R(x, y)

The first term is scaled, then clipped to +-dpo_clip; beta_2 is PPO's kl_coef; beta_3 = 1; R, the sum of what the
scorers give, is standardised, clamped to +-10 and stands on the last token that the policy emitted. Log-probs are in
nats, at temperature 1. beta_1 = 0 trains no pi_dpo and is PPO on that R, to the bit. `granularity` has the ablations.

At the defaults log-ratios beyond +-1 are clipped: ``rto/dpo_clipped`` is the share of such tokens. The token reward is
not centred, so it moves lengths: read ``completions/mean_length``; R is what holds them.

The token reward without its clip is the scorer `logratio`, for any method that learns from scorers (PPO on tokens, GRPO
with supervision="process"): ``PPO(scorer={"r": reward, "dpo": LogRatio(beta=0.05, policy=dpo, reference=start)})``.

Differs from the authors' code: there a scale of 0 means 1, here 0 is off. There the critic is a network of its own that
begins as the reward model; here it is PPO's linear map on the policy's states (critic_lr_factor 18 is the quotient of
the two learning rates). Their ablations clip nothing that we know of; here tokens are scaled and clipped, then summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.advantage import GAE, on_last
from ..core.critic import KLControl
from ..core.data import Group, encode, load_examples
from ..core.examples import Example
from ..core.experience import Experience, Rollouts
from ..core.lm import load
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Preparation
from ..core.rollout import Sampling
from ..core.stats import masked_sum
from ._granularity import GRANULARITIES, Granularity, regrouped, sentence_ends
from ._policy_gradient import LOGP, WITH_STATE, ActorCritic, ValueLoss, kl_penalised


def dpo_token_reward(
    logp_dpo_NT: Tensor, logp_ref_NT: Tensor, mask_NT: Tensor, scale: float = 0.05, clip: float = 0.05
) -> Tensor:
    """clip( scale (log pi_dpo - log pi_ref), +-clip ): (N, T), 0 outside the mask; a scale of 0 gives 0, a clip of 0
    does not clip."""
    zero = torch.zeros((), dtype=logp_dpo_NT.dtype, device=logp_dpo_NT.device)
    if scale == 0:
        return torch.zeros_like(logp_dpo_NT)
    reward_NT = scale * torch.where(mask_NT, logp_dpo_NT - logp_ref_NT, zero)
    return reward_NT.clamp(-clip, clip) if clip else reward_NT


def sequence_reward(total_N: Tensor, mean: float = 0.0, std: float = 1.0, clamp: float = 10.0) -> Tensor:
    """clamp( (R - mean) / std, +-clamp ): (N,); a clamp of 0 does not clamp."""
    scaled_N = (total_N - mean) / std
    return scaled_N.clamp(-clamp, clamp) if clamp else scaled_N


@dataclass(frozen=True, kw_only=True)
class TokenReward:
    """What pi_dpo says of tokens, as a reward."""

    dpo_scale: float = 0.05
    """beta_1; 0: off, and no pi_dpo is trained."""
    dpo_clip: float = 0.05
    """Bound of the scaled token reward; 0: none."""
    granularity: Granularity = "token"
    """token: RTO; sentence: summed at the end of each (Semi-RTO); sequence: summed on the last token (DDPO); shaping:
    its sum is taken away again on the last token (RS-PPO)."""
    dpo_reference: str = ""
    """A folder or Hub id, where pi_ref of this term is not the starting model."""

    def __post_init__(self) -> None:
        if not (0 <= self.dpo_scale < torch.inf and 0 <= self.dpo_clip < torch.inf):
            raise ValueError(f"dpo_scale={self.dpo_scale} and dpo_clip={self.dpo_clip} must not be negative (0: off)")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is not one of {', '.join(GRANULARITIES)}")


@dataclass(frozen=True, kw_only=True)
class SequenceReward:
    """What becomes of the scorers' sum R; its parameters are stored with the reward model, never estimated here."""

    reward_mean: float = 0.0
    """Mean of the reward model's outputs."""
    reward_std: float = 1.0
    """Their standard deviation."""
    reward_clamp: float = 10.0
    """Bound of the standardised R; 0: none."""

    def __post_init__(self) -> None:
        if not (
            0 < self.reward_std < torch.inf and 0 <= self.reward_clamp < torch.inf and abs(self.reward_mean) < 1e30
        ):
            raise ValueError(f"{self}: a finite reward_mean, reward_std > 0 and reward_clamp >= 0 are needed")


@dataclass(frozen=True, kw_only=True)
class DPOStage:
    """Stage 1, on the pairs, and the prompts of stage 2."""

    dpo_model: str = ""
    """A folder or Hub id of a pi_dpo that is there already (default: train it)."""
    dpo_beta: float = 0.1
    """beta of DPO."""
    dpo_lr: float | None = None
    """Its learning rate (default: the run's)."""
    dpo_epochs: float = 1.0
    """Passes over the pairs."""
    dpo_batch_size: int | None = None
    """Pairs an update (default: the run's batch size)."""
    prompts: str = ""
    """A file, folder or Hub id of prompts to learn from in stage 2 (default: those of the pairs, one a pair)."""

    def __post_init__(self) -> None:
        if not self.dpo_epochs > 0:
            raise ValueError(f"dpo_epochs={self.dpo_epochs} trains no pi_dpo; give more, or dpo_scale=0 for PPO")

    def config(self) -> dict[str, Any]:
        """What the loop of stage 1 has otherwise than the run's."""
        own = {"lr": self.dpo_lr, "batch_size": self.dpo_batch_size}
        return {"steps": None, "epochs": self.dpo_epochs} | {k: v for k, v in own.items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class RTO(ActorCritic):
    """Options of RTO."""

    reward: str = ""
    """R: scorers and their weights: vader, or vader + 0.5*toolrl."""
    scorer: Any = None
    """From Python: a scorer, a callable from text to a number, or {name: either}; added to `reward`."""
    token_reward: TokenReward = field(default_factory=TokenReward)
    """beta_1 and what belongs to it."""
    sequence_reward: SequenceReward = field(default_factory=SequenceReward)
    """R's scale."""
    dpo: DPOStage = field(default_factory=DPOStage)
    """Stage 1, and the prompts of stage 2."""
    kl: KLControl = field(default_factory=lambda: KLControl(kl_coef=0.01))
    """beta_2, the KL penalty in the rewards."""
    gae: GAE = field(default_factory=GAE)
    """Advantages, whitened once over the whole batch of rollouts, the variance at least 1e-8."""
    policy_loss: PolicyLoss = field(default_factory=lambda: PolicyLoss(aggregate="sequence"))
    """The policy's loss: a mean over sequences of their token means, as the critic's."""
    value: ValueLoss = field(default_factory=lambda: ValueLoss(critic_lr_factor=18.0))
    """The critic's loss."""
    rollouts: Rollouts = field(
        default_factory=lambda: Rollouts(generations=1, sampling=Sampling(max_new_tokens=1024), minibatches=8)
    )
    """How prompts are answered, and how often answers are learned from (paper: 1024 a batch, in minibatches of 128)."""

    data: ClassVar[str] = "pairs"

    @property
    def models(self) -> tuple[str, ...]:
        """The starting model; pi_dpo, and its own reference if it has one, unless they are off."""
        own = ("dpo", "dpo_reference") if self.token_reward.dpo_reference else ("dpo",)
        return ("reference", *(own if self.token_reward.dpo_scale else ()))

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of all models, and the states that the critic values."""
        return {"policy": WITH_STATE} | {name: LOGP for name in self.models}

    def prepare(self, run: Preparation) -> None:
        """Stage 1, and prompts in the place of the pairs.

        Models that were given as ``dpo`` and ``dpo_reference`` are taken as they are.
        """
        token, named = self.token_reward, {"dpo": self.dpo.dpo_model, "dpo_reference": self.token_reward.dpo_reference}
        for name in self.models[1:]:
            if name not in run.given:
                run.give(name, _loaded(run, named[name]) if named[name] else self._trained(run))
        how = self.rollouts.sampling
        if (how.temperature, how.top_p, how.top_k, how.min_new_tokens) != (1.0, 1.0, 0, 0):
            run.report(
                "rto: warning: rewards and ratios have log-probs at temperature 1 with nothing cut off, tokens are "
                "drawn otherwise; sample at temperature 1 without min_new_tokens"
            )
        if not token.dpo_scale:
            run.report("rto: dpo_scale=0 is PPO; no DPO model is trained")
        prompts = [_prompt_of(g) for g in run.groups]
        if self.dpo.prompts:
            examples, read = load_examples(self.dpo.prompts, kind="prompt", seed=run.config.seed)
            # encode leaves a token of it to the answer; where answers may fill the context, half of it is the prompt's
            room = max(2, run.policy.context // 2, run.policy.context - how.max_new_tokens + 1)
            prompts, kept = encode(examples, run.policy, max_length=room)
            for line in read.then(kept).lines():
                run.report(line)
        run.groups, run.held_out = prompts, [_prompt_of(g) for g in run.held_out]
        run.report(f"rto: {len(run.groups)} prompts for stage 2")

    def _trained(self, run: Preparation) -> Any:
        return run.train("dpo", on=run.groups, config=self.dpo.config(), beta=self.dpo.dpo_beta)

    def rewards(self, experience: Experience, state: nn.Module | None) -> Tensor:
        """r_h: (N, T).

        Raises:
            ValueError: a log-ratio that is not finite (says of which row).
        """
        mask_NT, figures, n = experience.mask_NT, experience.figures, float(experience.mask_NT.any(1).sum())
        seq, tok = self.sequence_reward, self.token_reward
        total_N = masked_sum(experience.reward_NT, mask_NT)
        scaled_N = sequence_reward(total_N, seq.reward_mean, seq.reward_std, seq.reward_clamp)
        if seq.reward_clamp:
            beyond_N = ((total_N - seq.reward_mean) / seq.reward_std).abs() > seq.reward_clamp
            figures["rto/reward_clamped"] = (float((beyond_N & mask_NT.any(1)).sum()), n)
        placed = dataclasses.replace(experience, reward_NT=on_last(scaled_N, mask_NT))
        rewards_NT = kl_penalised(placed, state)
        if not tok.dpo_scale:
            return rewards_NT
        below = "dpo_reference" if tok.dpo_reference else "reference"
        bad = (~torch.isfinite(experience.log_ratio("dpo", below))).nonzero()
        if len(bad):
            k, t = bad[0].tolist()
            row = experience.groups[k].example.row
            raise ValueError(f"log pi_dpo/pi_ref of token {t} of an answer to row {row} is not finite; look at pi_dpo")
        logps = experience.stats["dpo"].logp_NT, experience.stats[below].logp_NT
        dense_NT = dpo_token_reward(*logps, mask_NT, tok.dpo_scale, tok.dpo_clip)
        if tok.dpo_clip:
            beyond_NT = tok.dpo_scale * experience.log_ratio("dpo", below).abs() > tok.dpo_clip
            figures["rto/dpo_clipped"] = (float(beyond_NT.sum()), float(mask_NT.sum()))
        figures["rto/dpo_reward"] = (float(dense_NT.sum()), n)
        ends_NT = None
        if tok.granularity == "sentence":
            ends_NT = sentence_ends(experience.traces, mask_NT.shape[1]).to(mask_NT.device)
        return rewards_NT + regrouped(dense_NT, mask_NT, tok.granularity, ends_NT)


def _loaded(run: Preparation, source: str) -> Any:
    alike = run.policy.identity()
    return load(source, dtype=alike["dtype"], device=str(run.policy.device), attention=alike["attention"])


def _prompt_of(group: Group) -> Group:
    e = group.example
    kept = {"source": e.source, "row": e.row, "extra": e.extra, "tags": e.tags}
    return Group(example=Example(prompt=e.prompt, kind="prompt", **kept), prompt_ids=group.prompt_ids)
