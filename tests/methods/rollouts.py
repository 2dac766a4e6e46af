"""Completions with rewards, and one real pass over them, for the tests of methods that learn from rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.credit import Credit
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.lm import LM
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.trace import Trace
from tests.methods.one_pass import exact_lm


class Given:
    """A scorer that puts given values on tokens: rows of (N, T), in the order in which completions are drawn."""

    def __init__(self, rewards: Sequence[Sequence[float]]):
        self.rewards = rewards

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        return [Credit(trace=t, values=np.asarray(r[: len(t)], float)) for t, r in zip(items, self.rewards)]


def given_rollouts(completions: Sequence[Sequence[Sequence[int]]], ended: bool = True) -> Any:
    """A generator that answers with given ids: completions[prompt][sample]."""

    def generate(lm: LM, prompts: Any, n: int, sampling: Any, *, seed: int) -> list[list[Trace]]:
        return [
            [lm.trace_of_ids(p, ids, ended=ended) for ids in some] for p, some in zip(prompts, completions, strict=True)
        ]

    return generate


def make_step(
    objective: Any,
    completions: Sequence[Sequence[Sequence[int]]],
    rewards: Sequence[Sequence[float]],
    *,
    lm: LM | None = None,
    models: dict[str, LM] | None = None,
    ended: bool = True,
) -> RolloutStep:
    """A step whose first batch is these completions with these rewards on their tokens.

    Args:
        models: those that the objective's `experience` names; default: for each an own copy of the policy.
    """
    lm = lm or exact_lm(0)
    groups = []
    for row in range(len(completions)):
        example = Example(prompt=f"film {row}?", kind="prompt", row=row)
        groups.append(Group(example=example, prompt_ids=lm.encode_prompt(example.prompt)))
    given = {n: (models or {}).get(n) or lm.reference() for n in objective.experience if n != "policy"}
    step = RolloutStep(
        objective,
        lm,
        groups,
        rewarder=Rewarder({"given": Given(rewards)}),
        models=given,
        generate=given_rollouts(completions, ended),
    )
    if step.state is not None:
        step.state.double()
    return step


def gradient(lm: LM) -> Tensor:
    """Gradients of all parameters, as one vector."""
    return torch.cat(
        [torch.zeros(p.numel()).to(p) if p.grad is None else p.grad.flatten() for p in lm.model.parameters()]
    )


def logps(lm: LM, prompt_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
    """log pi of each token, from the plain model, with gradient: (T,)."""
    inputs = torch.tensor([[*prompt_ids, *ids]])
    logits = lm.causal(inputs).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(list(ids))[:, None])[:, 0]


def states(lm: LM, prompt_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The last hidden state before each token: (T, H)."""
    inputs = torch.tensor([[*prompt_ids, *ids]])
    return lm.causal.base_model(inputs).last_hidden_state[0, len(prompt_ids) - 1 : -1]
