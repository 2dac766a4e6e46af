"""The policy loss against plain formulas a token at a time, and its gradients."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportCallIssue=false

import math

import numpy as np
import pytest
import torch

from pertoken.core.policy_loss import PolicyLoss, aggregated, kl_losses, policy_losses, value_losses

MASK = torch.tensor([[True, True, True, False], [True, False, True, True], [False] * 4])


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    logp, old, advantage, sampled = (torch.from_numpy(rng.normal(size=(3, 4))) for _ in range(4))
    logp.requires_grad_()
    return logp, old, advantage, sampled


def by_hand(logp, old, advantage, o, sampled=None, mean=None):
    """One token's loss with plain numbers."""
    d = logp - old if mean is None else mean
    rho, high = math.exp(d), o.clip if o.clip_high is None else o.clip_high
    held = min(max(rho, 1 - o.clip), 1 + high)
    if o.ratio == "cispo":
        out = -held * advantage * logp
    else:
        out = -min(rho * advantage, held * advantage)
        if o.dual_clip is not None and advantage < 0:
            out = min(out, -o.dual_clip * advantage)
    if o.importance_cap is not None and sampled is not None:
        out *= min(math.exp(old - sampled), o.importance_cap)
    return out


@pytest.mark.parametrize(
    "o",
    [
        PolicyLoss(),
        PolicyLoss(clip_high=0.28),
        PolicyLoss(dual_clip=1.5),
        PolicyLoss(ratio="cispo", clip_high=0.5),
        PolicyLoss(ratio="sequence", clip=0.01),
        PolicyLoss(importance_cap=1.2),
    ],
    ids=str,
)
def test_losses_by_hand(o):
    logp, old, advantage, sampled = tensors()
    dirty = torch.where(MASK, logp, torch.nan)
    found, metrics = policy_losses(dirty, old, advantage, MASK, o, sampled)
    mean = (logp - old).detach()
    for n in range(3):
        inside = [float(mean[n, t]) for t in range(4) if MASK[n, t]]
        for t in range(4):
            at = sum(inside) / len(inside) if o.ratio == "sequence" and inside else None
            args = (float(x[n, t].detach()) for x in (logp, old, advantage))
            wanted = by_hand(*args, o, float(sampled[n, t]), at) if MASK[n, t] else 0.0
            assert float(found[n, t].detach()) == pytest.approx(wanted), (n, t)
    (grad,) = torch.autograd.grad(found.sum(), logp)
    assert torch.isfinite(grad).all() and not grad[~MASK].any()
    assert all(math.isfinite(float(a)) for a, _ in metrics.values())


def test_importance_sampling_is_not_left_out_in_silence():
    logp, old, advantage, _ = tensors()
    with pytest.raises(ValueError, match="recorded none; record sampled_logps"):
        policy_losses(logp, old, advantage, MASK, PolicyLoss(importance_cap=2.0))


def test_gradient_at_the_old_policy_is_reinforce():
    """rho = 1: dL/dlogp_t = -A_t, for every kind of ratio (GSPO's is 1 / |y| of it on each token)."""
    logp, _, advantage, _ = tensors()
    for kind in ("token", "cispo"):
        losses, _ = policy_losses(logp, logp.detach(), advantage, MASK, PolicyLoss(ratio=kind))
        (grad,) = torch.autograd.grad(losses.sum(), logp)
        torch.testing.assert_close(grad, torch.where(MASK, -advantage, 0.0))
    losses, _ = policy_losses(logp, logp.detach(), advantage, MASK, PolicyLoss(ratio="sequence"))
    (grad,) = torch.autograd.grad(losses.sum(), logp)
    torch.testing.assert_close(grad, torch.where(MASK, -advantage, 0.0))


def test_sequence_ratio_is_gspos_in_value_and_gradient():
    """s = (pi / pi_old)^(1 / |y|); with one advantage a sequence, the mean over tokens has the gradient of s A."""
    logp, old, _, _ = tensors(1)
    advantage = torch.tensor([[0.7] * 4, [-0.3] * 4, [1.0] * 4], dtype=torch.float64)
    losses, _ = policy_losses(logp, old, advantage, MASK, PolicyLoss(ratio="sequence", clip=10.0))
    total, _ = aggregated(losses, MASK, "sequence")
    (found,) = torch.autograd.grad(total, logp)
    again = logp.detach().clone().requires_grad_()
    lengths = MASK.sum(1).clamp(min=1)
    s = torch.exp(torch.where(MASK, again - old, 0.0).sum(1) / lengths)
    wanted = -(s * advantage[:, 0])[:2].sum()
    assert float(total) == pytest.approx(float(wanted))
    (grad,) = torch.autograd.grad(wanted, again)
    torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("ratio", ["sequence", "macro"])
def test_ratios_of_several_tokens_lose_nothing_to_large_log_probs(ratio):
    """float32: log-probs of 30 are known to 2e-6, their small differences far better; GSPO clips at 3e-4."""
    rng = np.random.default_rng(0)
    old = torch.from_numpy(rng.integers(-30, -20, size=(1, 64))).float()
    new = (old + torch.from_numpy(rng.integers(1, 99, size=(1, 64))) * 2.0**-19).requires_grad_()
    mask, macros = torch.ones(1, 64, dtype=torch.bool), torch.arange(64)[None] // 2
    a = torch.ones(1, 64)
    losses, _ = policy_losses(new, old, a, mask, PolicyLoss(ratio=ratio, clip=1.0), macro_NT=macros)
    d = (new.detach() - old).double()
    wanted = d.mean().expand(1, 64) if ratio == "sequence" else d.reshape(32, 2).sum(1).repeat_interleave(2)[None]
    np.testing.assert_allclose(-losses.detach().double(), wanted.exp(), rtol=1.5e-7)
    (grad,) = torch.autograd.grad(losses.sum(), new)
    torch.testing.assert_close(grad, losses.detach())


def test_zero_advantages_have_no_gradient():
    logp, old, _, _ = tensors()
    losses, _ = policy_losses(logp, old, torch.zeros(3, 4), MASK, PolicyLoss(dual_clip=3.0))
    assert not torch.autograd.grad(losses.sum(), logp)[0].any()


def test_clipped_tokens_have_no_gradient_and_are_counted():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logp = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    losses, metrics = policy_losses(logp, old, advantage, mask, PolicyLoss())
    (grad,) = torch.autograd.grad(losses.sum(), logp)
    assert (grad != 0).tolist() == [[False, False, True, True]]
    assert {k: float(v[0]) for k, v in metrics.items() if k.startswith("clip")} == {
        "clip_ratio/low_mean": 1.0,
        "clip_ratio/high_mean": 1.0,
    }


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([[-1e4, 0.0, -1e4]], dtype=torch.float32, requires_grad=True)
    old = torch.tensor([[0.0, -1e4, -1e4]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for kind in ("token", "sequence", "cispo"):
        losses, _ = policy_losses(logp, old, torch.tensor([[1.0, -1.0, 1.0]]), mask, PolicyLoss(ratio=kind))
        (grad,) = torch.autograd.grad(losses.sum(), logp)
        assert torch.isfinite(losses).all() and torch.isfinite(grad).all()
    assert torch.isfinite(kl_losses(logp, old, mask)).all()


def test_k3_is_its_formula():
    logp, old, _, _ = tensors()
    found = kl_losses(logp, old, MASK)
    d = (old - logp).detach()
    torch.testing.assert_close(found.detach(), torch.where(MASK, torch.exp(d) - d - 1, 0.0))
    assert not kl_losses(old, old, MASK).any()


def test_value_losses_by_hand():
    value, old, returns, _ = tensors(2)
    found = value_losses(value, old, returns, MASK, 0.2).detach()
    for n, t in MASK.nonzero().tolist():
        v, o, r = (float(x[n, t].detach()) for x in (value, old, returns))
        held = o + min(max(v - o, -0.2), 0.2)
        assert float(found[n, t]) == pytest.approx(0.5 * max((v - r) ** 2, (held - r) ** 2))
    assert not found[~MASK].any()
    plain = value_losses(value, old, returns, MASK, None).detach()
    torch.testing.assert_close(plain, torch.where(MASK, 0.5 * (value - returns) ** 2, 0.0).detach())


@pytest.mark.parametrize(
    "how, wanted", [("token", 21 / 6), ("sequence", (2 + 5) / 2), ("constant", 21 / 10 / 2), ("sum", 21 / 2)]
)
def test_aggregates(how, wanted):
    losses = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 5.0, 6.0], [9.0] * 4])
    total, count = aggregated(losses, MASK, how, longest=10)
    assert float(total / count) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "bad", [{"clip": -0.1}, {"dual_clip": 1.0}, {"ratio": "x"}, {"aggregate": "x"}, {"importance_cap": 0.0}]
)
def test_bad_options(bad):
    with pytest.raises(ValueError):
        PolicyLoss(**bad)
