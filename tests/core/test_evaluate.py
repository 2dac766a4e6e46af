"""Figures of comparisons: by hand, and against the naive computation."""

import math

import numpy as np
import pytest
import torch

from pertoken.core.data import encode
from pertoken.core.evaluate import (
    log_ratio_sums,
    mean_interval,
    pair_margins,
    seeds_interval,
    sequence_kl,
)
from pertoken.core.examples import Example
from tests import tiny


@pytest.fixture(scope="module")
def setting():
    policy, reference = tiny.lm(0), tiny.lm(1)
    rows = [
        Example(prompt="how was it", responses=("great plot", "dull")),
        Example(prompt="film", responses=("a", "loved it all")),
    ]
    return policy, reference, encode(rows, policy)[0]


def _logps(lm, trace):
    ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
    with torch.no_grad():
        return lm.causal(ids).logits[0, len(trace.prompt_ids) - 1 : -1].log_softmax(-1)


def test_log_ratio_sums_and_margins(setting):
    policy, reference, groups = setting
    sums = log_ratio_sums(policy, reference, groups)
    for g, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            at = torch.tensor(trace.completion_ids)[:, None]
            expected = (_logps(policy, trace) - _logps(reference, trace)).gather(1, at).sum()
            assert sums[g, k] == pytest.approx(float(expected), abs=1e-9)
    np.testing.assert_allclose(pair_margins(policy, reference, groups), sums[:, 0] - sums[:, 1])


@pytest.mark.parametrize("forward", [False, True])
def test_sequence_kl_is_the_sum_over_positions(setting, forward):
    policy, reference, groups = setting
    traces = [t for g in groups for t in g.traces]
    found = sequence_kl(policy, reference, traces, forward=forward)
    for value, trace in zip(found, traces, strict=True):
        p, q = _logps(policy, trace), _logps(reference, trace)
        p, q = (q, p) if forward else (p, q)
        assert value == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-9)
    assert sequence_kl(policy, policy, traces) == pytest.approx(0, abs=1e-9)


def test_mean_interval_covers_and_is_reproducible():
    """95 % bootstrap intervals of 40 normal values: over 200 draws (fixed seed) between 88 % and 98 % cover; a right
    interval fails this less than once in 10^4 seeds."""
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        mean, low, high = mean_interval(rng.normal(size=40), seed=i, draws=500)
        assert low <= mean <= high
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.98
    assert mean_interval([1, 2, 3]) == mean_interval([1, 2, 3])
    assert all(math.isnan(v) for v in mean_interval([]))


def test_seeds_interval_by_hand():
    mean, low, high = seeds_interval([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)  # standard deviation 1, two degrees of freedom
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    assert math.isnan(seeds_interval([1.0])[1])
