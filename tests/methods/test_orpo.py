"""ORPO: by hand, its odds where a response is certain, and TRL's formula written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.train.orpo import ORPO, log_odds, orpo_loss
from tests.methods.by_hand import gradient, mean, pairs, stats

HALF, QUARTER = math.log(0.5), math.log(0.25)


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def test_by_hand():
    """P is 1/2 and 1/4, so the odds are 1 and 1/3, the odds ratio 3, and sigmoid(log 3) = 3/4."""
    s = {"policy": stats([HALF, HALF], [QUARTER])}
    loss = ORPO(lam=0.2).loss(s, pairs())
    assert mean(loss) == pytest.approx(math.log(2) + 0.2 * math.log(4 / 3), rel=1e-14)
    assert mean(loss, "nll_loss") == pytest.approx(math.log(2))
    assert mean(loss, "log_odds_chosen") == pytest.approx(math.log(3))
    assert mean(loss, "log_odds_ratio") == pytest.approx(math.log(3 / 4))
    assert mean(loss, "rewards/chosen") == pytest.approx(0.2 * HALF) and mean(loss, "logps/chosen") == 2 * HALF


def test_gradient_is_that_of_the_paper():
    """d L_OR / d log P(y_w) = -sigmoid(-log odds ratio) / (1 - P(y_w)), and likewise for y_l."""
    s = {"policy": stats([HALF, HALF], [QUARTER])}
    wanted = torch.tensor([[-(1 + 0.2 * 0.25 / 0.5) / 2] * 2, [0.2 * 0.25 / 0.75, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient(ORPO(lam=0.2).loss(s, pairs()), s["policy"]), wanted)


def test_log_odds_are_stable_where_p_is_near_1_and_0():
    p = f64(1 - 1e-12, 1 - 1e-6, 0.5, 1e-6, 1e-300)
    exact = p.logit()  # log p - log1p(-p)
    torch.testing.assert_close(log_odds(p.log()), exact, rtol=1e-4, atol=0)
    tiny = f64(-1e-14, -1e-9, -1e-3)  # log p itself is exact here, and log (1 - p) = log(-log p) - log p / 2 ...
    torch.testing.assert_close(log_odds(tiny)[:2], -(-tiny[:2]).log(), rtol=1e-9, atol=0)
    assert log_odds(f64(-1e4)).item() == -1e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_impossible_responses_are_finite(dtype):
    for chosen, rejected in ((0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (-1e-30, -1e-30)):
        values = torch.tensor([[chosen], [rejected]], dtype=dtype, requires_grad=True)
        loss = orpo_loss(values[0], values[1]).sum()
        (found,) = torch.autograd.grad(loss, values)
        assert torch.isfinite(loss) and torch.isfinite(found).all()
    odds = log_odds(torch.tensor([-1e4, -1.0, -1e-3, -1e-6, 0.0], dtype=dtype))
    assert (odds.diff() > 0).all()  # monotone up to certainty


def test_limits():
    alike = {"policy": stats([-1.0, -3.0], [-2.0])}
    assert mean(ORPO(lam=1).loss(alike, pairs())) == pytest.approx(2 + math.log(2))
    assert mean(ORPO(lam=0).loss(alike, pairs())) == 2  # SFT by sequence means


def test_empty_completions():
    for rows in (([], [-1.0]), ([-1.0], []), ([], [])):
        s = {"policy": stats(*rows)}
        loss = ORPO().loss(s, pairs())
        assert math.isfinite(mean(loss)) and torch.isfinite(gradient(loss, s["policy"])).all()


def test_equals_trls_formula():
    """TRL 1.16's odds_ratio_loss, whose loss is nll - beta * logsigmoid(log odds)."""
    torch.manual_seed(0)
    c, r = -torch.rand(2, 6, dtype=torch.float64) * 5

    def log1mexp(x):
        return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))

    odds = (c - r) - (log1mexp(c) - log1mexp(r))
    torch.testing.assert_close(orpo_loss(c, r, lam=0.3), -c - 0.3 * F.logsigmoid(odds), rtol=1e-13, atol=0)


def test_options():
    with pytest.raises(ValueError, match="lam="):
        ORPO(lam=-1)
