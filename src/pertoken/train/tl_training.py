"""TL-Training — supervised tool use: failed calls are not imitated, the tokens that pick the tool weigh more.

Ye et al., "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP Findings
2025, arXiv 2412.15495. Of an answer t with key tokens K and the rest NK:

    MAE   a turn whose call fails (the tool's output looks like an error) stays in the context, and has no loss
    PKT   L = sum_m w_m ( -log p(t_m | ...) ) / sum_m w_m,   w = clip(|NK| / |K|, 1, w_max) on K, 1 elsewhere

Key tokens are the first of the tool's name and, for each other tool at hand whose name begins with the same l >= 1
tokens, the token at place l: the first that tells the two apart (behind the name, where the other one goes on). Names
are tokenized where they stand, so what counts is what the model has to decide. The loss is a mean over answers of each
one's weighted mean; an answer without a call has plain cross-entropy. MAE, a filter of dialogues, is `last_replies`.

IRM, the third part, is PPO on the scorer `tl-training-reward` with the settings of `irm_ppo`.

Differs from the authors' code: it trains one answer a step, of which ours is the mean over a batch; key tokens come
from the bytes of the name instead of token strings of LLaMA. ``compat="reference"`` takes the tokens that end a
parameter out of |NK| as it does (they keep weight 1), the last token but one where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.advantage import GAE
from ..core.critic import KLControl
from ..core.data import Group, encode
from ..core.experience import Rollouts
from ..core.policy_loss import PolicyLoss
from ..core.protocols import Batch, Loss, Preparation
from ..core.rollout import Sampling
from ..core.stats import Stats, masked_sum
from ..core.trace import Trace, byte_offsets
from ._policy_gradient import ValueLoss
from ._tool_dialogues import ERRORS, last_replies, names_called, tool_names
from .ppo import PPO

KEY, NEUTRAL = "key_tokens", "neutral_tokens"
_ENDS = re.compile(rb"""'[,)]|"\)|\)""")  # of the release's list of tokens


def key_places(name: Sequence[Any], others: Sequence[Sequence[Any]]) -> list[int]:
    """Places of key tokens, counted from the first of the called name: 0, and the first that tells each of `others`
    with a common beginning apart. Names like the called one are passed over; what follows the names may be in the
    sequences (a name that is the beginning of another is told apart behind it)."""
    places = {0}
    for other in others:
        if list(other) == list(name):
            continue
        same = next((k for k, (a, b) in enumerate(zip(name, other)) if a != b), min(len(name), len(other)))
        if same:
            places.add(same)
    return sorted(places)


def pkt_weights(key_NT: Tensor, neutral_NT: Tensor, rest_NT: Tensor, max_weight: float = 9.0) -> Tensor:
    """Weights (N, T) of answer tokens: w on key tokens, 1 on the others, 0 outside.

    Args:
        key_NT, neutral_NT, rest_NT: disjoint masks over the answer. Neutral tokens do not count in |NK|.

    Raises:
        ValueError: masks that overlap; a `max_weight` below 1.
    """
    if not max_weight >= 1:
        raise ValueError(f"max_weight={max_weight} must be 1 (plain cross-entropy) or more")
    if ((key_NT & neutral_NT) | (key_NT & rest_NT) | (neutral_NT & rest_NT)).any():
        raise ValueError("key, neutral and other tokens must be disjoint masks")
    pre_N, other_N = key_NT.sum(1).double(), rest_NT.sum(1).double()
    w_N = (other_N / pre_N.clamp(min=1)).clamp(min=1.0, max=max_weight)
    weights_NT = torch.where(key_NT, w_N[:, None], 1.0)
    return torch.where(key_NT | neutral_NT | rest_NT, weights_NT, 0.0)


def pkt_loss(logp_NT: Tensor, weights_NT: Tensor) -> Tensor:
    """Weighted mean of -log p over each answer, (N,); 0 for an empty one. `logp_NT` in nats."""
    weights_NT = weights_NT.to(logp_NT)
    nll_NT = torch.where(weights_NT > 0, -logp_NT, 0.0)
    return (weights_NT * nll_NT).sum(1) / weights_NT.sum(1).clamp(min=torch.finfo(logp_NT.dtype).tiny)


def parameter_ends(trace: Trace) -> np.ndarray:
    """bool (T,): the release's tokens that end a parameter's value: a quote that a comma (of single quotes) or a
    parenthesis follows, or a closing parenthesis; the last but one if there is none.

    It names the places before them, but its loss at a place is that of the next token.
    """
    data, found = b"".join(trace.completion_pieces), np.zeros(len(trace), bool)
    for match in _ENDS.finditer(data):
        found[trace.tokens_between(match.start(), match.start() + 1)] = True
    if not found.any() and len(found) >= 2:
        found[-2] = True
    return found


def key_tokens(trace: Trace, tools: Sequence[str], encode_answer: Any) -> np.ndarray:
    """bool (T,): the key tokens of a trace's answer.

    Args:
        tools: names of the tools at hand.
        encode_answer: text -> ids, as the trace's own were made (`LM.encode_completion`).

    Raises:
        ValueError: it calls a tool that is not among `tools`.
    """
    text, keys = trace.raw_text, np.zeros(len(trace), bool)
    at, ids = byte_offsets(text), list(trace.completion_ids)
    for start, end, called in names_called(text, tools):
        first = int(trace.tokens_between(at[start], at[end])[0])
        spell = (lambda name: json.dumps(name, ensure_ascii=False)[1:-1]) if text[start - 1 : start] == '"' else str
        others = [list(encode_answer(text[:start] + spell(o) + text[end:])) for o in tools if o != called]
        alike = [other[first:] for other in others if other[:first] == ids[:first]]
        for place in key_places(ids[first:], alike):
            keys[min(first + place, len(keys) - 1)] = True
    return keys


@dataclass(frozen=True, kw_only=True)
class TLTraining:
    """Options of TL-Training's supervised stage."""

    max_weight: float = 9.0
    """w_max; 1 is plain cross-entropy."""
    mae: bool = True
    """Imitate no call that failed (and no turn that no tool output follows, unless it is the last)."""
    errors: tuple[str, ...] = ERRORS
    """Texts that make a tool's output an error; compared without punctuation and case."""
    compat: Literal["", "reference"] = ""
    """reference: tokens that end a parameter do not count in |NK|."""

    data: ClassVar[str] = "sft"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.max_weight < np.inf:
            raise ValueError(f"max_weight={self.max_weight} must be finite, and 1 (plain cross-entropy) or more")
        if self.compat not in ("", "reference"):
            raise ValueError(f"compat={self.compat!r} is not one of '', reference")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs, and ranks for accuracies."""
        return {"policy": frozenset({"logp", "rank"})}

    def prepare(self, run: Preparation) -> None:
        """Cut dialogues into one group a kept turn, and mark key tokens; reports what was dropped.

        Raises:
            ValueError: rows without the column tools; a called tool that is not among them.
        """
        run.groups, run.held_out = (self._cut(run, side) for side in (run.groups, run.held_out))
        several, without = 0, 0
        for group in run.every:
            (trace,) = group.traces
            row = group.example.row
            tools = tool_names(group.example.extra.get("tools"), row)
            try:
                keys = key_tokens(trace, tools, lambda text: run.policy.encode_completion(text)[0])
            except ValueError as error:
                raise ValueError(f"row {row}: {error}; mend the row, or add the tool") from error
            neutral = parameter_ends(trace) & ~keys if self.compat else np.zeros(len(trace), bool)
            group.add_column(KEY, [keys.astype(np.float64)])
            group.add_column(NEUTRAL, [neutral.astype(np.float64)])
            several, without = several + int(keys.sum() > 1), without + int(not keys.any())
        run.report(
            f"tl-training: {len(run.every)} answers, {several} with more than one key token, {without} without a call "
            "(plain cross-entropy)"
        )

    def _cut(self, run: Preparation, groups: list[Group]) -> list[Group]:
        """Groups of one turn each."""
        if all(isinstance(g.example.responses[0], str) for g in groups):
            return groups
        rows, report = last_replies([g.example for g in groups], self.errors if self.mae else None)
        out, encoded = encode(rows, run.policy, max_length=run.max_length)
        for line in report.lines() + encoded.lines():
            run.report(f"tl-training: {line}")
        return out

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        keys_NT = torch.from_numpy(rng.uniform(size=tuple(mask_NT.shape)) < 0.2) & mask_NT
        return {KEY: keys_NT.double(), NEUTRAL: torch.zeros_like(keys_NT, dtype=torch.float64)}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over answers."""
        policy = stats["policy"]
        if KEY not in batch.columns:
            raise ValueError(f"there is no column {KEY!r}; `prepare` makes it")
        key_NT = (batch.columns[KEY] > 0) & policy.mask_NT
        neutral_NT = (batch.columns[NEUTRAL] > 0) & policy.mask_NT
        weights_NT = pkt_weights(key_NT, neutral_NT, policy.mask_NT & ~key_NT & ~neutral_NT, self.max_weight)
        losses_N = pkt_loss(policy.logp_NT, weights_NT)
        with torch.no_grad():
            right_NT = policy.extra["rank"] == 0
            tokens, keys = policy.mask_NT.sum(), key_NT.sum()
            metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
                "key_token_accuracy": ((right_NT & key_NT).sum(), keys),
                "mean_token_accuracy": ((right_NT & policy.mask_NT).sum(), tokens),
                "cross_entropy": (-masked_sum(policy.logp_NT, policy.mask_NT).sum(), tokens),
                "key_weight": (torch.where(key_NT, weights_NT, 0.0).sum(), keys),
            }
        return Loss(losses_N.sum(), float(len(losses_N)), metrics)


def irm_ppo(**changes: Any) -> PPO:
    """PPO with the settings of IRM: one greedy rollout a prompt, learned from once, KL penalty 0.3 on every token, the
    reward where its credit stands (theirs: on the last; see `changes`); GAE without whitening,
    values at half of the actor's rate. Theirs is a critic of its own; ours
    shares the policy's layers, so that its loss has weight 0.1 (at 1 it pulled a small policy apart). Their clamp of
    the reward to [-5, 5] does nothing to -2..1.

    Args:
        changes: fields of `PPO` that differ; the default reward is ``tl-training-reward``, level sequence as theirs
            with ``scorer=TLTrainingReward(level="sequence")``.
    """
    settings: dict[str, Any] = {
        "reward": "" if "scorer" in changes else "tl-training-reward",
        "kl": KLControl(kl_coef=0.3),
        "gae": GAE(lam=0.95, whitening="none"),
        "policy_loss": PolicyLoss(clip=0.2),
        "value": ValueLoss(vf_coef=0.1, value_clip=0.2, critic_lr_factor=0.5),
        "rollouts": Rollouts(generations=1, inner_epochs=1, sampling=Sampling(temperature=0.0, max_new_tokens=512)),
    }
    return PPO(**{**settings, **changes})
