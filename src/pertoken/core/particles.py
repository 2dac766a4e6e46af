"""Sequential Monte Carlo over token sequences: particles that are drawn, weighed, and resampled where weights diverge.

N particles of one prompt. Each step adds the increment of its sampler to a particle's log-weight, so that (properly
weighted samplers) the weighted particles stand for the target, and the mean weight estimates its normalising constant:

    posterior(y) = sum_i W_i 1(y_i = y) / sum_i W_i,      Z^ = 1/N sum_i W_i,      ESS = (sum W)^2 / sum W^2

A particle of weight 0 is dead: it counts in the mean. Below ``ess * N`` the particles are resampled and all weigh Z^.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .decode import Guide, generators

Resampling = Literal["multinomial", "stratified", "systematic", "residual"]


class StepSampler(Protocol):
    """Draws the next token of each particle from a guide's log-weights, with an increment of its log-weight, such that
    E[exp(increment) 1(token = v)] is the target's weight of v."""

    def start(self, n: int) -> Any:
        """State of n particles without a token (what a constraint has read)."""
        ...

    def step(self, state: Any, logw_NV: Tensor, draws: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) and increments (N,); an increment of -inf: dead, the id means nothing. The state moves on."""
        ...

    def end(self, state: Any, logw_NV: Tensor) -> np.ndarray:
        """Log of the target's weight of the terminator, (N,): what it costs to be cut off here."""
        ...

    def reorder(self, state: Any, index: Sequence[int]) -> Any:
        """The state in which row i is what row ``index[i]`` was."""
        ...


@dataclass(frozen=True, kw_only=True)
class Particles:
    """Options of the particle runner."""

    particles: int = 5
    """N."""
    ess: float = 0.5
    """Resample where the effective sample size falls below this share of N (0: never)."""
    resampling: Resampling = "multinomial"
    """How."""
    max_tokens: int = 100
    """Tokens of a particle; then the terminator is forced, and weighed."""

    def __post_init__(self) -> None:
        if self.particles < 1 or self.max_tokens < 0 or not 0 <= self.ess <= 1:
            raise ValueError(f"{self}: particles >= 1, max_tokens >= 0 and ess in [0, 1] are needed")
        if self.resampling not in ("multinomial", "stratified", "systematic", "residual"):
            raise ValueError(
                f"resampling={self.resampling!r} is not one of multinomial, stratified, systematic, residual"
            )


@dataclass(frozen=True)
class Population:
    """Particles at the end.

    Attributes:
        tokens: ids of each, the terminator left out. logw: log-weights, (N,); -inf: dead. finished: ended by its
            terminator (drawn or forced) with a weight.
        log_marginal: log of the estimate of Z.
        ess: effective sample size after each step, before resampling; resampled: steps after which it was done.
        increments: of each particle, the log-weight each token brought (resampled particles keep their own history).
    """

    tokens: list[list[int]]
    logw: np.ndarray
    finished: list[bool]
    log_marginal: float
    ess: list[float] = field(default_factory=list)
    resampled: list[int] = field(default_factory=list)
    increments: list[list[float]] = field(default_factory=list)

    def weights(self) -> np.ndarray:
        """Normalised, (N,); all 0 if every particle is dead."""
        total = logsumexp(self.logw)
        return np.zeros(len(self.logw)) if total == -np.inf else np.exp(self.logw - total)

    def posterior(self, key: Callable[[list[int]], Any] = tuple) -> dict[Any, float]:
        """Share of each outcome, most likely first (equal ones add up); empty if every particle is dead."""
        out: dict[Any, float] = {}
        for tokens, w in zip(self.tokens, self.weights(), strict=True):
            if w > 0:
                out[key(tokens)] = out.get(key(tokens), 0.0) + float(w)
        return dict(sorted(out.items(), key=lambda item: -item[1]))


def logsumexp(logw: np.ndarray) -> float:
    """log sum exp, -inf for nothing."""
    top = float(np.max(logw, initial=-np.inf))
    return top if not math.isfinite(top) else top + math.log(float(np.exp(logw - top).sum()))


def effective_size(logw: np.ndarray) -> float:
    """(sum W)^2 / sum W^2; 0 if all are dead."""
    top = float(np.max(logw, initial=-np.inf))
    if top == -np.inf:
        return 0.0
    w = np.exp(logw - top)
    return float(w.sum() ** 2 / (w**2).sum())


def ancestors(weights: np.ndarray, how: Resampling, rng: np.random.Generator) -> np.ndarray:
    """Indices (N,) of those that go on, in expectation N w_i times each.

    Args:
        weights: normalised, (N,).
    """
    n = len(weights)
    if how == "residual":
        counts = np.floor(n * weights + 1e-12).astype(int)
        sure = np.repeat(np.arange(n), counts)
        left = n - len(sure)
        if not left:
            return sure
        rest = np.clip(n * weights - counts, 0, None)
        return np.concatenate([sure, ancestors_of(rest / rest.sum(), rng.random(left))])
    if how == "multinomial":
        points = rng.random(n)
    else:
        points = (np.arange(n) + (rng.random() if how == "systematic" else rng.random(n))) / n
    return ancestors_of(weights, points)


def ancestors_of(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where points of [0, 1) fall among cumulated weights; never on a weight of 0."""
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, np.minimum(points * cumulative[-1], np.nextafter(cumulative[-1], 0)), "right")


@torch.no_grad()
def smc(
    guide: Guide,
    prompt: Any,
    sampler: StepSampler,
    options: Particles | None = None,
    *,
    stops: Sequence[int],
    seed: int = 0,
    place: int = 0,
    critic: Callable[[list[list[int]], list[bool]], Sequence[float]] | None = None,
) -> Population:
    """Run particles of one prompt to their ends.

    Args:
        guide: next-token log-weights; normalised or not (its normalisation is part of the target).
        sampler: what draws.
        stops: ids that end a sequence.
        place: of the prompt among others, for its draws.
        critic: log-scores of particles (tokens, whether they ended): multiplies weights, and is divided out again at
            the next step, so that only the last score stays (a twist). With ``ess=0`` it is asked at the end alone.

    Returns:
        The particles. If all die, weights are 0 and ``log_marginal`` is -inf.
    """
    options = options or Particles()
    n, terminators = options.particles, set(stops)
    draws, chance = generators(seed, place, n), generators(seed, place, n + 1)[-1]
    logw, twist = np.zeros(n), np.zeros(n)
    tokens: list[list[int]] = [[] for _ in range(n)]
    history: list[list[float]] = [[] for _ in range(n)]
    finished = [False] * n
    active = list(range(n))
    state, own = guide.start([prompt] * n), sampler.start(n)
    last: Tensor | None = None
    out_ess, resampled = [], []

    def scored(rows: Sequence[int]) -> None:
        """Take the last score out and put the new one in."""
        if critic is None or not rows:
            return
        alive = [i for i in rows if logw[i] > -np.inf]
        found = np.asarray(critic([tokens[i] for i in alive], [finished[i] for i in alive]), np.float64)
        if found.shape != (len(alive),):
            raise ValueError(f"the critic gave scores of shape {found.shape} for {len(alive)} particles; give one each")
        if np.isnan(found).any():
            raise ValueError("the critic gave NaN; return log-scores, -inf for what must not be")
        for i, score in zip(alive, found, strict=True):
            logw[i] += score - twist[i]
            twist[i] = score if score > -np.inf else 0.0

    for step in range(options.max_tokens + 1):
        if not active:
            break
        logw_NV = guide.step(state, last)
        was = list(active)
        if step == options.max_tokens:
            for i, cost in zip(active, sampler.end(own, logw_NV), strict=True):
                logw[i] += cost
                history[i].append(float(cost))
                finished[i] = logw[i] > -np.inf
            active = []
        else:
            found, increments = sampler.step(own, logw_NV, [draws[i] for i in active])
            rows = []
            for row, (i, token, more) in enumerate(zip(active, found.tolist(), increments.tolist(), strict=True)):
                logw[i] += more
                history[i].append(more)
                if logw[i] == -np.inf:
                    continue
                if token in terminators:
                    finished[i] = True
                    continue
                tokens[i].append(token)
                rows.append(row)
            last = torch.as_tensor(found, device=logw_NV.device)[rows]
            active = [active[row] for row in rows]
            if 0 < len(rows) < len(was):
                guide.reorder(state, torch.tensor(rows, device=logw_NV.device))
                own = sampler.reorder(own, rows)
        if options.ess or not active:
            scored(was if options.ess else range(n))
        out_ess.append(effective_size(logw))
        if options.ess and 0 < out_ess[-1] < options.ess * n and active:
            total = logsumexp(logw)
            chosen = ancestors(np.exp(logw - total), options.resampling, chance).tolist()
            where = {i: row for row, i in enumerate(active)}
            going = [k for k, i in enumerate(chosen) if i in where]
            rows = [where[chosen[k]] for k in going]
            tokens, history = [list(tokens[i]) for i in chosen], [list(history[i]) for i in chosen]
            finished, twist = [finished[i] for i in chosen], twist[chosen]
            logw = np.full(n, total - math.log(n))
            if rows:
                index = torch.tensor(rows, device=logw_NV.device)
                guide.reorder(state, index)
                own, last = sampler.reorder(own, rows), None if last is None else last[index]
            active = going
            resampled.append(step)
    return Population(tokens, logw, finished, logsumexp(logw) - math.log(n), out_ess, resampled, history)
