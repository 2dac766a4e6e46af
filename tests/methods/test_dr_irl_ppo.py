"""PPO-S: alpha multiplies the whitened advantages and leaves the critic's targets; alpha of 1 is PPO to the bit."""

# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

import math

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GAE
from pertoken.core.experience import Rollouts
from pertoken.train.dr_irl import Scaling
from pertoken.train.dr_irl_ppo import DRIRLPPO, CriticOptions
from pertoken.train.ppo import PPO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient
from tests.methods.test_dr_irl import encode, rolled

THREE = Rollouts(generations=3)


def apart(texts):
    """The second demonstration is nearer to a right angle than to whatever is said."""
    return np.array([[0.6, 0.8] if text == "y" else [1, 0] for text in texts], float)


def update(objective, said=None):
    torch.manual_seed(0)  # of the value head
    lm = exact_lm(0)
    step = rolled(objective, lm, said)
    result = step.run([0, 1], train=True)
    return step, result, gradient(lm)


@pytest.mark.parametrize("scaling", [Scaling(signals="none"), Scaling(signals="model", tau=math.inf)])
def test_alpha_of_one_is_ppo_to_the_bit(scaling):
    _, base, wanted = update(PPO(rollouts=THREE))
    _, same, found = update(DRIRLPPO(rollouts=THREE, scaling=scaling, encode=encode))
    assert torch.equal(found, wanted) and same.loss == base.loss and wanted.abs().max() > 0


def test_alpha_scales_advantages_and_not_returns():
    said = []
    objective = DRIRLPPO(rollouts=THREE, encode=apart, critic=CriticOptions(gae=GAE(lam=0.5)))
    step, _, found = update(objective, said)
    alpha = step.state.alpha
    assert alpha.max() - alpha.min() > 0.01 and any("alpha from" in line for line in said)
    plain_step, _, wanted = update(PPO(rollouts=THREE, gae=GAE(lam=0.5)))
    assert not torch.equal(found, wanted)
    rewards, values = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    seen = type("Seen", (), {})()
    seen.groups = [g for g in step.groups for _ in range(3)]
    seen.groups_N, seen.mask_NT = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6, 2, dtype=torch.bool)
    seen.value_NT = values
    scaled = objective.advantages(seen, rewards, step.state)
    plain = plain_step.objective.advantages(seen, rewards, plain_step.state)
    assert torch.allclose(scaled.advantage_NT, plain.advantage_NT * alpha.repeat_interleave(3)[:, None])
    assert torch.equal(scaled.return_NT, plain.return_NT)


def test_a_prompt_without_a_demonstration_is_refused():
    lm = exact_lm(0)
    groups = rolled(PPO(rollouts=THREE), lm).groups
    groups[1].example.extra.clear()
    with pytest.raises(ValueError, match="row 1 has no text in column 'demonstration'"):
        DRIRLPPO().check(groups)


def test_rewards_taught_by_a_policy_need_several_completions(tmp_path):
    """PPO draws one completion a prompt; GRPO, which teaches the rewards, compares several."""
    from pertoken import catalog
    from pertoken.core.data import Group
    from pertoken.core.examples import Example
    from pertoken.core.irl import IRL
    from pertoken.core.loop import LoopConfig
    from pertoken.core.rollout import Sampling
    from pertoken.core.run import Run
    from tests import tiny

    lm = tiny.lm()
    rows = [Example(prompt=f"q{i}", kind="prompt", row=i, extra={"demonstration": "I cannot"}) for i in range(3)]
    groups = [Group(example=example, prompt_ids=lm.encode_prompt(example.prompt)) for example in rows]
    objective = DRIRLPPO(
        irl=IRL(irl_rounds=2, irl_policy="grpo", irl_policy_steps=1),
        rollouts=Rollouts(generations=1, sampling=Sampling(max_new_tokens=3)),
        encode=lambda texts: np.array([[len(t), t.count("o")] for t in texts], np.float32),
    )
    given = {"held_out": [], "config": LoopConfig(steps=1, batch_size=2), "out": tmp_path, "resolve": catalog.method}
    run = Run(slug="dr-irl-ppo", objective=objective, policy=lm, groups=groups, progress=False, **given)
    run.go()
    assert [s["stage"] for s in run.stages.records] == ["grpo-model", "irl-reward"]
