"""KTO: by hand, the reference point, its shape, and TRL's formula written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.core.data import encode, load_examples
from pertoken.core.step import with_mismatched
from pertoken.train.kto import KTO, kl_estimate, kto_loss
from tests import tiny
from tests.methods.by_hand import gradient, labels, mean, pairs, stats


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def given(*logratios):
    """Completions of two tokens with these log-ratios; the reference is -1 a token."""
    return {
        "policy": stats(*([x - 1.0, -1.0] for x in logratios)),
        "reference": stats(*([-1.0, -1.0] for _ in logratios)),
    }


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def test_by_hand():
    """Log-ratios 3 (desirable) and -1 (not); mismatched ones 4 and -2, so z0 = 1."""
    s, batch = given(3, -1, 4, -2), labels(True, False, True, False, mismatched=[False, False, True, True])
    loss = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0).loss(s, batch)
    wanted = 2 - 2 * sigmoid(0.5 * (3 - 1)) + 3 - 3 * sigmoid(0.5 * (1 + 1))
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-14) and loss.count == 2
    shown = {"rewards/chosen": 1.5, "rewards/rejected": -0.5, "rewards/margins": 2, "kl": 1}
    shown |= {"logps/chosen": 1, "logps/rejected": -3}
    assert {name: mean(loss, name) for name in loss.metrics} == pytest.approx(shown)


def test_gradient():
    """lambda beta sigmoid(x) sigmoid(-x), down for desirable and up for undesirable; none through z0."""
    s, batch = given(3, -1, 4, -2), labels(True, False, True, False, mismatched=[False, False, True, True])
    found = gradient(KTO(beta=0.5).loss(s, batch), s["policy"])[:, 0]
    weight = 0.5 * sigmoid(1) * sigmoid(-1)
    assert found.tolist() == pytest.approx([-weight, weight, 0, 0])


def test_policy_equal_to_reference_is_half_the_weights():
    s, batch = (
        given(0, 0, 0, 0, 0),
        labels(True, True, False, False, False, mismatched=[False, False, False, True, True]),
    )
    loss = KTO(desirable_weight=1.5, undesirable_weight=0.5).loss(s, batch)
    assert mean(loss) == pytest.approx((1.5 + 1.5 + 0.5) / 3 * (1 - 0.5)) and mean(loss, "kl") == 0


def test_reference_point():
    assert kl_estimate(f64(4, -1)).item() == 1.5
    assert kl_estimate(f64(-4, 1)).item() == 0  # the mean is clamped, not its parts
    assert not kl_estimate(f64(1).requires_grad_()).requires_grad
    s = given(3, -1)
    assert mean(KTO(reference_point="batch").loss(s, labels(True, False)), "kl") == 1
    zero = KTO(reference_point="zero")
    assert zero.loss(s, labels(True, False)).sum.item() == pytest.approx(sigmoid(-0.3) + sigmoid(-0.1))
    assert zero.mismatched is False and zero.batch_coupled is False
    assert KTO().mismatched is True and KTO().batch_coupled is True


def test_monotone():
    r = torch.linspace(-50, 50, 41, dtype=torch.float64)
    desirable, undesirable = (kto_loss(r, torch.full((41,), label), 3.0) for label in (True, False))
    assert (desirable.diff() < 0).all() and (undesirable.diff() > 0).all()
    z = [kto_loss(f64(1.0, 1.0), torch.tensor([True, False]), z0) for z0 in (0.0, 2.0)]
    assert z[1][0] > z[0][0] and z[1][1] < z[0][1]


def test_saturation_is_bounded_and_finite():
    r, label = f64(1e4, -1e4, 1e4, -1e4).requires_grad_(), torch.tensor([True, True, False, False])
    loss = kto_loss(r, label, 0.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.tolist() == [0, 2, 3, 0]
    (found,) = torch.autograd.grad(loss.sum(), r)
    assert found.tolist() == [0, 0, 0, 0]


def test_one_label_only_and_empty_completions():
    loss = KTO(reference_point="zero").loss(
        {"policy": stats([], [-1.0]), "reference": stats([], [-1.0])}, labels(True, True)
    )
    assert mean(loss) == 0.5 and loss.metrics["rewards/rejected"] == (0, 0)
    s, batch = given(1, 1), labels(False, False, mismatched=[False, True])
    assert "rewards/margins" not in KTO().loss(s, batch).metrics


def test_equals_trls_formula():
    """TRL 1.16: 1 - sigmoid(beta (r - kl)) and 1 - sigmoid(beta (kl - r)), kl = max(0, mean of others)."""
    torch.manual_seed(0)
    r, others = torch.randn(2, 6, dtype=torch.float64) * 8
    label = torch.tensor([True, False, True, True, False, False])
    kl = others.mean().clamp(min=0)
    chosen, rejected = 1.2 * (1 - F.sigmoid(0.3 * (r - kl))), 0.7 * (1 - F.sigmoid(0.3 * (kl - r)))
    ours = kto_loss(r, label, kl_estimate(others), beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    torch.testing.assert_close(ours, torch.where(label, chosen, rejected), rtol=1e-12, atol=0)


def test_the_loop_pairs_each_prompt_with_the_response_to_another_one():
    """Also where a pair became two rows of one prompt, whose second response is no unrelated one."""
    lm = tiny.lm()
    rows = [{"prompt": f"film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    groups, _ = encode(load_examples(rows, kind="unpaired")[0], lm)
    for group in with_mismatched(groups):
        own, other = group.traces
        assert own.prompt_ids == other.prompt_ids == group.prompt_ids
        assert own.text[-1] == group.example.prompt[-2] != other.text[-1]


def test_what_is_missing_is_said():
    for batch in (labels(True, False), labels(True, False, mismatched=[False, False])):
        with pytest.raises(ValueError, match=r"mismatched_N.*reference_point='batch'"):
            KTO().loss(given(1, 2), batch)
    with pytest.raises(ValueError, match="unpaired data"):
        KTO().loss(given(1, 2), pairs())
    with pytest.raises(ValueError, match="reference_point="):
        KTO(reference_point="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta="):
        KTO(beta=0)
    with pytest.raises(ValueError, match="negative"):
        KTO(undesirable_weight=-1)
