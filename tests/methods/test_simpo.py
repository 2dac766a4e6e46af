"""SimPO: by hand, its invariance to length, and TRL's formula written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.train.simpo import SimPO, simpo_loss
from tests.methods.by_hand import gradient, mean, pairs, stats


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    s = {"policy": stats([-1.0, -2.0, -3.0], [-4.0, -2.0])}  # means -2 and -3; margin 2 * 1 - 0.5
    loss = SimPO(beta=2, gamma=0.5).loss(s, pairs())
    assert mean(loss) == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-14)
    assert mean(loss, "rewards/chosen") == -4 and mean(loss, "rewards/rejected") == -6
    assert mean(loss, "rewards/margins") == 2 and mean(loss, "logps/chosen") == -6
    weight = 2 * sigmoid(-1.5)
    wanted = torch.tensor([[-weight / 3] * 3, [weight / 2, weight / 2, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss, s["policy"]), wanted)


def test_saying_every_token_twice_changes_nothing():
    once = SimPO().loss({"policy": stats([-1.0, -2.5], [-0.5, -2.0, -1.0])}, pairs())
    twice = SimPO().loss({"policy": stats([-1.0, -2.5] * 2, [-0.5, -2.0, -1.0])}, pairs())
    assert mean(twice) == pytest.approx(mean(once), rel=1e-15)
    assert mean(twice, "rewards/margins") == pytest.approx(mean(once, "rewards/margins"), rel=1e-15)


def test_limits():
    alike = {"policy": stats([-1.0], [-1.0, -1.0])}
    assert mean(SimPO(gamma=0).loss(alike, pairs())) == pytest.approx(math.log(2))
    assert mean(SimPO(gamma=1).loss(alike, pairs())) == pytest.approx(-math.log(sigmoid(-1)))


@pytest.mark.parametrize("chosen, rejected, loss", [(0.0, -1e4, 0.0), (-1e4, 0.0, 2e4 + 1)])
def test_saturation_is_finite(chosen, rejected, loss):
    s = {"policy": stats([chosen], [rejected])}
    found = SimPO().loss(s, pairs())
    assert mean(found) == pytest.approx(loss) and torch.isfinite(gradient(found, s["policy"])).all()


def test_empty_completion_has_reward_0():
    loss = SimPO(gamma=0).loss({"policy": stats([], [-1.0])}, pairs())
    assert mean(loss, "rewards/chosen") == 0 and mean(loss) == pytest.approx(-math.log(sigmoid(2)))
    assert mean(SimPO().loss({"policy": stats([], [])}, pairs())) == pytest.approx(-math.log(sigmoid(-1)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_trls_formula(smoothing):
    """TRL 1.16, CPO with loss "simpo": the margin is subtracted as gamma / beta, before beta multiplies."""
    torch.manual_seed(0)
    c, r = torch.randn(2, 6, dtype=torch.float64) * 3
    logits = c - r - 0.7 / 2.5
    wanted = -F.logsigmoid(2.5 * logits) * (1 - smoothing) - F.logsigmoid(-2.5 * logits) * smoothing
    torch.testing.assert_close(simpo_loss(c, r, beta=2.5, gamma=0.7, label_smoothing=smoothing), wanted)


def test_options():
    with pytest.raises(ValueError, match="beta="):
        SimPO(beta=0)
    with pytest.raises(ValueError, match="label_smoothing"):
        SimPO(label_smoothing=-0.1)
