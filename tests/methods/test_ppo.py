"""PPO against the plain model and plain loops: rewards with KL, GAE, both losses and their gradients."""

# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

# pyright: reportOptionalMemberAccess=false

import pytest
import torch

from pertoken.core.advantage import GAE
from pertoken.core.critic import KLControl
from pertoken.core.experience import Rollouts
from pertoken.core.policy_loss import PolicyLoss
from pertoken.train._policy_gradient import ValueLoss
from pertoken.train.ppo import PPO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step, states

COMPLETIONS = [[[5, 6, 7]], [[8, 9]], [[11, 12, 13, 14]]]
REWARDS = [[0.0, 0.0, 1.0], [0.5, -1.0], [0.0, 2.0, 0.0, -0.25]]
ONCE = Rollouts(generations=1, inner_epochs=1)


def by_hand(lm, reference, step, objective, whiten):
    """Loss (mean over tokens) with gradient, from the equations."""
    rows, coef = [], objective.kl.kl_coef
    for group, (ids,), reward in zip(step.groups, COMPLETIONS, REWARDS, strict=True):
        p, q = logps(lm, group.prompt_ids, ids), logps(reference, group.prompt_ids, ids).detach()
        v = states(lm, group.prompt_ids, ids) @ step.state.head.weight[0] + step.state.head.bias
        r = (torch.tensor(reward, dtype=torch.float64) - coef * (p - q)).detach()
        a, later = torch.zeros_like(r), 0.0
        for t in reversed(range(len(ids))):
            after = v[t + 1].detach() if t + 1 < len(ids) else 0.0
            later = float(r[t] + objective.gae.gamma * after - v[t].detach()) + objective.gae.lam * later
            a[t] = later
        rows.append((p, v, a, a + v.detach()))
    p, v, a, returns = (torch.cat([row[k] for row in rows]) for k in range(4))
    if whiten:
        a = (a - a.mean()) / a.var(correction=0).clamp(min=1e-8).sqrt()
    ratio = torch.exp(p - p.detach())
    policy = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    value = 0.5 * (v - returns).square()  # at the old values, clipping changes nothing
    return (policy + objective.value.vf_coef * value).mean(), a


@pytest.mark.parametrize("whiten", [True, False])
def test_first_update_by_hand(whiten):
    lm, reference = exact_lm(0), exact_lm(3)
    objective = PPO(rollouts=ONCE, gae=GAE(whitening="biased" if whiten else "none"), kl=KLControl(kl_coef=0.25))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm, models={"reference": reference})
    result = step.run([0, 1, 2], train=True)
    head = step.state.head.weight.grad.clone()
    found = gradient(lm) / result.count
    lm.model.zero_grad()
    step.state.zero_grad()
    wanted, _ = by_hand(lm, reference, step, objective, whiten)
    wanted.backward()
    assert result.count == 9 and result.loss / result.count == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head / result.count, step.state.head.weight.grad, rtol=1e-6, atol=1e-9)


def test_a_later_epoch_is_clipped_against_the_first():
    """The same rollouts again: ratios are against the log-probs of the rollouts, values against their values."""
    lm = exact_lm(0)
    objective = PPO(rollouts=Rollouts(generations=1, inner_epochs=2), policy_loss=PolicyLoss(clip=0.05))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm)
    first = step.run([0, 1, 2], train=True)
    assert first.metrics["clip_ratio/high_mean"][0] == first.metrics["clip_ratio/low_mean"][0] == 0
    with torch.no_grad():
        for p in lm.model.parameters():
            p.sub_(0.05 * p.grad)
    lm.model.zero_grad()
    second = step.run([0, 1, 2], train=True)
    assert second.metrics["policy/approxkl"][0] > 0
    assert second.metrics["clip_ratio/high_mean"][0] + second.metrics["clip_ratio/low_mean"][0] > 0
    assert "reward" in first.metrics and "reward" not in second.metrics


def test_limit_cases():
    lm = exact_lm(0)
    none = [[0.0] * len(r) for r in REWARDS]
    free = PPO(rollouts=ONCE, kl=KLControl(kl_coef=0.0), value=ValueLoss(vf_coef=0.0), gae=GAE(whitening="none"))
    step = make_step(free, COMPLETIONS, none, lm=lm)
    torch.nn.init.zeros_(step.state.head.weight)
    step.run([0, 1, 2], train=True)
    assert not gradient(lm).any()  # no reward, values of 0: nothing to learn


def test_loss_without_rollouts_says_so():
    from pertoken.core.protocols import Batch
    from pertoken.core.stats import Stats

    stats = {"policy": Stats(*(torch.ones(1, 2, dtype=torch.bool),) * 3)}
    with pytest.raises(ValueError, match="no column 'advantages'"):
        PPO().loss(stats, Batch(None), None)
