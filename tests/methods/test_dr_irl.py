"""Dynamic reward scaling by hand, its limits and pitfalls; GRPO-S on real rollouts; the tabular 1 / alpha rule."""

# pyright: reportArgumentType=false
# pyright: reportCallIssue=false

# pyright: reportOptionalMemberAccess=false

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GroupNormalised
from pertoken.core.credit import Credit
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.experience import Rollouts
from pertoken.core.policy_loss import PolicyLoss
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout import Sampling
from pertoken.core.rollout_step import RolloutStep
from pertoken.train._demonstrations import CATEGORIES, CHAIN_OF_DRAFT
from pertoken.train._dynamic_scaling import clauses, data_hardness, matching, responsiveness, scaled, similarity
from pertoken.train.dr_irl import DRIRL, Scaling
from pertoken.train.grpo import GRPO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient

sigmoid = lambda x: 1 / (1 + math.exp(-x))
PLANE = {"a": [1, 0], "b": [0, 1], "c": [0.6, 0.8], "d": [-1, 0], "nothing": [0, 0]}
encode = lambda texts: np.array([PLANE.get(t, [1, 1]) for t in texts], float)


def test_clauses():
    assert clauses("I cannot. Why? It harms:  people!\n\nAsk; me") == [
        "I cannot",
        "Why",
        "It harms",
        "people",
        "Ask",
        "me",
    ]
    assert clauses("no end at all") == ["no end at all"]
    assert clauses("我不能。为什么？对不起；好！") == ["我不能", "为什么", "对不起", "好"]
    assert clauses("一．二｡三\x85four\x0bfive") == [
        "一",
        "二",
        "三",
        "four",
        "five",
    ]  # full and half width, line breaks
    assert clauses(" ...!\n") == clauses("") == []


def test_matching_by_hand():
    assert matching(np.array([[0.1, 0.5], [0.9, -0.2], [-0.4, -0.6]])) == pytest.approx((0.5 + 0.9 - 0.4) / 3)
    w, empty = similarity(["a. b", "c", "d"], ["c", "a. b", "a"], encode)
    assert w == pytest.approx([(0.6 + 0.8) / 2, 0.8, -1.0]) and empty == 0  # delta up to 2
    w, _ = similarity(["a"], ["a. b"], encode)
    assert w == pytest.approx([1.0])  # one clause copied is a perfect match...
    w, _ = similarity(["a"], ["a. b"], encode, symmetric=True)
    assert w == pytest.approx([(1.0 + 0.5) / 2])  # ...unless both ways are asked
    w, _ = similarity(["a. b. d"], ["a. b. d"], encode)
    assert w == pytest.approx([1.0])


def test_texts_without_clauses_have_no_similarity():
    w, empty = similarity(["", "a", "!!", "nothing"], ["a", "...", "", "a"], encode)
    assert w.tolist() == [0, 0, 0, 0] and empty == 3
    assert similarity([""], [""], encode)[0].tolist() == [0]


def test_data_hardness_by_hand():
    assert data_hardness([0.2, 0.6]) == pytest.approx([sigmoid(0.2) / sigmoid(0.4), sigmoid(0.6) / sigmoid(0.4)])
    assert data_hardness([0.2, 0.6]) == pytest.approx([0.92, 1.08], abs=0.005)
    assert data_hardness([0.7, 0.7, 0.7]) == pytest.approx(1)
    some = data_hardness([0.0] + [2.0] * 999)
    other = data_hardness([2.0] + [0.0] * 999)
    assert 0.567 < some[0] < 0.57 and 1.75 < other[0] < 1.762  # (sigmoid(0) / sigmoid(2), sigmoid(2) / sigmoid(0))


def test_responsiveness_by_hand():
    gaps = [1.0, 2.0, 3.0, 10.0]  # mean 4, squares 9, 4, 1, 36
    alpha, removed = responsiveness(gaps, tau=9.0)  # the boundary is kept
    assert removed == 1 and alpha == pytest.approx(sigmoid(2.0) / sigmoid(4.0))
    alpha, removed = responsiveness(gaps, tau=8.999)
    assert removed == 2 and alpha == pytest.approx(sigmoid(2.5) / sigmoid(4.0))
    assert responsiveness(gaps, tau=math.inf) == (1.0, 0)
    assert responsiveness([-9.0, 9.0], tau=1.0) == (1.0, 2)  # every gap removed: the unfiltered mean
    assert responsiveness([5.0, 5.0], tau=0.0) == (1.0, 0)
    wide = [0.0] * 20 + [100.0]  # default: beyond two standard deviations (ddof 0)
    assert responsiveness(wide)[1] == 1
    with pytest.raises(ValueError, match="gap 1 is not finite"):
        responsiveness([1.0, float("nan")])


def test_responsiveness_is_above_one_iff_the_filter_raises_the_mean():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        gaps, tau = rng.normal(size=7) * 2, float(rng.uniform(0.5, 6))
        kept = [g for g in gaps if (g - gaps.mean()) ** 2 <= tau]
        if not 0 < len(kept) < 7:
            continue
        seen.add(above := np.mean(kept) > gaps.mean())
        assert (responsiveness(gaps, tau)[0] > 1) == above
    assert seen == {True, False}


def test_scaled_multiplies_losses_and_advantages_without_gradient():
    """DPO-S and PPO-S: per-example losses, advantages of tokens."""
    alpha = torch.tensor([2.0, 0.5], requires_grad=True)
    losses = torch.tensor([0.3, 0.8], requires_grad=True)
    scaled(losses, alpha).sum().backward()
    assert alpha.grad is None and losses.grad.tolist() == [2.0, 0.5]
    assert scaled(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), alpha).tolist() == [[2.0, 4.0], [1.5, 2.0]]


# ---- on rollouts

IDS = [[[5, 6, 7], [8, 9], [11]], [[12, 13], [14], [15, 16]]]
GREEDY = [[20, 21], [22]]
VALUES = {
    tuple(ids): v for ids, v in zip([i for some in IDS for i in some], [1.0, 2.0, 4.0, 0.0, 5.0, 1.0], strict=True)
}
VALUES |= {tuple(GREEDY[0]): -1.0, tuple(GREEDY[1]): 0.5}


class Judge:
    """A value for each completion that is known, 3 for any other (the demonstrations)."""

    def score(self, items):
        return [Credit.of_sequence(t, VALUES.get(t.completion_ids, 3.0)) for t in items]


def generate(lm, prompts, n, sampling, *, seed):
    some = [[g] for g in GREEDY] if sampling.temperature == 0 else IDS
    return [[lm.trace_of_ids(p, ids, ended=True) for ids in one] for p, one in zip(prompts, some, strict=True)]


def rolled(objective, lm, said=None, demos=("x", "y")):
    groups = []
    for row, demo in enumerate(demos):
        example = Example(prompt=f"q{row}", kind="prompt", row=row, extra={"demonstration": demo})
        groups.append(Group(example=example, prompt_ids=lm.encode_prompt(f"q{row}")))
    say = None if said is None else said.append
    given = {"rewarder": Rewarder({"judge": Judge()}), "generate": generate, "say": say}
    return RolloutStep(objective, lm, groups, models={n: lm.reference() for n in objective.models}, **given)


EXACT = GroupNormalised(ddof=0, eps=0.0)
PLAIN = PolicyLoss()
THREE = Rollouts(generations=3)


def one_update(objective, **options):
    lm = exact_lm(0)
    step = rolled(objective, lm, **options)
    result = step.run([0, 1], train=True)
    return step, result, gradient(lm)


def test_alpha_of_one_is_grpo_to_the_bit():
    _, base, wanted = one_update(GRPO(rollouts=THREE, advantage=EXACT, policy_loss=PLAIN))
    none = Scaling(signals="none")
    _, same, found = one_update(DRIRL(rollouts=THREE, policy_loss=PLAIN, scaling=none))
    assert torch.equal(found, wanted) and same.loss == base.loss and wanted.abs().max() > 0
    infinite = Scaling(signals="model", tau=math.inf)  # alphaM = 1
    _, same, found = one_update(DRIRL(rollouts=THREE, policy_loss=PLAIN, scaling=infinite))
    assert torch.equal(found, wanted)


def test_advantages_and_alpha_by_hand():
    vectors = {}

    def phi(texts):  # the first demonstration equals nothing, the second is at a right angle
        for text in texts:
            vectors.setdefault(text, [1, 0] if text == "x" else [0.6, 0.8] if text == "y" else [1, 0])
        return np.array([vectors[t] for t in texts], float)

    lm = exact_lm(0)
    said = []
    step = rolled(DRIRL(rollouts=THREE, policy_loss=PLAIN, encode=phi), lm, said)
    # a clause of the greedy texts, or none: then W is 0
    w = [(1.0 if d == "x" else 0.6) if clauses(lm.trace_of_ids((1,), g).text) else 0.0 for d, g in zip("xy", GREEDY)]
    delta = [1 - x for x in w]
    mean = sum(delta) / 2
    gaps = [3.0 - -1.0, 3.0 - 0.5]
    alpha_m = sigmoid(sum(gaps) / 2) / sigmoid(sum(gaps) / 2)  # both within two deviations
    wanted = [sigmoid(d) / sigmoid(mean) * alpha_m for d in delta]
    step.run([0, 1], train=True)
    assert step.state.alpha.tolist() == pytest.approx(wanted)
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 5.0, 1.0]])
    normal = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    objective = step.objective
    groups = [dataclasses.replace(g) for g in step.groups for _ in range(3)]
    mask = torch.ones(6, 1, dtype=torch.bool)
    seen = SimpleNamespace(groups=groups, groups_N=torch.tensor([0, 0, 0, 1, 1, 1]), mask_NT=mask)
    found = objective.advantages(seen, rewards.flatten()[:, None], step.state).advantage_NT[:, 0]
    assert found.tolist() == pytest.approx((normal * torch.tensor(wanted)[:, None]).flatten().tolist(), rel=1e-5)
    assert any("alpha from" in line for line in said)


def test_equal_rewards_learn_nothing_and_make_no_nan(monkeypatch):
    monkeypatch.setattr(
        Judge,
        "score",
        lambda self, items: [Credit.of_sequence(t, 1.0) for t in items],
    )
    _, result, found = one_update(DRIRL(rollouts=THREE, policy_loss=PLAIN, encode=encode))
    assert math.isfinite(result.loss) and not found.any()


def test_alpha_is_made_anew_once_a_pass():
    calls = []
    objective = DRIRL(
        rollouts=THREE, policy_loss=PLAIN, encode=lambda texts: calls.append(1) or np.ones((len(texts), 2))
    )
    step = rolled(objective, exact_lm(0))
    for refreshes in (1, 2, 3):
        for _ in range(2):  # two prompts, one a batch
            objective.before_rollouts(step, 1)
        assert len(calls) == refreshes
    assert {"alpha", "due", "batches_done"} <= dict(step.state.named_buffers()).keys()  # a resumed run has them


def test_an_inactive_scaling_and_a_tau_too_small_are_told():
    said = []
    objective = DRIRL(
        rollouts=THREE, policy_loss=PLAIN, encode=lambda t: np.ones((len(t), 2)), scaling=Scaling(tau=0.0)
    )
    rolled(objective, exact_lm(0), said).run([0, 1], train=True)
    assert any("removes every gap" in line for line in said) and any("inactive" in line for line in said)


def test_bad_options_and_data():
    with pytest.raises(ValueError, match="generations of 2 or more"):
        DRIRL(rollouts=Rollouts(generations=1))
    with pytest.raises(ValueError, match="must not be negative"):
        Scaling(tau=-1.0)
    with pytest.raises(ValueError, match="signals are both"):
        Scaling(signals="some")  # type: ignore[arg-type]
    bare = Group(example=Example(prompt="q", kind="prompt", row=4), prompt_ids=(1,))
    with pytest.raises(ValueError, match="row 4 has no text in column 'demonstration'"):
        DRIRL().check([bare])
    assert "insult" in CHAIN_OF_DRAFT.format(category=CATEGORIES[0], prompt="?")


@pytest.mark.parametrize("irl_policy", ["pool", "grpo"])
def test_rewards_are_learned_before_training(tmp_path, irl_policy):
    from pertoken import catalog
    from pertoken.core.irl import IRL
    from pertoken.core.loop import LoopConfig
    from pertoken.core.run import Run
    from tests import tiny

    lm = tiny.lm()
    rows = [(f"q{i}", "crime" if i < 4 else "insult") for i in range(6)]
    groups = []
    for row, (prompt, category) in enumerate(rows):
        extra = {"demonstration": "sorry. I cannot", "category": category}
        example = Example(prompt=prompt, kind="prompt", row=row, extra=extra)
        groups.append(Group(example=example, prompt_ids=lm.encode_prompt(prompt)))
    objective = DRIRL(
        irl=IRL(irl_pool=2, irl_rounds=2, irl_policy=irl_policy, irl_policy_steps=1),
        rollouts=Rollouts(generations=2, sampling=Sampling(max_new_tokens=3)),
        encode=lambda texts: np.array([[len(t), t.count("o")] for t in texts], np.float32),
    )
    config = LoopConfig(steps=1, batch_size=2)
    run = Run(slug="dr-irl", objective=objective, policy=lm, groups=groups, held_out=[], config=config, out=tmp_path,
              resolve=catalog.method, progress=False)  # fmt: skip
    run.go()
    assert len(run.groups) == 4 and any("2 of 6 prompts left out" in note for note in run.notes)
    assert [s["stage"] for s in run.stages.records].count("irl-reward") == 1
    (folder,) = (tmp_path / "stages").glob("irl-reward-*")
    assert (folder / "irl-reward.safetensors").exists()
    assert (run.updates > 1) == (irl_policy == "grpo")


def test_prompts_whose_reward_failed_are_told():
    """A scorer may fail on rows that are left out by request: alphaM is of the others, and their number is said."""
    from pertoken.train._demonstrated import alphas

    class Fails:
        def score(self, items):
            if any(t.meta["row"] == 1 for t in items):
                raise RuntimeError("no")
            return [Credit.of_sequence(t, float(len(t))) for t in items]

    step = rolled(DRIRL(rollouts=THREE, policy_loss=PLAIN, encode=encode), exact_lm(0))
    lm, said = step.policy, []
    traces = lambda some: [
        dataclasses.replace(lm.trace_of_ids(g.prompt_ids, ids), meta={"row": g.example.row})
        for g, ids in zip(step.groups, some, strict=True)
    ]
    rewarder = Rewarder({"fails": Fails()}, None, "skip")
    found = alphas(step.groups, traces([[5], [6]]), traces([[7, 8], [9]]), rewarder, encode, Scaling(), said.append)
    assert np.isfinite(found).all() and "mean gap 1.000" in said[-1] and "1 prompts without a reward" in said[-1]


def test_a_prompt_without_category_among_others_is_refused():
    """It would be a category of its own, the rarest, to whose size all others are cut."""
    named = lambda row, c: Example(prompt="q", kind="prompt", row=row, extra={"demonstration": "no", "category": c})
    groups = [Group(example=named(k, c), prompt_ids=(1,)) for k, c in enumerate(("crime", "crime", "", "insult"))]
    run = SimpleNamespace(groups=groups, config=SimpleNamespace(seed=0), report=print)
    with pytest.raises(ValueError, match="row 2 has no category and others do"):
        DRIRL(scorer=len).prepare(run)
    run.groups = groups[:2]
    DRIRL(scorer=len).prepare(run)
    assert len(run.groups) == 2


# ---- the rule that no large speed-up follows from alpha


def steps_to(alpha, rate=0.05, goal=0.8):
    """Steps of SGD on the exact policy gradient of a refusal's probability p = sigmoid(z), from p = 0.2."""
    z, steps = math.log(0.25), 0
    while sigmoid(z) < goal:
        p = sigmoid(z)
        z += rate * alpha * p * (1 - p)  # d/dz of E[R], R = 1 for a refusal
        steps += 1
    return steps


def test_steps_are_proportional_to_one_over_alpha():
    base = steps_to(1.0)
    assert base >= 100
    for alpha in (0.57, 0.92, 1.08, 1.76):
        assert steps_to(alpha) * alpha == pytest.approx(base, rel=0.05)
