# pyright: reportArgumentType=false, reportIndexIssue=false
"""The particle runner against exact enumeration, resampling schemes, and particles that die."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.particles import Particles, Population, ancestors, effective_size, logsumexp, smc

EOS, NAN = 0, float("nan")
NEXT = np.array([[0.1, 0.5, 0.4], [0.3, 0.1, 0.6], [0.5, 0.3, 0.2]])  # of the last token (prompt: 0)


class Chain:
    """A guide: a Markov chain over three tokens, the first of which ends it."""

    vocabulary = 3

    def start(self, prompts):
        return SimpleNamespace(last=torch.zeros(len(prompts), dtype=torch.long))

    def step(self, state, last):
        state.last = state.last if last is None else last
        return torch.from_numpy(np.log(NEXT))[state.last]

    def reorder(self, state, index):
        state.last = state.last[index]


class Forbids:
    """Draws from the chain, accepts or dies: no more than one 2 in a sequence (weight 0 where there is another)."""

    def start(self, n):
        return [0] * n

    def step(self, state, logw, draws):
        tokens, increments = [], []
        for row, (w, draw) in enumerate(zip(logw.exp().numpy(), draws, strict=True)):
            token = int(draw.choice(3, p=w / w.sum()))
            state[row] += token == 2
            tokens.append(token)
            increments.append(-math.inf if state[row] > 1 else 0.0)
        return np.array(tokens), np.array(increments)

    def end(self, state, logw):
        return logw[:, EOS].numpy()

    def reorder(self, state, index):
        return [state[i] for i in index]


def exact(length, score=lambda y: 1.0):
    """Weights of all sequences of at most `length` tokens before the terminator."""
    out = {}
    for k in range(length + 1):
        for y in itertools.product((1, 2), repeat=k):
            p = np.prod([NEXT[a, b] for a, b in zip((0, *y), (*y, EOS), strict=True)])
            if y.count(2) <= 1:
                out[y] = p * score(y)
    return out


def estimate(options, runs=4000, **more):
    total, mean = {}, 0.0
    for seed in range(runs):
        found = smc(Chain(), 0, Forbids(), options, stops=(EOS,), seed=seed, **more)
        mean += math.exp(found.log_marginal) / runs
        for tokens, w in zip(found.tokens, found.logw, strict=True):
            if w > -math.inf:
                key = tuple(tokens)
                total[key] = total.get(key, 0) + math.exp(w) / len(found.tokens) / runs
    return total, mean


@pytest.mark.parametrize("how", ["multinomial", "stratified", "systematic", "residual"])
def test_weighted_particles_stand_for_the_target(how):
    """The mean of particle weights at each sequence is its target weight, whatever the scheme: 1,500 runs of 4
    particles, five standard errors (a false alarm in less than one of a thousand of these tests)."""
    wanted = exact(3)
    found, mean = estimate(Particles(particles=4, ess=0.9, resampling=how, max_tokens=3), runs=1500)
    assert set(found) <= set(wanted)
    for y, w in wanted.items():
        assert abs(found.get(y, 0) - w) < 5 * math.sqrt(w / 1500) + 1e-9, y
    assert mean == pytest.approx(sum(wanted.values()), abs=5 * math.sqrt(1 / 1500))


@pytest.mark.parametrize("ess", [0.0, 0.9])
def test_a_critic_twists_and_its_last_score_stays(ess):
    """Target: weight times 3 for each 1, on the way and at the end."""
    score = lambda y: 3.0 ** list(y).count(1)
    critic = lambda tokens, ended: [math.log(score(y)) for y in tokens]
    wanted = exact(2, score)
    found, _ = estimate(Particles(particles=4, ess=ess, max_tokens=2), runs=3000, critic=critic)
    for y, w in wanted.items():
        assert abs(found.get(y, 0) - w) < 5 * math.sqrt(9 * w / 3000), y


def test_all_dead_is_said_and_divides_by_nothing():
    class Dies(Forbids):
        def step(self, state, logw, draws):
            return np.zeros(len(logw), int), np.full(len(logw), -math.inf)

    found = smc(Chain(), 0, Dies(), Particles(particles=3), stops=(EOS,))
    assert found.log_marginal == -math.inf and found.posterior() == {} and not any(found.finished)
    assert found.weights().tolist() == [0, 0, 0]


def test_no_tokens_forces_the_terminator():
    found = smc(Chain(), 0, Forbids(), Particles(particles=2, max_tokens=0), stops=(EOS,))
    assert found.tokens == [[], []] and found.log_marginal == pytest.approx(math.log(0.1))


def test_posterior_adds_up_equal_outcomes():
    found = Population([[1], [2], [1], [1]], np.log([1.0, 2.0, 3.0, 0.0 + 1e-300]), [True] * 4, 0.0)
    assert list(found.posterior()) == [(1,), (2,)] and found.posterior()[(1,)] == pytest.approx(4 / 6)


@pytest.mark.parametrize("how", ["multinomial", "stratified", "systematic", "residual"])
def test_ancestors_are_unbiased_and_never_dead(how):
    """20,000 draws; 5 standard errors of the mean count."""
    w, rng = np.array([0.0, 0.5, 0.3, 0.2, 0.0]), np.random.default_rng(0)
    counts = sum(np.bincount(ancestors(w, how, rng), minlength=5) for _ in range(4000)) / 4000
    assert counts[0] == counts[4] == 0
    np.testing.assert_allclose(counts, 5 * w, atol=5 * math.sqrt(5 * 0.25 / 4000))
    if how == "residual":
        assert all(np.bincount(ancestors(w, how, rng), minlength=5)[1] >= 2 for _ in range(50))


def test_effective_size():
    assert effective_size(np.log([1.0, 1, 1, 1])) == pytest.approx(4)
    assert effective_size(np.array([0.0, -math.inf])) == 1 and effective_size(np.full(3, -math.inf)) == 0
    assert effective_size(np.array([-1000.0, -1000.0])) == pytest.approx(2)
    assert logsumexp(np.array([-1000.0, -1000.0])) == pytest.approx(-1000 + math.log(2))


def test_bad_input():
    for bad in ({"particles": 0}, {"ess": 2.0}, {"max_tokens": -1}, {"resampling": "x"}):
        with pytest.raises(ValueError):
            Particles(**bad)
    with pytest.raises(ValueError, match="NaN"):
        smc(Chain(), 0, Forbids(), stops=(EOS,), critic=lambda t, e: [NAN] * len(t))
    with pytest.raises(ValueError, match="give one each"):
        smc(Chain(), 0, Forbids(), stops=(EOS,), critic=lambda t, e: [0.0])
