"""RLOO against the plain model: REINFORCE with the mean of the others as baseline, KL in the rewards."""

import numpy as np
import pytest
import torch

from pertoken.core.critic import KLControl
from pertoken.core.experience import Rollouts
from pertoken.train.rloo import RLOO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step

COMPLETIONS = [[[5, 6, 7], [8, 9]], [[11, 12], [13, 14, 15, 16]]]
REWARDS = [[0.0, 0.0, 1.0], [0.5, -1.0], [1.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
ROLLOUTS = Rollouts(generations=2)


@pytest.mark.parametrize("coef", [0.0, 0.25])
def test_gradient_by_hand(coef):
    """sum_i -A_i sum_t grad log pi(y_t) / N."""
    lm, reference = exact_lm(0), exact_lm(3)
    objective = RLOO(rollouts=ROLLOUTS, kl=KLControl(kl_coef=coef))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm, models={"reference": reference})
    result = step.run([0, 1], train=True)
    found = gradient(lm) / result.count
    lm.model.zero_grad()
    flat = [(g, ids) for g, some in zip(step.groups, COMPLETIONS, strict=True) for ids in some]
    p = [logps(lm, g.prompt_ids, ids) for g, ids in flat]
    q = [logps(reference, g.prompt_ids, ids).detach() for g, ids in flat]
    totals = [sum(r) - coef * float((a - b).sum().detach()) for r, a, b in zip(REWARDS, p, q, strict=True)]
    baselines = [totals[1], totals[0], totals[3], totals[2]]
    loss = sum(-(r - b) * a.sum() for r, b, a in zip(totals, baselines, p, strict=True)) / 4
    loss.backward()  # type: ignore[union-attr]
    assert result.count == 4
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-10)


def test_reinforce_plus_plus_whitens_rewards_to_go():
    lm = exact_lm(0)
    objective = RLOO(rollouts=ROLLOUTS, advantage="reinforce++", kl=KLControl(kl_coef=0.0))
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm)
    result = step.run([0, 1], train=True)
    found = gradient(lm) / result.count
    lm.model.zero_grad()
    to_go = np.concatenate([np.cumsum(r[::-1])[::-1] for r in REWARDS])
    a = torch.from_numpy((to_go - to_go.mean()) / to_go.std())
    flat = [(g, ids) for g, some in zip(step.groups, COMPLETIONS, strict=True) for ids in some]
    p = torch.cat([logps(lm, g.prompt_ids, ids) for g, ids in flat])
    (-(a * p).sum() / 4).backward()
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-10)


def test_equal_rewards_have_no_gradient():
    lm = exact_lm(0)
    same = [[1.0, 0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [2.0, 0.0, 0.0, 0.0]]
    make_step(RLOO(rollouts=ROLLOUTS), COMPLETIONS, same, lm=lm).run([0, 1], train=True)
    assert not gradient(lm).any()
