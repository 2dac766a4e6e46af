"""Maximum-likelihood inverse reinforcement learning: a reward from demonstrations alone, on frozen features.

    max_theta E_D[ log pi_theta(y|x) ],   pi_theta(y|x) prop. to pi_ref(y|x) exp( r(x, y; theta) / beta )

is (Zeng et al., arXiv 2210.01808; Li et al., 2405.17888) the max-min problem

    max_theta min_pi E_{y ~ D, y' ~ pi}[ ( r(x, y) - r(x, y') ) / beta + KL( pi || pi_ref ) ]

whose inner minimum is log pi_theta(y|x) - log pi_ref(y|x), reached at pi = pi_theta; the gradient in theta is
( grad r(y) - E_{pi_theta} grad r ) / beta. The KL term does not depend on theta. Unbounded, r can run to infinity;
`bounded` trains -log sigmoid of the same difference.

Suffixes: P prompts, K samples of each, F features. Rewards are on no scale but their own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import batches

Draw = Callable[[int, "RewardHead"], Tensor]
"""(round, the reward so far) -> features (P, K, F) of samples of the policy that is optimal for it."""


@dataclass(frozen=True, kw_only=True)
class IRL:
    """How a reward is learned from demonstrations."""

    irl_beta: float = 0.1
    """beta, strength of the KL to the reference in the policy's problem."""
    irl_rounds: int = 5
    """N, rounds of sampling, one epoch of reward steps, and policy steps."""
    irl_patience: int = 2
    """Rounds without a larger held-out gap after which it stops; the best round is kept."""
    bounded: bool = True
    """Train -log sigmoid of the difference, not the difference itself."""
    irl_policy: Literal["pool", "grpo"] = "pool"
    """pool: weights softmax(r / beta) over samples of the reference, exact; grpo: a model, trained between rounds."""
    irl_pool: int = 16
    """Samples of the reference a prompt."""
    irl_policy_steps: int = 50
    """GRPO updates between rounds (grpo alone)."""
    irl_lr: float = 1e-3
    """Learning rate of the head (AdamW)."""
    irl_weight_decay: float = 0.01
    """Decoupled weight decay of the head."""
    irl_seed: int = 0
    """Seed of weights, order, split and samples."""
    irl_batch: int = 16
    """Demonstrations an update."""
    irl_hidden: int = 64
    """Width of the head's layer."""
    irl_held_out: float = 0.2
    """Share of the prompts on which the gap is measured."""

    def __post_init__(self) -> None:
        if self.irl_policy not in ("pool", "grpo"):
            raise ValueError(f"irl_policy={self.irl_policy!r} is not one of pool, grpo")
        counts = (self.irl_rounds, self.irl_patience, self.irl_pool, self.irl_batch, self.irl_hidden)
        if min(counts) < 1 or not self.irl_beta > 0 or not self.irl_lr > 0 or not 0 <= self.irl_held_out < 1:
            raise ValueError(f"{self}: counts of 1 or more, irl_beta > 0, irl_lr > 0, 0 <= irl_held_out < 1 are needed")


def pool_policy(rewards_PK: Tensor, beta: float) -> Tensor:
    """The optimal policy over a pool of samples of pi_ref: weights softmax(r / beta) over the last axis."""
    return torch.softmax(rewards_PK / beta, -1)


def differences(demo_P: Tensor, samples_PK: Tensor, beta: float) -> Tensor:
    """(r(demonstration) - r(sample)) / beta: (P, K)."""
    return (demo_P[:, None] - samples_PK) / beta


def objective(demo_P: Tensor, samples_PK: Tensor, weight_PK: Tensor, beta: float, *, bounded: bool = False) -> Tensor:
    """What the reward maximises, without the KL term: the mean over prompts of E_pi[(r_demo - r_sample) / beta], or of
    E_pi[log sigmoid] of it. Weights of the samples (summing to 1 a prompt) carry no gradient."""
    d_PK = differences(demo_P, samples_PK, beta)
    return (weight_PK.detach() * (F.logsigmoid(d_PK) if bounded else d_PK)).sum(-1).mean()


def inner_value(demo: Tensor, rewards_Y: Tensor, logpi_Y: Tensor, logref_Y: Tensor, beta: float) -> Tensor:
    """The bracket of the min-max problem on a finite set of responses, KL term included: a scalar.

    Args:
        demo: r of the demonstration. rewards_Y, logpi_Y, logref_Y: r, log pi and log pi_ref of every response.
    """
    pi_Y = logpi_Y.exp()
    return (demo - (pi_Y * rewards_Y).sum()) / beta + (pi_Y * (logpi_Y - logref_Y)).sum()


class RewardHead(nn.Module):
    """r on features (..., F): standardise, one GELU layer, one number."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int = 64, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """Rewards (...)."""
        return self.net((features.float() - self.mean) / self.scale)[..., 0]


def fit_reward(
    demo_PF: Tensor,
    draw: Draw,
    config: IRL | None = None,
    *,
    groups: Sequence[Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[RewardHead, dict[str, Any]]:
    """Learn a reward from demonstrations.

    Args:
        demo_PF: features of a demonstration a prompt.
        draw: samples of the policy in each round; for ``irl_policy="pool"`` the pool itself, always the same.
        groups: what must not be split (equal prompts), one key a demonstration; default: each is its own.

    Returns:
        The head of the best round, and what was found: ``rounds`` (held-out gap, kl, loss), ``best``.

    Raises:
        ValueError: fewer than two demonstrations; features that are not finite.
    """
    config = config or IRL()
    demo_PF = demo_PF.float()
    if len(demo_PF) < 2:
        raise ValueError(f"{len(demo_PF)} demonstrations teach no reward; give 2 or more of each category")
    rng, keys = np.random.default_rng(config.irl_seed), list(groups) if groups is not None else range(len(demo_PF))
    order = list(dict.fromkeys(keys))
    count = min(max(round(config.irl_held_out * len(order)), int(config.irl_held_out > 0)), len(order) - 1)
    held = {order[i] for i in rng.permutation(len(order))[:count]}
    train = torch.tensor([i for i, key in enumerate(keys) if key not in held])
    test = torch.tensor([i for i, key in enumerate(keys) if key in held]) if held else train
    head, best, history = RewardHead(demo_PF.shape[1], config.irl_hidden, config.irl_seed), None, []
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.irl_lr, weight_decay=config.irl_weight_decay)
    exact, beta = config.irl_policy == "pool", config.irl_beta
    for number in range(config.irl_rounds):
        samples_PKF = draw(number, head).float()
        if not (torch.isfinite(samples_PKF).all() and torch.isfinite(demo_PF).all()):
            raise ValueError("features of responses are not finite; look at the encoder, or leave those rows out")
        if number == 0:
            every = torch.cat([demo_PF[train], samples_PKF[train].flatten(0, 1)])
            head.mean.copy_(every.mean(0))
            head.scale.copy_(every.std(0).clamp(min=1e-6))
        losses = []
        for some in batches(len(train), config.irl_batch, seed=config.irl_seed, epoch=number):
            rows = train[some]
            r_PK = head(samples_PKF[rows])
            weight_PK = _weights(r_PK, beta, exact)
            loss = -objective(head(demo_PF[rows]), r_PK, weight_PK, beta, bounded=config.bounded)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            r_PK = head(samples_PKF[test])
            weight_PK = _weights(r_PK, beta, exact)
            gap = float((weight_PK * (head(demo_PF[test])[:, None] - r_PK)).sum(-1).mean())
            kl = float((weight_PK * (weight_PK * r_PK.shape[1]).clamp(min=1e-30).log()).sum(-1).mean())
        history.append({"gap": gap, "kl": kl if exact else float("nan"), "loss": float(np.mean(losses))})
        say(f"irl round {number + 1}: held-out gap {gap:.3f}" + (f", KL to the reference {kl:.2f}" if exact else ""))
        if best is None or gap > history[best]["gap"]:
            best, kept = number, copy.deepcopy(head.state_dict())
        elif number - best >= config.irl_patience:
            break
    head.load_state_dict(kept)
    record = [{k: v for k, v in h.items() if v == v} for h in history]
    return head.eval().requires_grad_(False), {"rounds": record, "best": best, "demonstrations": len(demo_PF)}


def balanced(categories: Sequence[str], seed: int = 0) -> list[int]:
    """Indices of as many rows of each category as the rarest has, drawn by `seed`, in their order."""
    least, rng = min(Counter(categories).values(), default=0), np.random.default_rng(seed)
    rows = {c: [i for i, other in enumerate(categories) if other == c] for c in dict.fromkeys(categories)}
    return sorted(int(i) for some in rows.values() for i in rng.permutation(some)[:least])


def _weights(rewards_PK: Tensor, beta: float, exact: bool) -> Tensor:
    return pool_policy(rewards_PK.detach(), beta) if exact else torch.full_like(rewards_PK, 1 / rewards_PK.shape[1])
