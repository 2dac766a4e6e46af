"""DPO: by hand, its limits, the gradient of the paper, and TRL's formula written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.train.dpo import DPO, dpo_loss
from tests.methods.by_hand import gradient, mean, pairs, stats


def given():
    """One pair: log-ratios 2 and -1, so the margin is 3 beta."""
    return {"policy": stats([-1.0, -2.0], [-4.0]), "reference": stats([-2.0, -3.0], [-3.0])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    loss = DPO(beta=0.5).loss(given(), pairs())
    assert mean(loss) == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-14)
    shown = {"rewards/chosen": 1, "rewards/rejected": -0.5, "rewards/margins": 1.5, "rewards/accuracies": 1}
    shown |= {"logps/chosen": -3, "logps/rejected": -4}
    assert {name: mean(loss, name) for name in loss.metrics} == pytest.approx(shown)


def test_gradient_is_beta_times_sigmoid_of_the_negative_margin():
    s = given()
    weight = 0.5 * sigmoid(-1.5)
    wanted = torch.tensor([[-weight, -weight], [weight, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(DPO(beta=0.5).loss(s, pairs()), s["policy"]), wanted)
    assert s["reference"].logp_NT.grad is None


def test_limits():
    s = given()
    same = {"policy": s["policy"], "reference": s["policy"]}
    assert mean(DPO().loss(same, pairs())) == pytest.approx(math.log(2))
    assert mean(DPO(beta=1e-9).loss(s, pairs())) == pytest.approx(math.log(2))


@pytest.mark.parametrize("margin, loss, weight", [(1e4, 0.0, 0.0), (-1e4, 1e3, 0.1), (0.0, math.log(2), 0.05)])
def test_saturation_is_finite(margin, loss, weight):
    s = {"policy": stats([margin], [0.0]), "reference": stats([0.0], [0.0])}
    found = DPO().loss(s, pairs())
    assert mean(found) == pytest.approx(loss)
    assert gradient(found, s["policy"])[:, 0].tolist() == pytest.approx([-weight, weight])


def test_empty_completions():
    loss = DPO().loss({"policy": stats([], [-1.0]), "reference": stats([], [-2.0])}, pairs())
    assert mean(loss) == pytest.approx(-math.log(sigmoid(-0.1)))
    assert mean(DPO().loss({"policy": stats([], []), "reference": stats([], [])}, pairs())) == pytest.approx(
        math.log(2)
    )


def test_equals_trls_formula():
    """TRL 1.16, loss "sigmoid": -logsigmoid(beta * delta of log-ratios); with smoothing as in cDPO."""
    torch.manual_seed(0)
    c, r, rc, rr = torch.randn(4, 6, dtype=torch.float64) * 5
    delta = 0.3 * ((c - rc) - (r - rr))
    torch.testing.assert_close(dpo_loss(c, r, rc, rr, beta=0.3), -F.logsigmoid(delta))
    smooth = -0.9 * F.logsigmoid(delta) - 0.1 * F.logsigmoid(-delta)
    torch.testing.assert_close(dpo_loss(c, r, rc, rr, beta=0.3, label_smoothing=0.1), smooth)


def test_options():
    with pytest.raises(ValueError, match="label_smoothing"):
        DPO(label_smoothing=0.5)
    with pytest.raises(ValueError, match="chosen and rejected"):
        DPO().loss(given(), pairs(1).__class__(None))
