"""RTO against numbers worked out by hand, loops of numpy, and PPO; the identities and pitfalls of its specification."""

# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

# pyright: reportOptionalMemberAccess=false

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from pertoken.catalog import method
from pertoken.core.advantage import GAE, on_last
from pertoken.core.credit import Credit
from pertoken.core.critic import KLControl
from pertoken.core.data import encode
from pertoken.core.examples import Example
from pertoken.core.experience import Rollouts
from pertoken.core.loop import LoopConfig, StepResult
from pertoken.core.policy_loss import PolicyLoss
from pertoken.core.rollout import Sampling
from pertoken.core.run import Run
from pertoken.score.logratio import LogRatio
from pertoken.train._granularity import regrouped, sentence_ends
from pertoken.train._policy_gradient import ValueLoss
from pertoken.train.ppo import PPO
from pertoken.train.rto import RTO, DPOStage, SequenceReward, TokenReward, dpo_token_reward, sequence_reward
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step, states

COMPLETIONS = [[[5, 6, 7]], [[8, 9]], [[11, 12, 13, 14]]]
REWARDS = [[0.0, 0.0, 1.0], [0.0, -0.5], [0.0, 0.0, 0.0, 2.0]]
ONCE = Rollouts(generations=1, inner_epochs=1)
PLAIN = TokenReward(dpo_scale=0.3, dpo_clip=0.0)
MASK = torch.tensor([[True, True, True, True, True], [True, True, False, True, False], [False] * 5])


def rows(values):
    return torch.tensor(values, dtype=torch.float64)


def judged(objective, completions=COMPLETIONS, rewards=REWARDS, **options):
    """(experience, rewards, figures) of the first batch of a step."""
    step, seen = make_step(objective, completions, rewards, **options), []
    inner = objective.advantages
    object.__setattr__(objective, "advantages", lambda e, r, s: seen.append((e, r)) or inner(e, r, s))
    found = step.run(list(range(len(completions))), train=True)
    return *seen[0], found


def three():
    return {"policy": exact_lm(0), "reference": exact_lm(3), "dpo": exact_lm(5)}


def of(lms):
    return {"lm": lms["policy"], "models": {k: v for k, v in lms.items() if k != "policy"}}


# ---- the pure functions


def test_the_token_reward_by_hand():
    dpo, ref = rows([[-1.0, -2.0, -3.0, -0.5, -1.0]]), rows([[-1.5, -1.0, -3.0, -4.5, -1.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    # log-ratios 0.5, -1, 0, 4; by 0.05: 0.025, -0.05, 0, 0.2, of which the last is clipped AFTER scaling
    wanted = rows([[0.025, -0.05, 0.0, 0.05, 0.0]])
    torch.testing.assert_close(dpo_token_reward(dpo, ref, mask), wanted)
    wanted = rows([[0.025, -0.05, 0.0, 0.2, 0.0]])
    torch.testing.assert_close(dpo_token_reward(dpo, ref, mask, clip=0.0), wanted)
    assert not dpo_token_reward(dpo, ref, mask, scale=0.0).any()  # 0 is off; the release takes it for 1
    torch.testing.assert_close(dpo_token_reward(dpo, ref, mask, 1.0, 0.0)[0], rows([0.5, -1.0, 0.0, 4.0, 0.0]))
    beyond = torch.where(mask, dpo, math.nan)
    torch.testing.assert_close(dpo_token_reward(beyond, ref, mask), rows([[0.025, -0.05, 0.0, 0.05, 0.0]]))


def test_the_last_emitted_token():
    """Not the last column; nowhere where nothing was emitted, where an argmax would name the last column."""
    found = on_last(rows([1.0, 2.0, 4.0]), MASK)
    torch.testing.assert_close(found, rows([[0, 0, 0, 0, 1.0], [0, 0, 0, 2.0, 0], [0] * 5]))
    assert on_last(rows([3.0]), torch.tensor([[True]])).item() == 3.0


def test_the_sequence_reward_is_standardised_then_clamped():
    total = rows([5.0, 50.0, -1e9])
    torch.testing.assert_close(sequence_reward(total, 1.0, 2.0), rows([2.0, 10.0, -10.0]))
    torch.testing.assert_close(sequence_reward(total, 1.0, 2.0, 0.0)[1:2], rows([24.5]))


def test_granularities_by_hand():
    r = torch.where(MASK, rows([[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 0.0, 4.0, 0.0], [0.0] * 5]), 0.0)
    ends = torch.tensor([[False, True, True, False, False], [True, False, True, False, True], [True] * 5])
    torch.testing.assert_close(regrouped(r, MASK, "token"), r)
    wanted = rows([[0, 0, 0, 0, 31.0], [0, 0, 0, 7.0, 0], [0.0] * 5])
    torch.testing.assert_close(regrouped(r, MASK, "sequence"), wanted)
    wanted = rows([[1.0, 2.0, 4.0, 8.0, -15.0], [1.0, 2.0, 0, -3.0, 0], [0.0] * 5])
    torch.testing.assert_close(regrouped(r, MASK, "shaping"), wanted)
    # an end that was not emitted (the third of row two) ends nothing; the rest stands on the last emitted token
    wanted = rows([[0, 3.0, 4.0, 0, 24.0], [1.0, 0, 0, 6.0, 0], [0.0] * 5])
    torch.testing.assert_close(regrouped(r, MASK, "sentence", ends), wanted)


def test_where_sentences_end():
    lm = exact_lm(0)
    trace = lm.trace("How?", "It is. No!\nYes, a? b")
    pieces = [p.decode() for p in trace.completion_pieces]
    found = sentence_ends([trace], len(trace) + 2)[0]
    wanted = [p.rstrip("\n") != p or "\n" in p or p[-1:] in (".", "!", "?") for p in pieces]
    assert found.tolist() == [*wanted, False, False]
    assert "".join("|" if end else "." for end, p in zip(wanted, pieces) if p).count("|") == 4
    assert not found[len(trace) - 1]  # the terminator has no text


# ---- whole batches


def by_hand(lms, step, objective):
    """Rewards, whitened advantages and the loss, from the equations and the plain models."""
    tok, kept = objective.token_reward, []
    for group, (ids,), given in zip(step.groups, COMPLETIONS, REWARDS, strict=True):
        p, q, d = (logps(lms[n], group.prompt_ids, ids) for n in ("policy", "reference", "dpo"))
        v = states(lms["policy"], group.prompt_ids, ids) @ step.state.head.weight[0] + step.state.head.bias
        dense = np.clip(tok.dpo_scale * (d - q).detach().numpy(), -tok.dpo_clip, tok.dpo_clip)
        r = dense - objective.kl.kl_coef * (p - q).detach().numpy()
        r[-1] += min(max(sum(given), -10.0), 10.0)
        a, later, old = np.zeros(len(ids)), 0.0, v.detach().numpy()
        for t in reversed(range(len(ids))):
            later = r[t] + (old[t + 1] if t + 1 < len(ids) else 0.0) - old[t] + objective.gae.lam * later
            a[t] = later
        kept.append((r, a, p, v))
    every = np.concatenate([a for _, a, *_ in kept])
    scale = math.sqrt(max(float(np.mean((every - every.mean()) ** 2)), 1e-8))
    loss = 0.0
    for _, a, p, v in kept:
        white, ratio = torch.tensor((a - every.mean()) / scale), torch.exp(p - p.detach())
        policy = -torch.minimum(ratio * white, ratio.clamp(0.8, 1.2) * white)
        value = 0.5 * (v - torch.tensor(a) - v.detach()).square()
        loss = loss + (policy + objective.value.vf_coef * value).mean() / len(kept)  # of sequences' token means
    return [r for r, *_ in kept], loss


def test_the_first_update_by_hand():
    lms = three()
    objective = RTO(rollouts=ONCE)
    step, seen = make_step(objective, COMPLETIONS, REWARDS, **of(lms)), []
    inner = RTO.rewards
    object.__setattr__(objective, "rewards", lambda e, s: seen.append(inner(objective, e, s)) or seen[-1])
    result = step.run([0, 1, 2], train=True)
    found, head = gradient(lms["policy"]) / result.count, step.state.head.weight.grad.clone()
    lms["policy"].model.zero_grad()
    step.state.zero_grad()
    rewards, wanted = by_hand(lms, step, objective)
    wanted.backward()
    for row, r in zip(seen[0], rewards, strict=True):
        np.testing.assert_allclose(row[: len(r)], r, atol=1e-9)
    assert result.count == 3 and result.loss / result.count == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(found, gradient(lms["policy"]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head / result.count, step.state.head.weight.grad, rtol=1e-6, atol=1e-9)


def test_clipped_tokens_are_counted():
    lms = three()
    experience, _, found = judged(RTO(rollouts=ONCE), **of(lms))
    ratios = np.concatenate(
        [
            (logps(lms["dpo"], g.prompt_ids, i) - logps(lms["reference"], g.prompt_ids, i)).tolist()
            for g, (i,) in zip(experience.groups, COMPLETIONS)
        ]
    )
    clipped = float((np.abs(ratios) > 1).sum())
    assert 0 < clipped < 9 and found.metrics["rto/dpo_clipped"] == (clipped, 9.0)
    dense = np.clip(0.05 * ratios, -0.05, 0.05).sum()
    assert found.metrics["rto/dpo_reward"] == pytest.approx((dense, 3.0))
    assert found.metrics["rto/reward_clamped"] == (0.0, 3.0)
    assert found.metrics["completions/mean_length"] == (9.0, 3.0)


def test_sum_of_token_rewards_is_the_sequence_log_ratio():
    """No clip, no R, no KL: sum_h r_h = beta_1 (log pi_dpo(y) - log pi_ref(y))."""
    lms, none = three(), [[0.0] * 4] * 3
    objective = RTO(token_reward=PLAIN, kl=KLControl(kl_coef=0.0), rollouts=ONCE)
    experience, reward, _ = judged(objective, rewards=none, **of(lms))
    for row, group, (ids,) in zip(reward, experience.groups, COMPLETIONS, strict=True):
        d, q = (float(logps(lms[n], group.prompt_ids, ids).sum().detach()) for n in ("dpo", "reference"))
        assert float(row.sum()) == pytest.approx(0.3 * (d - q))


@pytest.mark.parametrize("granularity", ["token", "sentence", "sequence", "shaping"])
def test_pi_dpo_equal_to_pi_ref_rewards_nothing(granularity):
    lms = three() | {"dpo": exact_lm(3)}
    token = TokenReward(granularity=granularity)
    _, reward, _ = judged(RTO(token_reward=token, rollouts=ONCE), **of(lms))
    _, plain, _ = judged(RTO(token_reward=TokenReward(dpo_scale=0.0), rollouts=ONCE), **of(three()))
    assert torch.equal(reward, plain)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_totals_of_the_granularities(clip):
    """`shaping` has PPO's return for every trajectory; `sentence` and `sequence` have RTO's."""

    def totals(**token):
        _, reward, _ = judged(RTO(token_reward=TokenReward(dpo_clip=clip, **token), rollouts=ONCE), **of(three()))
        return reward.sum(1), reward

    ppo, rto = totals(dpo_scale=0.0)[0], totals()[0]
    shaped, where = totals(granularity="shaping")
    torch.testing.assert_close(shaped, ppo)
    assert (rto - ppo).abs().min() > 1e-3 and (where - totals(dpo_scale=0.0)[1]).abs().max() > 1e-3
    for granularity in ("sentence", "sequence"):
        torch.testing.assert_close(totals(granularity=granularity)[0], rto)


def test_it_is_ppo_on_the_scorer_logratio_where_nothing_is_clipped():
    """The token reward by another road: `LogRatio` beside R, in PPO."""
    lms = three()
    _, wanted, _ = judged(RTO(token_reward=PLAIN, rollouts=ONCE), **of(lms))
    ppo = PPO(kl=KLControl(kl_coef=0.01), rollouts=ONCE)
    scorer = LogRatio(beta=0.3, policy=lms["dpo"], reference=lms["reference"])
    step = make_step(ppo, COMPLETIONS, REWARDS, lm=lms["policy"], models={"reference": lms["reference"]})
    step.rewarder.scorers["dpo"], seen = scorer, []
    inner = PPO.rewards
    object.__setattr__(ppo, "rewards", lambda e, s: seen.append(inner(ppo, e, s)) or seen[-1])
    step.run([0, 1, 2], train=True)
    torch.testing.assert_close(seen[0], wanted)


def test_rewards_to_go_and_no_advantage():
    """lam = gamma = 1: returns are sums of what comes; no reward and values of 0: no gradient of the policy."""
    objective = RTO(gae=GAE(lam=1.0, whitening="none"), rollouts=ONCE)
    experience, reward, _ = judged(objective, **of(three()))
    returns = RTO.advantages(objective, experience, reward, None).return_NT
    wanted = reward.flip(1).cumsum(1).flip(1) * experience.mask_NT
    torch.testing.assert_close(returns, wanted)
    free = RTO(
        token_reward=TokenReward(dpo_scale=0.0),
        kl=KLControl(kl_coef=0.0),
        value=ValueLoss(vf_coef=0.0),
        gae=GAE(whitening="biased"),
        rollouts=ONCE,
    )
    lm = exact_lm(0)
    step = make_step(free, COMPLETIONS, [[0.0] * 4] * 3, lm=lm)
    torch.nn.init.zeros_(step.state.head.weight)
    step.run([0, 1, 2], train=True)
    assert not gradient(lm).any()


def test_the_floor_of_whitening_is_on_the_variance():
    """Advantages of +-1e-6 keep their size times 1e4: divided by sqrt(1e-8), not by their own deviation."""
    a, mask = rows([[1e-6, -1e-6]]), torch.tensor([[True, True]])
    torch.testing.assert_close(RTO().gae.whitened(a, mask), rows([[1e-2, -1e-2]]))


def test_r_of_spans_stands_on_the_last_token_and_is_clamped():
    given = [[4.0, 5.0, 6.0], [1.0, -3.0], [0.0, -9.0, -9.0, 0.0]]
    token, kl = TokenReward(dpo_scale=0.0), KLControl(kl_coef=0.0)
    _, reward, found = judged(RTO(token_reward=token, kl=kl, rollouts=ONCE), rewards=given)
    wanted = rows([[0, 0, 10.0, 0], [0, -2.0, 0, 0], [0, 0, 0, -10.0]])
    torch.testing.assert_close(reward, wanted)
    assert found.metrics["rto/reward_clamped"] == (2.0, 3.0) and found.metrics["reward"] == (15 - 2 - 18, 3.0)
    seq = SequenceReward(reward_mean=-2.0, reward_std=4.0)
    _, reward, _ = judged(RTO(token_reward=token, kl=kl, sequence_reward=seq, rollouts=ONCE), rewards=given)
    torch.testing.assert_close(reward.sum(1), rows([17 / 4, 0.0, -4.0]))


def test_a_separate_reference_of_the_token_reward():
    lms = three() | {"dpo_reference": exact_lm(7)}
    objective = RTO(token_reward=dataclasses.replace(PLAIN, dpo_reference="elsewhere"), rollouts=ONCE)
    assert objective.models == ("reference", "dpo", "dpo_reference")
    experience, reward, _ = judged(objective, **of(lms))
    p, q, d, o = (
        logps(lms[n], experience.groups[0].prompt_ids, [5, 6, 7]).detach()
        for n in ("policy", "reference", "dpo", "dpo_reference")
    )
    wanted = 0.3 * (d - o) - 0.01 * (p - q) + rows([0.0, 0.0, 1.0])
    torch.testing.assert_close(reward[0, :3], wanted)


# ---- pitfalls


def test_a_cut_off_answer_has_its_reward_on_its_last_token_and_a_penalty_if_asked():
    token, kl = TokenReward(dpo_scale=0.0), KLControl(kl_coef=0.0)
    once = Rollouts(generations=1, missing_eos_penalty=3.0)
    _, reward, found = judged(RTO(token_reward=token, kl=kl, rollouts=once), ended=False)
    torch.testing.assert_close(reward, rows([[0, 0, -2.0, 0], [0, -3.5, 0, 0], [0, 0, 0, -1.0]]))
    assert found.metrics["completions/clipped_ratio"] == (3.0, 3.0)


def test_an_empty_answer_is_dropped():
    experience, _, _ = judged(RTO(rollouts=ONCE), [[[5, 6, 7]], [[]], [[8]]], REWARDS, **of(three()))
    assert experience.groups_N.tolist() == [0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_with_the_sample(value):
    class Bad:
        def score(self, items):
            return [Credit.of_sequence(t, value) for t in items]

    step = make_step(RTO(rollouts=ONCE), COMPLETIONS, REWARDS, **of(three()))
    step.rewarder.scorers["given"] = Bad()
    with pytest.raises(ValueError, match="row 0"):
        step.run([0, 1, 2], train=True)


def test_a_log_ratio_that_is_not_finite_names_its_row():
    experience, _, _ = judged(RTO(rollouts=ONCE), **of(three()))
    experience.stats["dpo"].logp_NT[1, 1] = -math.inf
    step = make_step(RTO(), COMPLETIONS, REWARDS)
    with pytest.raises(ValueError, match="token 1 of an answer to row 1"):
        RTO().rewards(experience, step.state)


def test_defaults_are_the_papers():
    o = RTO()
    assert (o.token_reward.dpo_scale, o.token_reward.dpo_clip, o.kl.kl_coef) == (0.05, 0.05, 0.01)
    assert (o.gae.gamma, o.gae.lam, o.gae.whitening) == (1.0, 0.95, "biased")
    assert (o.policy_loss.clip, o.value.value_clip, o.policy_loss.aggregate) == (0.2, 0.2, "sequence")
    assert o.value.critic_lr_factor * 5e-7 == pytest.approx(9e-6)
    assert (o.rollouts.minibatches, o.rollouts.inner_epochs, o.rollouts.sampling) == (
        1024 // 128,
        1,
        Sampling(max_new_tokens=1024),
    )
    assert (o.sequence_reward.reward_clamp, o.token_reward.granularity) == (10.0, "token")


def test_two_answers_of_one_prompt_are_no_pair():
    """The prompts come from pairs, but the loss of rollouts knows no chosen and rejected."""
    objective = RTO(token_reward=TokenReward(dpo_scale=0.0), rollouts=Rollouts(generations=2))
    step, seen = make_step(objective, [[[5, 6], [7, 8]]], [[0.0, 1.0], [0.0, 2.0]]), []
    object.__setattr__(objective, "loss", lambda s, b, state: seen.append(b) or RTO.loss(objective, s, b, state))
    assert isinstance(step.run([0], train=True), StepResult)
    assert seen[0].pairs_B2 is None


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: TokenReward(dpo_scale=-0.1), "0: off"),
        (lambda: TokenReward(dpo_clip=math.nan), "0: off"),
        (lambda: TokenReward(granularity="word"), "not one of token"),
        (lambda: SequenceReward(reward_std=0.0), "reward_std > 0"),
        (lambda: SequenceReward(reward_mean=math.nan), "finite"),
        (lambda: DPOStage(dpo_epochs=0.0), "dpo_epochs"),
    ],
)
def test_bad_options(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- whole runs


class Low:
    """1 at the end for each id below 40."""

    def score(self, items):
        return [Credit.of_sequence(t, float(sum(i < 40 for i in t.completion_ids))) for t in items]


def run_of(tmp_path, objective, slug="rto", kind="pair", given=None, steps=8, **options):
    lm = exact_lm(0)
    said = ("good", "bad") if kind == "pair" else ()
    examples = [Example(prompt=f"film {row}?", responses=said, kind=kind, row=row) for row in range(4)]
    groups, _ = encode(examples, lm)
    config = LoopConfig(lr=1e-3, batch_size=2, steps=steps)
    run = Run(
        slug=slug,
        objective=objective,
        policy=lm,
        groups=groups,
        held_out=groups[:1],
        config=config,
        out=tmp_path,
        resolve=method,
        progress=False,
        given=given or {},
        **options,
    )
    return run, run.go()


def log_of(run):
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text("utf8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "rto"))} for line in lines]


def test_beta_1_of_0_is_ppo_to_the_bit(tmp_path):
    """On the same prompts, whole runs: weights, log and evaluation."""
    shared = {
        "scorer": {"low": Low()},
        "kl": KLControl(kl_coef=0.01),
        "policy_loss": PolicyLoss(aggregate="sequence"),
        "value": ValueLoss(critic_lr_factor=18.0),
        "rollouts": Rollouts(generations=2, inner_epochs=2, minibatches=2, sampling=Sampling(max_new_tokens=6)),
    }
    off = RTO(token_reward=TokenReward(dpo_scale=0.0), **shared)
    assert off.models == ("reference",) and "dpo" not in off.experience
    one, record = run_of(tmp_path / "rto", off)
    two, _ = run_of(tmp_path / "ppo", PPO(**shared), slug="ppo", kind="prompt")
    assert not record["stages"] and any("is PPO" in note for note in record["notes"])
    for a, b in zip(one.policy.model.parameters(), two.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert log_of(one) == log_of(two)


def test_the_two_stages(tmp_path):
    """Stage 1 trains DPO on the pairs; stage 2 begins from the start, on the pairs' prompts; pi_dpo is frozen."""
    short = Rollouts(generations=1, sampling=Sampling(max_new_tokens=6))
    objective = RTO(scorer=Low(), dpo=DPOStage(dpo_lr=1e-2, dpo_epochs=3, dpo_batch_size=4), rollouts=short)
    run, record = run_of(tmp_path / "run", objective)
    assert [s["stage"] for s in record["stages"]] == ["dpo-model"] and record["updates"] == 3 + 8
    assert all(g.example.kind == "prompt" and not g.traces for g in [*run.groups, *run.held_out])
    assert [g.example.row for g in run.groups] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text("utf8").splitlines()]
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-9)  # the policy is the start, not pi_dpo
    assert lines[0]["rto/dpo_reward"] != 0 and "rto/dpo_clipped" in lines[0]
    start, dpo = exact_lm(0), run.given["dpo"]
    assert any(not torch.equal(a, b) for a, b in zip(start.model.parameters(), dpo.model.parameters()))
    trained, _ = run_of(tmp_path / "dpo", method("dpo")(), slug="dpo")
    assert dpo.identity() != trained.policy.identity()  # other options: it is the stage's own
    assert not any(p.grad is not None for p in dpo.model.parameters())


def test_prompts_and_models_of_ones_own(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"book {n}?"}) + "\n" for n in range(3)), "utf8")
    short = Rollouts(generations=1, sampling=Sampling(max_new_tokens=6, temperature=0.5))
    saved = tmp_path / "dpo"
    exact_lm(5).save(saved)
    objective = RTO(scorer=Low(), dpo=DPOStage(prompts=str(path), dpo_model=str(saved)), rollouts=short)
    run, record = run_of(tmp_path / "run", objective)
    assert [g.example.prompt for g in run.groups] == [f"book {n}?" for n in range(3)]
    assert record["stages"] == [] and run.given["dpo"].identity()["weights"] == exact_lm(5).identity()["weights"]
    assert any("sample at temperature 1" in note for note in record["notes"])
    long = dataclasses.replace(short, sampling=Sampling(max_new_tokens=10 * run.policy.context))
    run, record = run_of(tmp_path / "long", dataclasses.replace(objective, rollouts=long), steps=0)
    asked = [run.policy.encode_prompt(g.example.prompt) for g in run.groups]
    assert [g.prompt_ids for g in run.groups] == asked, "answers as long as the context leave half of it to prompts"
    mine = exact_lm(9)
    run, _ = run_of(tmp_path / "given", dataclasses.replace(objective, dpo=DPOStage()), given={"dpo": mine})
    assert run.given["dpo"] is mine
