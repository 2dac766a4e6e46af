"""GRPO against the plain model: group advantages, the k3 penalty, Dr. GRPO, DAPO, GSPO and CISPO as options."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GroupNormalised
from pertoken.core.experience import Rollouts
from pertoken.core.policy_loss import PolicyLoss
from pertoken.core.rollout import Sampling
from pertoken.train.grpo import GRPO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step

COMPLETIONS = [[[5, 6, 7], [8, 9], [4]], [[11, 12], [13, 14, 15, 16], [17, 18]]]
REWARDS = [[0.0, 0.0, 1.0], [0.5, -1.0], [3.0], [1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0]]
ROLLOUTS = Rollouts(generations=3, sampling=Sampling(max_new_tokens=8))


def advantages(std=True):
    sums = np.array([sum(r) for r in REWARDS]).reshape(2, 3)
    centred = sums - sums.mean(1, keepdims=True)
    return (centred / (sums.std(1, ddof=1, keepdims=True) + 1e-4) if std else centred).ravel()


def plain(lm, step, per_token):
    """Sum over completions of `per_token(log-probs, reference's, advantage)`, with the token count."""
    total, tokens, means = 0.0, 0, 0.0
    flat = [(g, ids) for g, some in zip(step.groups, COMPLETIONS, strict=True) for ids in some]
    for (group, ids), a in zip(flat, advantages(step.objective.advantage.std), strict=True):
        p = logps(lm, group.prompt_ids, ids)
        q = logps(step.models["reference"], group.prompt_ids, ids).detach() if "reference" in step.models else None
        losses = per_token(p, q, float(a))
        total, tokens, means = total + losses.sum(), tokens + len(ids), means + losses.mean()
    return total, tokens, means


CASES = {
    "grpo": (PolicyLoss(), True, lambda s, t, m: s / t),
    "sequence means": (PolicyLoss(aggregate="sequence"), True, lambda s, t, m: m / 6),
    "dr. grpo": (PolicyLoss(aggregate="constant"), False, lambda s, t, m: s / 8 / 6),
    "cispo": (PolicyLoss(ratio="cispo"), True, lambda s, t, m: s / t),
    "gspo": (PolicyLoss(ratio="sequence", aggregate="sequence"), True, lambda s, t, m: m / 6),
}


@pytest.mark.parametrize("name", CASES)
def test_on_policy_gradient_by_hand(name):
    """At pi = pi_old all of them have the gradient of -A log pi, and differ in what the mean is over."""
    options, std, mean = CASES[name]
    lm = exact_lm(0)
    objective = GRPO(rollouts=ROLLOUTS, policy_loss=options, advantage=GroupNormalised(std=std))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm)
    result = step.run([0, 1], train=True)
    found = gradient(lm) / result.count
    lm.model.zero_grad()
    mean(*plain(lm, step, lambda p, q, a: -a * p)).backward()
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-10)
    assert found.abs().max() > 0


def test_the_k3_penalty_by_hand():
    lm, reference = exact_lm(0), exact_lm(3)
    objective = GRPO(rollouts=ROLLOUTS, policy_loss=PolicyLoss(kl_loss=0.5))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm, models={"reference": reference})
    result = step.run([0, 1], train=True)
    found = gradient(lm) / result.count
    lm.model.zero_grad()

    def per_token(p, q, a):
        return -a * torch.exp(p - p.detach()) + 0.5 * (torch.exp(q - p) - (q - p) - 1)

    total, tokens, _ = plain(lm, step, per_token)
    (total / tokens).backward()
    assert result.loss / result.count == pytest.approx(float(total.detach()) / tokens)
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-10)


def test_a_group_with_equal_rewards_learns_nothing():
    lm = exact_lm(0)
    equal = [[0.0, 0.0, 2.0], [1.0, 1.0], [2.0], *REWARDS[3:]]
    step = make_step(GRPO(rollouts=ROLLOUTS), COMPLETIONS, equal, lm=lm)
    result = step.run([0, 1], train=True)
    assert result.metrics["frac_reward_zero_std"] == (2.0, 2.0)  # the second group's sums are equal, too
    assert not gradient(lm).any()


def test_negated_rewards_turn_the_gradient_round():
    found = []
    for sign in (1, -1):
        lm = exact_lm(0)
        make_step(GRPO(rollouts=ROLLOUTS), COMPLETIONS, [[sign * x for x in r] for r in REWARDS], lm=lm).run(
            [0, 1], train=True
        )
        found.append(gradient(lm))
    torch.testing.assert_close(found[0], -found[1])


def test_masked_truncated_completions_count_in_the_mean_only():
    lm = exact_lm(0)
    objective = GRPO(rollouts=Rollouts(generations=3, mask_truncated=True))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm, ended=False)
    result = step.run([0, 1], train=True)
    assert result.count == 0 and not gradient(lm).any()
