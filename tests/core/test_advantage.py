"""Advantages against plain loops and by hand; tokens that the policy did not emit; whitening over processes is in
test_distributed."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest
import torch

from pertoken.core.advantage import (
    GAE,
    GroupNormalised,
    LeaveOneOut,
    ReinforcePlusPlus,
    gae,
    group_normalised,
    leave_one_out,
    rewards_to_go,
    whiten,
    zero_variance,
)


def tensors(seed=0, n=5, t=7):
    rng = np.random.default_rng(seed)
    lengths = [t, 1, 4, 0, t - 1][:n]
    mask = torch.tensor([[k < length for k in range(t)] for length in lengths])
    rewards, values = (torch.from_numpy(rng.normal(size=(n, t))) for _ in range(2))
    return rewards, values, mask


def by_loop(rewards, values, gamma, lam):
    """The definition, a sum over what is to come, of one sequence without padding."""
    n = len(rewards)
    nxt = [*values, 0.0][1:]
    delta = [r + gamma * v1 - v for r, v, v1 in zip(rewards, values, nxt, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    rewards, values, mask = tensors()
    rewards = torch.where(mask, rewards, torch.nan)
    values = torch.where(mask, values, torch.nan)
    advantage, returns = gae(rewards, values, mask, gamma, lam)[:2]
    assert returns is not None
    for row in range(len(mask)):
        k = int(mask[row].sum())
        wanted = by_loop(rewards[row, :k].tolist(), values[row, :k].tolist(), gamma, lam)
        assert advantage[row, :k].tolist() == pytest.approx(wanted)
        assert returns[row, :k].tolist() == pytest.approx([a + v for a, v in zip(wanted, values[row, :k].tolist())])
        assert not advantage[row, k:].any() and not returns[row, k:].any()


def test_tokens_that_were_not_emitted_are_passed_over():
    rewards, values, _ = tensors(1, n=1, t=7)
    mask = torch.tensor([[True, False, True, True, False, False, True]])
    found = gae(rewards, values, mask, 0.9, 0.8)
    packed = gae(rewards[mask][None], values[mask][None], torch.ones(1, 4, dtype=torch.bool), 0.9, 0.8)
    torch.testing.assert_close(found.advantage_NT[mask], packed.advantage_NT[0])
    assert not found.advantage_NT[~mask].any()


def test_lam_1_gamma_1_returns_are_rewards_to_go():
    rewards, values, mask = tensors(2)
    rewards = torch.where(mask, rewards, 0.0)
    wanted = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0).return_NT, wanted)
    torch.testing.assert_close(rewards_to_go(rewards, mask), wanted)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("floor", [True, False])
def test_whitening(ddof, floor):
    values, _, mask = tensors(3)
    found = whiten(torch.where(mask, values, torch.nan), mask, ddof=ddof, floor=floor)
    x = values[mask].numpy()
    np.testing.assert_allclose(found[mask].numpy(), (x - x.mean()) / x.std(ddof=ddof), rtol=1e-6)
    assert not found[~mask].any()


def test_whitening_without_variance_is_zero():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for floor in (True, False):
        found = whiten(torch.full((2, 3), 0.0), mask, floor=floor)
        assert found.abs().max() == 0
    nothing = whiten(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.isfinite(nothing).all()


GROUPS = torch.tensor([7, 3, 7, 7, 3, 9, 9])
SCORES = torch.tensor([1.0, 2.0, 4.0, 4.0, 2.0, 0.5, -0.5], dtype=torch.float64)


@pytest.mark.parametrize("std, ddof, eps", [(True, 1, 1e-4), (True, 0, 0.0), (True, 1, 1e-6), (False, 1, 1.0)])
def test_group_normalised_by_hand(std, ddof, eps):
    found = group_normalised(SCORES, GROUPS, std=std, ddof=ddof, eps=eps)
    wanted = np.zeros(7)
    for g in (7, 9):  # group 3 is all equal
        where = (g == GROUPS).numpy()
        x = SCORES.numpy()[where]
        wanted[where] = (x - x.mean()) / (x.std(ddof=ddof) + eps if std else 1.0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_equal_scores_have_no_advantage_whatever_the_rounding():
    parts = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    scores = torch.stack([parts.sum(), parts.flip(0).sum(), parts[[1, 2, 0]].sum()])
    assert scores[0] != scores[1] or scores[0] != scores[2]
    same = torch.zeros(3, dtype=torch.long)
    assert not group_normalised(scores, same, eps=0.0, ddof=0).any()
    assert zero_variance(scores, same).all()
    alone = group_normalised(torch.tensor([3.0]), torch.tensor([0]))
    assert alone.tolist() == [0.0]


def test_leave_one_out_by_hand():
    found = leave_one_out(SCORES, GROUPS)
    assert found.tolist() == pytest.approx([1 - 4, 0, 4 - 2.5, 4 - 2.5, 0, 1.0, -1.0])
    assert leave_one_out(torch.tensor([5.0]), torch.tensor([2])).tolist() == [0.0]


def test_outcome_supervision_sums_token_rewards_and_spreads_the_result():
    rewards, _, mask = tensors(4, n=4)
    groups = torch.tensor([0, 0, 1, 1])
    found = GroupNormalised(std=False).compute(rewards, None, groups, mask).advantage_NT
    sums = torch.where(mask, rewards, 0.0).sum(1)
    for n, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        wanted = (sums[n] - sums[other]) / 2
        torch.testing.assert_close(found[n], torch.where(mask[n], wanted, 0.0))


def test_process_supervision_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 3.0], [2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = GroupNormalised(supervision="process", ddof=0, eps=0.0).compute(rewards, None, torch.tensor([0, 0]), mask)
    std = np.std([1.0, 3.0, 2.0])
    a, b, c = ((x - 2.0) / std for x in (1.0, 3.0, 2.0))
    np.testing.assert_allclose(found.advantage_NT, [[a + b, a + b, b, b], [c, 0.0, 0.0, 0.0]], atol=1e-12)


def test_gae_without_a_critic_has_no_returns_and_options_whiten():
    rewards, values, mask = tensors(5)
    raw = GAE(whitening="none").compute(rewards, values, torch.arange(5), mask)
    plain = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(raw.advantage_NT, plain.advantage_NT)
    for whitening, ddof in (("biased", 0), ("unbiased", 1)):
        found = GAE(whitening=whitening).compute(rewards, values, torch.arange(5), mask)
        assert found.advantage_NT[mask].mean().abs() < 1e-12
        assert float(found.advantage_NT[mask].var(correction=ddof)) == pytest.approx(1.0, rel=1e-6)
        torch.testing.assert_close(found.return_NT, plain.return_NT)
    assert GAE().compute(rewards, None, torch.arange(5), mask).return_NT is None


def test_reinforce_plus_plus():
    rewards, _, mask = tensors(6, n=4)
    groups = torch.tensor([0, 0, 1, 1])
    found = ReinforcePlusPlus().compute(rewards, None, groups, mask).advantage_NT
    to_go = rewards_to_go(rewards, mask)[mask]
    torch.testing.assert_close(found[mask], (to_go - to_go.mean()) / to_go.std(correction=0))
    based = ReinforcePlusPlus(baseline=True).compute(rewards, None, groups, mask).advantage_NT
    assert all(len(set(row[m].tolist())) <= 1 for row, m in zip(based, mask, strict=True))
    assert LeaveOneOut().compute(rewards, None, groups, mask).advantage_NT.shape == rewards.shape


@pytest.mark.parametrize(
    "make", [lambda: GAE(gamma=1.5), lambda: GAE(whitening="some"), lambda: GroupNormalised(ddof=2)]
)
def test_bad_options(make):
    with pytest.raises(ValueError):
        make()
