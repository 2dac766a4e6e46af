"""Text2Grad — reinforcement learning from natural-language feedback: PPO on the spans that a critique quotes.

Wang et al. (Microsoft), "Text2Grad: Reinforcement Learning from Natural Language Feedback", 2025, arXiv 2505.22338.
The scorer `text2grad-reward` turns a critique into scores delta_t of tokens; the policy is trained on

    r_t = delta_t - kl_coef KL_t,      KL_t = sum_v pi(v) ( log pi(v) - log pi_ref(v) )
    A_t = e_t + gamma lam A_{t+1},     e_t = r_t + gamma V_{t+1} - V_t,     R_t = A_t + V_t
    L   = mean_t [ -min( rho_t A_t, clip(rho_t, 1 +- eps) A_t ) + vf_coef 0.5 max( (V - R)^2, (clip(V) - R)^2 ) ]

gamma = 1, lam = 0.95; A is whitened over the batch of rollouts (unbiased variance), R is not. The "natural-language
gradient" is sum_t A_t grad log pi(y_t). kl_coef adapts: kl_coef <- kl_coef (1 + e n / horizon), KL_seq the mean over n
sequences of sum_t KL_t and e = clip(KL_seq / target - 1, +-0.2). An update whose mean ratio exceeds `max_ratio` is
skipped (its loss is 0), and counted. Rewards, values and masks are (N, T), KL in nats.

Differs from the authors' code: several released files do not parse, so it is read as a specification. Its arrays stand
on prediction positions (`on_predictions`); here position t of the completion is the token itself, which is the same
alignment without the shift. A batch whose advantages are all equal is whitened to zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.advantage import GAE, Advantages
from ..core.critic import Critic, KLControl
from ..core.distributed import summed
from ..core.experience import Experience, Rollouts
from ..core.options import known_values
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss, Preparation
from ..core.rewarding import make_rewarder
from ..core.stats import Stats, masked_sum
from ._policy_gradient import LOGP, WITH_STATE, ValueLoss, example_columns, kl_penalised, policy_gradient_loss

REWARD = "text2grad-reward"
FULL_KL = "kl_reverse:reference"


def on_predictions(scores_NT: Tensor) -> Tensor:
    """Scores of the input tokens of prompt + response, moved to the positions that predict them: (N, T - 1)."""
    return scores_NT[:, 1:]


def token_rewards(delta_NT: Tensor, kl_NT: Tensor, mask_NT: Tensor, kl_coef: float | Tensor) -> Tensor:
    """delta - kl_coef KL where the mask holds; outside of it the KL term alone, as the release returns it: (N, T)."""
    return torch.where(mask_NT, delta_NT, 0.0) - kl_coef * kl_NT


def full_kl(logp_V: Tensor, reference_V: Tensor) -> Tensor:
    """sum_v pi(v) (log pi(v) - log pi_ref(v)) over the last dimension, of log-probs."""
    gap_V = torch.where(logp_V > -torch.inf, logp_V - reference_V, 0.0)  # 0 log 0 = 0
    return (logp_V.exp() * gap_V).sum(-1)


def whitened(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8), moments over the tokens of the mask in all processes, var with n - 1.

    What stands outside of the mask is moved and scaled, too. Values that are all equal give zeros.
    """
    total, count = summed(masked_sum(values_NT, mask_NT).sum(), mask_NT.sum().to(values_NT.dtype))
    mean = total / count.clamp(min=1)
    (squares,) = summed(masked_sum((values_NT - mean).square(), mask_NT).sum())
    variance = squares / (count - 1).clamp(min=1)
    rounding = (16 * torch.finfo(values_NT.dtype).eps * mean).square()
    return torch.where(variance <= rounding, 0.0, (values_NT - mean) * (variance + 1e-8).rsqrt())  # NaN stays NaN


def advantages(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float = 1.0, lam: float = 0.95, white: bool = True
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, T), as the release computes them.

    Rewards and values are 0 outside of the mask, and a token outside of it ends the sum: no credit passes over tool
    outputs (`core.advantage.gae` lets it pass; without such holes both agree). Returns are of unwhitened advantages.
    """
    zero = torch.zeros((), dtype=rewards_NT.dtype, device=rewards_NT.device)
    r_NT, v_NT = torch.where(mask_NT, rewards_NT, zero), torch.where(mask_NT, values_NT, zero)
    raw_NT = torch.zeros_like(r_NT)
    last_N, after_N = zero.expand(len(r_NT)), zero.expand(len(r_NT))
    for t in reversed(range(r_NT.shape[1])):
        last_N = (r_NT[:, t] + gamma * after_N - v_NT[:, t] + gamma * lam * last_N) * mask_NT[:, t]
        after_N = v_NT[:, t]
        raw_NT[:, t] = last_N
    return (whitened(raw_NT, mask_NT) if white else raw_NT), raw_NT + v_NT


@dataclass(frozen=True, kw_only=True)
class Critiques:
    """Who writes the critiques; from Python, give a `Text2GradReward` with all of its options as `scorer` instead."""

    annotator: Literal["rule", "lm"] = "rule"
    """A lexicon (VADER), or a model that is asked for the JSON."""
    critic: str = ""
    """Folder of that model (trained by sft on `training_examples`); empty: the starting policy."""
    occurrence: Literal["first", "all"] = "first"
    """Which occurrence of a quoted phrase is meant."""
    overlap: Literal["first", "poor"] = "first"
    """Whose score a token has that two spans cover: that of the one listed first, or of the poor one."""
    length_target: int | None = None
    """L*, tokens after which scores fade (summaries: 48)."""
    fallback: float = 0.0
    """Score of every token where none has any (the release: 0.1)."""

    def __post_init__(self) -> None:
        known_values(self)

    def options(self, scorer: Any) -> dict[str, Any]:
        """Those of the scorer; nested ones change what it has."""
        matching = dataclasses.replace(scorer.matching, occurrence=self.occurrence, overlap=self.overlap)
        length = dataclasses.replace(scorer.length, target=self.length_target)
        plain = {"annotator": self.annotator, "critic": self.critic, "fallback": self.fallback}
        return {**plain, "matching": matching, "length": length}


@dataclass(frozen=True, kw_only=True)
class Text2Grad:
    """Options of Text2Grad."""

    reward: str = REWARD
    """Scorers and their weights: text2grad-reward, or any other with credit on tokens."""
    scorer: Any = None
    """From Python: a scorer, a callable from text to a number, or {name: either}; added to `reward`, or in the place of
    its default."""
    critiques: Critiques = field(default_factory=Critiques)
    """The critiques, where `reward` is text2grad-reward and no `scorer` is given."""
    kl: KLControl = field(default_factory=lambda: KLControl(kl_coef=0.2, kl_target=6.0))
    """kl_coef, its target and horizon (SLF5K's; UltraFeedback: 0.05 and 3, KodCode: 0.07 and 1)."""
    kl_estimate: Literal["full", "k1"] = "full"
    """KL_t over the whole vocabulary, or log pi(y_t) - log pi_ref(y_t) as PPO has it."""
    gae: GAE = field(default_factory=lambda: GAE(whitening="unbiased"))
    """gamma, lam and whitening of the advantages."""
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy's loss."""
    value: ValueLoss = field(default_factory=ValueLoss)
    """The critic's loss."""
    rollouts: Rollouts = field(default_factory=lambda: Rollouts(generations=1, inner_epochs=4))
    """How prompts are answered, and how often answers are learned from."""
    max_ratio: float | None = 10.0
    """Mean ratio of an update beyond which it is skipped; None: never."""

    data: ClassVar[str] = "prompts"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        known_values(self)
        if self.max_ratio is not None and not self.max_ratio > 1:
            raise ValueError(f"max_ratio={self.max_ratio} would skip untouched batches; give more than 1 (10), or None")

    @property
    def batch_coupled(self) -> bool:
        """Whether an update is skipped by its mean ratio, which only the whole of it has."""
        return self.max_ratio is not None

    @property
    def experience(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of policy and reference, the states that the critic values, and the KL over the vocabulary."""
        full = {FULL_KL} if self.kl_estimate == "full" else set()
        return {"policy": WITH_STATE | full, "reference": LOGP}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs and states of the policy (and the reference's log-probs, if the loss has a KL term)."""
        return {"policy": LOGP | {"hidden"}} | ({"reference": LOGP} if self.policy_loss.kl_loss else {})

    def prepare(self, run: Preparation) -> None:
        """Name the reward: the scorer that was given, or `text2grad-reward` with the options of `critiques`."""
        if self.reward != REWARD:
            return
        if self.scorer is not None:
            run.reward_by(make_rewarder("", self.scorer, run.scorer).scorers)
            return
        options = self.critiques.options(run.scorer(REWARD))
        if self.critiques.annotator == "lm" and not self.critiques.critic:  # the policy as it is now, not as it learns
            options["lm"] = run.given.get("reference") or run.policy.reference()
        run.reward_by({REWARD: run.scorer(REWARD, **options)})

    def init_state(self, config: Any) -> Critic:
        """The value head and the KL coefficient."""
        return Critic(config, self.kl, lr_factor=self.value.critic_lr_factor)

    def rewards(self, experience: Experience, state: nn.Module | None) -> Tensor:
        """Scores less the KL penalty: (N, T). The coefficient then adapts."""
        if self.kl_estimate == "k1":
            return kl_penalised(experience, state)
        assert isinstance(state, Critic)
        kl_NT, mask_NT = experience.stats["policy"].extra[FULL_KL], experience.mask_NT
        rewards_NT = token_rewards(experience.reward_NT, kl_NT, mask_NT, state.kl_coef.to(kl_NT))
        state.observe(masked_sum(kl_NT, mask_NT))
        return torch.where(mask_NT, rewards_NT, 0.0)

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """GAE, whitened as asked, and returns."""
        assert experience.value_NT is not None
        mask_NT, unbiased = experience.mask_NT, self.gae.whitening == "unbiased"
        found_NT, return_NT = advantages(
            reward_NT, experience.value_NT, mask_NT, self.gae.gamma, self.gae.lam, white=unbiased
        )
        found_NT = found_NT if unbiased else self.gae.whitened(found_NT, mask_NT)
        return Advantages(torch.where(mask_NT, found_NT, 0.0), return_NT)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that rollouts make, for tests."""
        return example_columns(rng, mask_NT, critic=True)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """PPO's loss on a minibatch, or 0 where its mean ratio is beyond `max_ratio`."""
        longest = self.rollouts.sampling.max_new_tokens
        found = policy_gradient_loss(stats, batch, self.policy_loss, longest, self.value, state)
        if self.max_ratio is None:
            return found
        with torch.no_grad():
            own = (torch.as_tensor(x).double() * float(batch.counts) for x in found.metrics["policy/ratio"])
            total, tokens = map(float, summed(*own))
            skipped = total > self.max_ratio * max(tokens, 1.0)
        metrics = {**found.metrics, "policy/skipped": (float(skipped), 1.0)}
        return Loss(0.0 * found.sum if skipped else found.sum, found.count, metrics)
