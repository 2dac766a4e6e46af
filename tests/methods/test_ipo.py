"""IPO: by hand, the point where it stops, and TRL's formula written out."""

import pytest
import torch

from pertoken.train.ipo import IPO, ipo_loss
from tests.methods.by_hand import gradient, mean, pairs, stats


def given(h=3.0):
    """One pair: log-ratios h - 1 (two tokens) and -1 (one token)."""
    return {"policy": stats([h - 2.0, -2.0], [-4.0]), "reference": stats([-1.0, -2.0], [-3.0])}


def test_by_hand():
    loss = IPO(tau=0.25).loss(given(), pairs())  # h = 3, target 1 / (2 * 0.25) = 2
    assert mean(loss) == pytest.approx(1.0)
    assert mean(loss, "rewards/chosen") == pytest.approx(0.5) and mean(loss, "rewards/rejected") == pytest.approx(-0.25)
    averaged = IPO(tau=0.25, length_average=True).loss(given(), pairs())  # 2 / 2 - (-1) / 1 = 2
    assert mean(averaged) == pytest.approx(0.0, abs=1e-15)
    assert mean(averaged, "rewards/chosen") == pytest.approx(0.5)  # rewards stay sums, as in TRL


def test_gradient_vanishes_at_the_target_and_turns_round_beyond():
    at, before, beyond = ([*gradient(IPO(tau=0.25).loss(s, pairs()), s["policy"])[:, 0]] for s in map(given, (2, 1, 4)))
    assert at == [0, 0]
    assert before == [-2, 2] and beyond == [4, -4]  # 2 (h - 2), of opposite signs on the two responses


def test_policy_equal_to_reference():
    s = given()
    loss = IPO(tau=0.1).loss({"policy": s["policy"], "reference": s["policy"]}, pairs())
    assert mean(loss) == pytest.approx(25.0)  # (1 / (2 tau))^2


@pytest.mark.parametrize("h", [1e4, -1e4])
def test_saturated_log_ratios_are_finite(h):
    s = given(h)
    loss = IPO().loss(s, pairs())
    assert mean(loss) == pytest.approx((h - 5) ** 2)
    assert torch.isfinite(gradient(loss, s["policy"])).all()


def test_empty_completions():
    for length_average in (False, True):
        s = {"policy": stats([], [-1.0]), "reference": stats([], [-3.0])}
        assert mean(IPO(length_average=length_average).loss(s, pairs())) == pytest.approx((-2 - 5) ** 2)


def test_equals_trls_formula():
    """TRL 1.16, loss "ipo": (avg chosen log-ratio - avg rejected log-ratio - 1 / (2 beta))^2."""
    torch.manual_seed(0)
    lengths = (3, 1, 2, 4)
    policy, reference = ([(torch.randn(n, dtype=torch.float64) * 4).tolist() for n in lengths] for _ in range(2))
    loss = IPO(tau=0.2, length_average=True).loss({"policy": stats(*policy), "reference": stats(*reference)}, pairs(2))
    score = [(sum(p) - sum(r)) / len(p) for p, r in zip(policy, reference)]
    wanted = [(score[2 * i] - score[2 * i + 1] - 1 / 0.4) ** 2 for i in range(2)]
    assert mean(loss) == pytest.approx(sum(wanted) / 2, rel=1e-13)
    torch.testing.assert_close(ipo_loss(torch.tensor([score[0] - score[1]]), 0.2).item(), wanted[0])


def test_options():
    with pytest.raises(ValueError, match="tau="):
        IPO(tau=0)
