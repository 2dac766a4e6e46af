"""Learning from rollouts: the whole step on a tiny model, exactness over minibatches, processes' sums and resumes, and
what is said when nothing can be learned."""

# pyright: reportArgumentType=false
# pyright: reportCallIssue=false

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

import copy
import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.advantage import Advantages, GroupNormalised
from pertoken.core.credit import Credit, load_credits
from pertoken.core.critic import Critic, KLControl
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.experience import Rollouts
from pertoken.core.loop import LoopConfig, fit
from pertoken.core.policy_loss import PolicyLoss
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout import Sampling
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.run import Run
from pertoken.train.grpo import GRPO
from pertoken.train.ppo import PPO
from pertoken.train.rloo import RLOO
from tests.methods.one_pass import exact_lm

WANTED = 40  # an id that the reward counts
SHORT = Sampling(max_new_tokens=6)


def credit(trace, which):
    return Credit(trace=trace, values=np.asarray(which, float) * trace.mask)


class Counts:
    """1 on each token that is the wanted one; as text rewards cannot see ids, it is a scorer of traces."""

    def score(self, items):
        return [
            Credit(trace=t, values=np.array([float(i == WANTED) for i in t.completion_ids]) * t.mask) for t in items
        ]


class Constant:
    def score(self, items):
        return [Credit.of_sequence(t, 2.5) for t in items]


def prompts(lm, n=4):
    out = []
    for row in range(n):
        example = Example(prompt=f"film {row}?", kind="prompt", row=row)
        out.append(Group(example=example, prompt_ids=lm.encode_prompt(example.prompt)))
    return out


def make_step(objective, lm=None, scorer=None, **options):
    lm = lm or exact_lm(0)
    models = {n: lm.reference() for n in objective.experience if n != "policy"}
    rewarder = Rewarder({"count": scorer or Counts()}, on_error=objective.rollouts.on_error)
    return RolloutStep(objective, lm, prompts(lm), rewarder=rewarder, models=models, **options)


def options(kind, **rollouts):
    base = {"generations": 4, "sampling": SHORT}
    return kind(rollouts=Rollouts(**(base | rollouts)))


@pytest.mark.parametrize("kind", [PPO, GRPO, RLOO])
def test_the_rewarded_token_is_learned(kind, tmp_path):
    """One in eight of six tokens by chance; at least one more after 60 batches."""
    torch.manual_seed(0)
    lm = exact_lm(0)
    objective = options(kind)
    if kind is PPO:
        objective = PPO(rollouts=Rollouts(generations=4, sampling=SHORT, inner_epochs=2))
    step = make_step(objective, lm, Near())
    steps = 60 * step.updates_per_batch
    history = fit(step, LoopConfig(lr=3e-3, batch_size=4, steps=steps, schedule="constant"), tmp_path, progress=False)
    rewards = [r["reward"] for r in history if "reward" in r]
    assert len(rewards) == 60
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 1.0


class Near:
    """Denser than `Counts`, so that a random policy finds it: ids below 40 are worth 1."""

    def score(self, items):
        return [credit(t, [i < WANTED for i in t.completion_ids]) for t in items]


@pytest.mark.parametrize("kind", [PPO, GRPO, RLOO])
def test_minibatches_and_packs_sum_to_the_batch(kind):
    """One update on all = the sum of losses and gradients of packs, however small they are."""
    found = []
    for max_tokens in (4096, 24):
        torch.manual_seed(3)
        lm = exact_lm(0)
        step = make_step(options(kind, inner_epochs=1), lm, Near(), max_tokens=max_tokens)
        if kind is PPO:  # the head is float32 and made by the global generator
            step.state.double()
        torch.manual_seed(1)
        result = step.run([0, 1, 2, 3], train=True)
        grads = torch.cat(
            [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in lm.model.parameters()]
        )
        found.append((result.loss, result.count, grads))
    assert found[0][:2] == pytest.approx(found[1][:2])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-7, atol=1e-9)
    assert found[0][2].abs().max() > 0


def test_old_log_probs_are_the_recorded_ones():
    lm = exact_lm(0)
    objective = options(PPO)
    step = make_step(objective, lm, Near())
    step.run([0, 1], train=True)
    torch.manual_seed(0)
    parts = step._roll_out(step.groups[:2], True, SimpleNamespace(metrics={}))
    for group in parts[0]:
        for k, trace in enumerate(group.traces):
            np.testing.assert_allclose(group.columns["old_logps"][k], trace.policy_logps, atol=1e-9)
            np.testing.assert_allclose(group.columns["sampled_logps"][k], trace.sampled_logps)
            np.testing.assert_allclose(group.columns["reference_logps"][k], trace.policy_logps, atol=1e-9)


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_run_that_was_stopped_resumes_to_the_same_numbers(kind, tmp_path):
    """In the middle of a batch's updates, too: checkpoints stand between batches."""
    objective = options(kind, inner_epochs=2, minibatches=2)
    config = LoopConfig(lr=1e-3, batch_size=2, steps=12, save_every=1)

    class Stop(Exception):
        pass

    def history(out, stop_at=None, resume=False):
        torch.manual_seed(0)
        step = make_step(objective, exact_lm(0), Near())
        inner, calls = step.run, [0]

        def run(rows, *, train):
            calls[0] += 1
            if calls[0] == stop_at:
                raise Stop
            return inner(rows, train=train)

        step.run = run
        return fit(step, config, out, resume=resume, progress=False)

    whole = history(tmp_path / "whole")
    with pytest.raises(Stop):
        history(tmp_path / "cut", stop_at=7)  # the third update of the second batch
    again = history(tmp_path / "cut", resume=True)
    assert [r["step"] for r in again] == list(range(1, 13))
    for a, b in zip(whole, again, strict=True):
        a, b = ({k: v for k, v in r.items() if not k.startswith("seconds")} for r in (a, b))
        assert a == pytest.approx(b, nan_ok=True)


def test_why_the_loss_is_zero_is_said_in_words():
    said = []
    step = make_step(options(GRPO), scorer=Constant(), say=said.append)
    result = step.run([0, 1, 2, 3], train=True)
    assert result.loss == 0 and result.metrics["frac_reward_zero_std"] == (4.0, 4.0)
    assert "batch 1: the policy's loss is 0, because every advantage is 0" in said[0] and "row 0: 2.5" in said[0]
    objective = GRPO(rollouts=Rollouts(generations=4, sampling=Sampling(max_new_tokens=2), mask_truncated=True))
    said.clear()
    result = make_step(objective, scorer=Near(), say=said.append).run([0, 1], train=True)
    assert result.loss == 0 and "raise max_new_tokens" in said[0]


def test_rows_that_cannot_be_scored_are_left_out_and_counted():
    class Fails:
        def score(self, items):
            if any(t.completion_ids[0] % 2 for t in items):
                raise RuntimeError("odd")
            return Near().score(items)

    said = []
    step = make_step(options(GRPO, on_error="skip"), scorer=Fails(), say=said.append)
    torch.manual_seed(0)
    result = step.run([0, 1, 2, 3], train=True)
    lost, total = result.metrics["completions/failed"]
    assert 0 < lost < total == 16 and result.metrics["reward"][1] == total - lost
    assert "left out: RuntimeError: odd" in said[0]
    with pytest.raises(ValueError, match="odd"):
        make_step(options(GRPO), scorer=Fails()).run([0, 1, 2, 3], train=True)


def test_truncation_costs_what_is_asked_and_can_be_left_out():
    lm = exact_lm(0)
    fine = options(GRPO, missing_eos_penalty=5.0)
    step = make_step(fine, lm, Constant())
    seen = []
    object.__setattr__(fine, "advantages", lambda e, r, s: seen.append((e, r)) or _zero(r))
    step.run([0, 1, 2, 3], train=True)
    experience, reward = seen[0]
    wanted = torch.where(experience.ended_N, 2.5, -2.5).to(reward)
    torch.testing.assert_close(reward.sum(1), wanted)


def _zero(reward):
    return Advantages(torch.zeros_like(reward))


def test_tokens_that_the_policy_did_not_emit_are_masked_everywhere():
    """A generator that puts a tool's output into each answer: no reward, no advantage, no loss on it."""
    lm = exact_lm(0)

    def with_tool(lm, prompts, n, sampling, *, seed):
        out = []
        for p in prompts:
            ids = [5, 6, 7, WANTED, WANTED, 8]
            emitted = (True, True, True, False, False, True)
            out.append([lm.trace_of_ids(p, ids, emitted=emitted, ended=True) for _ in range(n)])
        return out

    seen = []
    objective = options(PPO)
    object.__setattr__(objective, "rewards", lambda e, s: seen.append(e) or e.reward_NT)
    step = make_step(objective, lm, Counts(), generate=with_tool)
    step.models["reference"] = exact_lm(3)
    result = step.run([0, 1], train=True)
    (experience,) = seen
    assert (experience.log_ratio() != 0).equal(experience.mask_NT)
    assert not experience.reward_NT.any() and not experience.mask_NT[:, 3:5].any()
    assert not experience.value_NT[:, 3:5].any()
    assert result.count == 2 * 4 * 4  # prompts, completions, emitted tokens


def test_only_what_was_cut_off_is_masked():
    """One of two answers ended: its tokens alone are learned from, against the mean of both."""

    def half(lm, prompts, n, sampling, *, seed):
        ids = [[5, 6, WANTED], [7, 8, 9, 10]]
        return [[lm.trace_of_ids(p, one, ended=k == 0) for k, one in enumerate(ids)] for p in prompts]

    objective = GRPO(rollouts=Rollouts(generations=2, mask_truncated=True), advantage=GroupNormalised(std=False))
    result = make_step(objective, generate=half).run([0, 1], train=True)
    assert result.count == 2 * 3 and result.loss == pytest.approx(-6 * 0.5)


def test_the_kl_coefficient_of_the_next_batch_is_adapted_to_this_ones_kl():
    lm = exact_lm(0)
    control = KLControl(kl_coef=0.1, kl_target=1e-3, kl_horizon=64.0)
    objective = PPO(kl=control, rollouts=Rollouts(generations=4, sampling=SHORT))
    step = make_step(objective, lm, Near())
    step.models["reference"], seen = exact_lm(3), []
    inner = PPO.advantages
    object.__setattr__(objective, "advantages", lambda e, r, s: seen.append((e, r)) or inner(objective, e, r, s))
    step.run([0, 1], train=True)
    ((experience, reward),) = seen
    torch.testing.assert_close(reward, experience.reward_NT - 0.1 * experience.log_ratio(), rtol=0, atol=1e-6)
    error = float((experience.log_ratio().sum(1).mean() / 1e-3 - 1).clamp(-0.2, 0.2))
    assert abs(error) == pytest.approx(0.2)
    assert float(step.state.kl_coef) == pytest.approx(0.1 * (1 + error * 8 / 64))


def test_completions_table(tmp_path):
    step = make_step(options(GRPO, completions_every=2), scorer=Near(), out=tmp_path)
    for _ in range(3):
        step.run([0, 1], train=True)
    files = sorted((tmp_path / "completions").iterdir())
    assert [f.name for f in files] == ["batch_000001.jsonl", "batch_000003.jsonl"]
    credits = load_credits(files[0])
    assert [c.kind for c in credits[:2]] == ["reward", "advantage"] and len(credits) == 16
    assert credits[0].trace.meta["row"] == 0


def test_the_kl_coefficient_adapts_and_is_clipped():
    critic = Critic(exact_lm(0).causal.config, KLControl(kl_coef=0.1, kl_target=6.0, kl_horizon=100.0), values=False)
    critic.observe(torch.full((10,), 6.6))
    assert float(critic.kl_coef) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    critic.observe(torch.full((10,), 600.0))
    assert float(critic.kl_coef) == pytest.approx(0.1 * 1.01 * (1 + 0.2 * 10 / 100))
    short = Critic(exact_lm(0).causal.config, KLControl(kl_target=6.0, kl_horizon=2.0), values=False)
    with pytest.raises(ValueError, match=r"too short for 10 completions.* give more than 2 "):
        short.observe(torch.full((10,), 0.0))
    fixed = Critic(exact_lm(0).causal.config, KLControl(kl_coef=0.1), values=False)
    fixed.observe(torch.full((10,), 600.0))
    assert float(fixed.kl_coef) == pytest.approx(0.1)


def test_kl_is_in_the_rewards_and_zero_at_the_start():
    lm = exact_lm(0)
    step = make_step(options(PPO), lm, Near())
    result = step.run([0, 1], train=True)
    total, count = result.metrics["objective/kl"]
    assert abs(total) < 1e-9 and count == 8
    with torch.no_grad():
        for p in lm.model.parameters():
            p.mul_(1.1)
    lm.changed()
    step.parts = []
    seen = []
    inner = step.objective.advantages
    object.__setattr__(step.objective, "advantages", lambda e, r, s: seen.append((e, r)) or inner(e, r, s))
    step.run([0, 1], train=True)
    (experience, reward), coef = seen[0], float(step.state.kl_coef)
    wanted = experience.reward_NT - coef * experience.log_ratio()
    torch.testing.assert_close(reward, wanted)
    assert experience.log_ratio().abs().max() > 1e-3


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: GRPO(rollouts=Rollouts(generations=1)), "2 or more"),
        (lambda: RLOO(rollouts=Rollouts(generations=1)), "2 or more"),
        (lambda: Rollouts(minibatches=0), "1 or more"),
        (lambda: Rollouts(missing_eos_penalty=float("nan")), "give a finite one"),
        (lambda: KLControl(kl_coef=float("inf")), "kl_coef >= 0"),
        (lambda: RLOO(advantage="x"), "not one of"),
    ],
)
def test_bad_options(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_more_minibatches_than_completions():
    step = make_step(options(GRPO, generations=2, minibatches=9))
    with pytest.raises(ValueError, match="lower minibatches"):
        step.run([0, 1, 2, 3], train=True)
    step = make_step(options(GRPO, generations=2, minibatches=3), scorer=Near())
    for _ in range(3):  # of two prompts: single completions
        assert step.run([0, 1], train=True).count > 0


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_a_short_last_batch_has_empty_minibatches(kind, tmp_path):
    """Four minibatches of six prompts, two of which make the second batch: what is left over learns nothing."""
    g = 1 if kind is PPO else 2
    objective = options(kind, generations=g, inner_epochs=2, minibatches=4 * g)
    lm = exact_lm(0)
    step = make_step(objective, lm, Near())
    step.groups = prompts(lm, 6)
    step.size, inner, seen = 6, step.run, []

    def run(rows, *, train):
        seen.append(torch.cat([p.detach().flatten() for p in lm.model.parameters()]))
        return inner(rows, train=train)

    step.run = run
    history = fit(step, LoopConfig(lr=1e-3, batch_size=4, weight_decay=0.1), tmp_path, progress=False)
    assert len(history) == 2 * 2 * 4 * g
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    second = moved[8 * g :]
    assert not any(second[2 * g : 4 * g]) and not any(second[6 * g :])
    assert all(second[: 2 * g]) if kind is PPO else any(second)


def test_completions_without_a_token_are_left_out_and_told():
    def empty(lm, prompts, n, sampling, *, seed):
        return [[lm.trace_of_ids(p, ids, ended=False) for ids in ([], [5, 6], [])] for p in prompts]

    said = []
    step = make_step(options(GRPO), scorer=Near(), say=said.append, generate=empty)
    assert step.run([0, 1], train=True).count == 4
    assert "4 completions without a token (row 0), left out" in said[0]
    nothing = lambda lm, prompts, n, sampling, *, seed: [[lm.trace_of_ids(p, [], ended=False)] for p in prompts]
    with pytest.raises(ValueError, match="2 of 2 have no token"):
        make_step(options(GRPO), scorer=Near(), generate=nothing).run([0, 1], train=True)


def test_groups_are_as_the_generator_gave_them():
    """Whatever number of completions it made of each prompt."""

    def uneven(lm, prompts, n, sampling, *, seed):
        return [[lm.trace_of_ids(p, [5, 6], ended=False)] * k for p, k in zip(prompts, (1, 3), strict=True)]

    objective, seen = options(GRPO), []
    object.__setattr__(objective, "advantages", lambda e, r, s: seen.append(e) or _zero(r))
    make_step(objective, scorer=Near(), generate=uneven).run([0, 1], train=True)
    assert seen[0].groups_N.tolist() == [0, 1, 1, 1]
    assert [g.example.row for g in seen[0].groups] == [0, 1, 1, 1]


def test_a_run_by_name(tmp_path):
    """Through `Run`: held-out prompts are answered and scored, the record holds the reward's name."""
    lm = exact_lm(0)
    objective = GRPO(scorer={"near": Near()}, rollouts=Rollouts(generations=2, sampling=SHORT))
    run = Run(
        slug="grpo",
        objective=objective,
        policy=lm,
        groups=prompts(lm, 4),
        held_out=prompts(lm, 2),
        config=LoopConfig(lr=1e-3, batch_size=2, steps=2),
        out=tmp_path / "run",
        resolve=lambda slug: GRPO,
        progress=False,
    )
    record = run.go()
    assert {"eval_reward", "eval_rewards/near"} <= record["final"].keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"reward", "rewards/near", "seconds/rollout"} <= lines[0].keys()


def test_options_are_values():
    one = dataclasses.replace(GRPO(), policy_loss=PolicyLoss(kl_loss=0.04), advantage=GroupNormalised(std=False))
    assert one.models == ("reference",) and copy.deepcopy(one) == one
    assert GRPO().experience == {} and set(one.experience) == {"policy", "reference"}
