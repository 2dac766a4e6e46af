"""T-REG: by hand, every identity of its specification through a real pass, its preparation, and bad input."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.data import Group, encode
from pertoken.core.examples import Example
from pertoken.core.loop import LoopConfig
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.train._preference import length_normalized_rewards, log_sigmoid_loss
from pertoken.train.dpo import DPO
from pertoken.train.t_reg import TReg, regularizer, t_reg_loss, token_reward_from_logratio
from tests import tiny
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats
from tests.methods.test_logratio import flat_logps

MODELS = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
GROUPS = tiny.groups(MODELS["policy"], n=4)


def one_pass(objective, groups=GROUPS, rhat=None, models=MODELS):
    """Loss, statistics, batch and the column of one real pass; a random column unless one is given."""
    stats, batch = pair_stats(objective, models, groups)
    mask = stats["policy"].mask_NT
    columns = TReg.example_columns(np.random.default_rng(0), mask)
    if rhat is not None:
        columns = {"token_reward": torch.full(mask.shape, float(rhat), dtype=torch.float64)}
    batch = Batch(batch.pairs_B2, columns, rows=batch.rows)
    return objective.loss(stats, batch), stats, batch, columns["token_reward"]


def tensors(logp, mask=None, ref=None, rhat=None, rows=()):
    """Statistics and a batch of one pair, given by hand."""
    logp = torch.tensor(logp, dtype=torch.float64)
    mask = torch.ones(logp.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    ref = torch.zeros_like(logp) if ref is None else torch.tensor(ref, dtype=torch.float64)
    columns = {} if rhat is None else {"token_reward": torch.tensor(rhat, dtype=torch.float64)}
    stats = {"policy": Stats(mask, logp, mask), "reference": Stats(mask, ref, mask)}
    return stats, Batch(torch.tensor([[0, 1]]), columns, rows=rows)


# ---- arithmetic


def test_by_hand():
    stats, batch = tensors([[-1, -2], [-3, -1]], ref=[[-2, -2], [-1, -1]], rhat=[[0.2, -0.1], [-0.4, 0.3]])
    margin = 0.5 * ((1 + 0) - (-2 + 0))
    w = 1 / (1 + math.exp(margin))
    reg_w, reg_l = -0.5 * (-0.2 + 0.2), -0.5 * (1.2 - 0.3)
    expected = math.log1p(math.exp(-margin)) + 0.25 * w * (reg_w + reg_l)
    loss = TReg(beta=0.5).loss(stats, batch)
    assert (loss.sum.item(), loss.count) == (pytest.approx(expected, abs=1e-12), 1)
    shown = means(loss)
    assert (shown["reg/weight"], shown["reg/rejected"]) == pytest.approx((w, reg_l))
    assert shown["reg/chosen"] == pytest.approx(reg_w) and shown["reg/token_reward"] == pytest.approx(0.25)
    assert shown["rewards/margins"] == pytest.approx(margin)


def test_options_that_are_not_finite():
    for options in ({"alpha": math.inf}, {"beta": math.inf}, {"gamma": math.nan}):
        with pytest.raises(ValueError, match="must be a finite number"):
            TReg(**options)
    with pytest.raises(ValueError, match="gamma=-3: a target margin is not negative"):
        TReg(base="simpo", beta=2.0, gamma=-3)


def test_by_hand_simpo():
    stats, batch = tensors([[-1, -2], [-3, 0]], mask=[[True, True], [True, False]], rhat=[[0.2, -0.4], [-0.4, 9]])
    margin = 2 * (-1.5) - 2 * (-3) - 0.8
    w = 1 / (1 + math.exp(margin))
    regs = -2 * (-0.2 + 0.8) / 2 + -2 * 1.2 / 1
    loss = TReg(base="simpo", beta=2, gamma=0.8, alpha=0.5).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-margin)) + 0.5 * w * regs, abs=1e-12)


def test_switches():
    margin, reg = torch.tensor([0.7]), torch.tensor([0.3])
    base = log_sigmoid_loss(margin)
    assert t_reg_loss(margin, reg, 0.5, "static").item() == pytest.approx((base + 0.5 * 0.3).item())
    assert t_reg_loss(margin, reg, 0.5).item() == pytest.approx((base + 0.5 * torch.sigmoid(-margin) * 0.3).item())
    stats, batch = tensors([[-1.0], [-3.0]], rhat=[[0.2], [0.4]])
    both, chosen = (TReg(scope=scope, weight="static").loss(stats, batch).sum for scope in ("both", "chosen"))
    dpo = DPO().loss(stats, batch).sum
    assert (chosen - dpo).item() == pytest.approx(0.25 * 0.1 * 0.2)
    assert (both - chosen).item() == pytest.approx(0.25 * 0.1 * 1.2)
    assert means(TReg(weight="static").loss(stats, batch))["reg/weight"] == 1
    assert means(TReg().loss(stats, batch))["reg/weight"] == pytest.approx(1 / (1 + math.exp(0.1 * 2)))


def test_the_weight_has_no_gradient():
    margin = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    reg = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    d_margin, d_reg = torch.autograd.grad(t_reg_loss(margin, reg, 0.5).sum(), [margin, reg])
    w = torch.sigmoid(-margin.detach())
    torch.testing.assert_close(d_margin, -w)
    torch.testing.assert_close(d_reg, 0.5 * w)


def test_masked_tokens_and_nan_beyond_the_end_do_not_count():
    logp = torch.tensor([[-1.0, -7.0, -3.0, 0.0]], requires_grad=True)
    rhat = torch.tensor([[0.5, 0.5, -0.5, float("nan")]])
    mask = torch.tensor([[True, False, True, False]])
    value = regularizer(logp, rhat, mask, beta=2.0)
    assert value.tolist() == [-2.0 * (-0.5 + 1.5)]
    (slope,) = torch.autograd.grad(value.sum(), logp)
    assert slope.tolist() == [[-1.0, 0.0, 1.0, 0.0]]
    assert regularizer(logp, rhat, mask, beta=2.0, mean=True).tolist() == [-1.0]


def test_token_reward_from_logratio():
    a, b = torch.tensor([-1.0, -2.0, -0.1]), torch.tensor([-2.0, -1.0, -0.1])
    got = token_reward_from_logratio(a, b)
    torch.testing.assert_close(got, torch.sigmoid(a - b) - 0.5)
    assert torch.equal(got, -token_reward_from_logratio(b, a)) and got.abs().max() < 0.5
    far = token_reward_from_logratio(torch.tensor([0.0, -40.0, -3e4]), torch.tensor([-40.0, 0.0, 0.0]))
    assert far.abs().max() <= 0.5 and torch.isfinite(far).all()
    with pytest.raises(ValueError, match=r"token \(1,\)"):
        token_reward_from_logratio(a, torch.tensor([-1.0, float("-inf"), -1.0]))
    assert not token_reward_from_logratio(a.clone().requires_grad_(), b).requires_grad


# ---- identities, through a real pass in float64


def test_the_gradient_is_dpos_with_tilted_token_weights():
    alpha, beta, policy = 0.5, 0.1, MODELS["policy"]
    loss, stats, batch, rhat = one_pass(TReg(alpha=alpha, beta=beta))
    logp, mask = stats["policy"].logp_NT, stats["policy"].mask_NT
    rewards = beta * (stats["policy"].sums() - stats["reference"].sums())
    w = torch.sigmoid(rewards[batch.rejected] - rewards[batch.chosen]).detach()
    tilted = [((1 + sign * alpha * rhat) * logp * mask).sum(1) for sign in (1, -1)]
    expected = -beta * w * (tilted[0][batch.chosen] - tilted[1][batch.rejected])
    got = gradient(loss.sum, policy)
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got, gradient(expected.sum(), policy), atol=1e-9, rtol=0)


def test_the_gradient_of_simpo_reg():
    alpha, beta, gamma, policy = 0.5, 2.0, 0.8, MODELS["policy"]
    loss, stats, batch, rhat = one_pass(TReg(base="simpo", alpha=alpha, beta=beta, gamma=gamma))
    assert set(stats) == {"policy"}
    logp, mask = stats["policy"].logp_NT, stats["policy"].mask_NT
    means_ = [((1 + s * alpha * rhat) * logp * mask).sum(1) / mask.sum(1) for s in (1, 0, -1)]
    r = beta * means_[1].detach()
    w = torch.sigmoid(r[batch.rejected] - r[batch.chosen] + gamma)
    expected = -beta * w * (means_[0][batch.chosen] - means_[2][batch.rejected])
    torch.testing.assert_close(gradient(loss.sum, policy), gradient(expected.sum(), policy), atol=1e-9, rtol=0)


def assert_same_to_the_bit(ours, theirs):
    assert torch.equal(ours.sum, theirs.sum) and ours.count == theirs.count
    assert torch.equal(gradient(ours.sum, MODELS["policy"]), gradient(theirs.sum, MODELS["policy"]))
    shown = means(ours)
    assert {name: shown[name] for name in means(theirs)} == means(theirs)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0.25, "rhat": 0.0}], ids=["alpha=0", "rhat=0"])
def test_dpo_to_the_bit(options):
    rhat = options.pop("rhat", None)
    loss, stats, batch, _ = one_pass(TReg(beta=0.3, **options), rhat=rhat)
    assert_same_to_the_bit(loss, DPO(beta=0.3).loss(stats, batch))


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0.25, "rhat": 0.0}], ids=["alpha=0", "rhat=0"])
def test_simpo_to_the_bit(options):
    rhat = options.pop("rhat", None)
    loss, stats, batch, _ = one_pass(TReg(base="simpo", beta=2.0, gamma=0.7, **options), rhat=rhat)
    rewards = length_normalized_rewards(stats, 2.0)
    expected = log_sigmoid_loss(rewards[batch.chosen] - rewards[batch.rejected] - 0.7)
    assert torch.equal(loss.sum, expected.sum())
    if importlib.util.find_spec("pertoken.train.simpo"):
        assert_same_to_the_bit(loss, catalog.method("simpo")(beta=2.0, gamma=0.7).loss(stats, batch))


def test_alpha_0_needs_no_column():
    stats, batch = pair_stats(TReg(), MODELS, GROUPS)
    assert torch.isfinite(TReg(alpha=0.0).loss(stats, batch).sum)
    with pytest.raises(ValueError, match="'token_reward'"):
        TReg().loss(stats, batch)


def test_sft_baseline_adds_the_chosen_log_likelihood():
    stats, batch = tensors([[-1.0, -2.0], [-3.0, -1.0]], rhat=[[1, 1], [0, 0]])
    difference = TReg(weight="static", alpha=1.0).loss(stats, batch).sum - DPO().loss(stats, batch).sum
    assert difference.item() == pytest.approx(0.1 * 3.0)


# ---- bad input


def test_identical_pair_has_weight_one_half():
    same = [[pair[0], pair[0]] for pair in GROUPS]
    dpo, _, _, _ = one_pass(TReg(alpha=0.0), same)
    assert gradient(dpo.sum, MODELS["policy"]).abs().max() < 1e-12
    loss, _, _, _ = one_pass(TReg(), same, rhat=0.3)
    assert means(loss)["reg/weight"] == pytest.approx(0.5, abs=1e-12)
    assert gradient(loss.sum, MODELS["policy"]).abs().max() > 1e-3


@pytest.mark.parametrize("base", ["dpo", "simpo"])
def test_empty_response(base):
    stats, batch = tensors([[-1.0], [0.0]], mask=[[True], [False]], rhat=[[0.2], [0.0]])
    loss = TReg(base=base).loss(stats, batch)
    assert torch.isfinite(loss.sum) and means(loss)["reg/rejected"] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_infinite_log_probs_raise_with_the_token(alpha):
    inf = float("-inf")
    stats, batch = tensors([[-1, -2], [-3, inf]], rhat=[[0, 0], [0, 0]], rows=(7, 8))
    with pytest.raises(ValueError, match=r"policy's log-prob of token 1 of row 8 is -inf"):
        TReg(alpha=alpha).loss(stats, batch)
    stats, batch = tensors([[-1, -2], [-3, 0]], ref=[[inf, 0], [0, 0]], rhat=[[0, 0], [0, 0]])
    with pytest.raises(ValueError, match=r"reference's log-prob of token 0 of completion 0"):
        TReg(alpha=alpha).loss(stats, batch)
    stats, batch = tensors([[-1, inf], [-3, 0]], mask=[[True, False], [True, True]], rhat=[[0, 0], [0, 0]])
    assert torch.isfinite(TReg(alpha=alpha).loss(stats, batch).sum)  # not emitted: does not count


def test_options():
    for name in ("base", "weight", "token_reward", "scope"):
        options: dict[str, Any] = {name: "other"}
        with pytest.raises(ValueError, match=f"{name}='other' is not one of"):
            TReg(**options)
    wrongs: list[dict[str, Any]] = [{"beta": 0.0}, {"alpha": -0.1}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TReg(**wrong)
    assert (TReg().models, TReg(base="simpo").models) == (("reference",), ())
    assert len(TReg.__dataclass_fields__) <= 10


def test_example_columns():
    mask = torch.tensor([[True, True, False]])
    column = TReg.example_columns(np.random.default_rng(0), mask)["token_reward"]
    assert column.shape == (1, 3) and column[0, :2].abs().min() > 0 and column.abs().max() < 0.5 and column[0, 2] == 0


# ---- preparation


@pytest.fixture
def run(tmp_path):
    """A run on real (tiny) data; `.objective` is set by the test."""
    lm = tiny.lm(0, dtype=torch.float32)
    rows = [("how was the film", "great", "a dull one"), ("how was the plot", "I loved it", "not great")]
    examples = [Example(prompt=p, responses=(w, l), row=10 + i) for i, (p, w, l) in enumerate(rows)]
    groups, _ = encode(examples, lm)
    config = LoopConfig(epochs=1, batch_size=2, lr=1e-2)
    return Run(
        slug="t-reg", objective=None, policy=lm, groups=groups[:1], held_out=groups[1:], config=config,
        out=tmp_path / "out", resolve=catalog.method, progress=False,
    )  # fmt: skip


def column(run):
    return [v for group in run.every for v in group.columns["token_reward"]]


def test_contrastive_rewards_are_computed_once(run):
    TReg().prepare(run)
    first = column(run)
    assert [len(v) for v in first] == [len(t) for g in run.every for t in g.traces]
    assert 0 < max(np.abs(v).max() for v in first) < 0.5
    TReg().prepare(run)
    assert all(np.array_equal(a, b) for a, b in zip(first, column(run)))
    assert [r["reused"] for r in run.stages.records] == [False, True]
    assert "mean |rhat|" in run.notes[0]


def test_nested_options_reach_the_scorer(run):
    swapped = []
    for better, worse in (("{question} Praise!", "{question} Blame!"), ("{question} Blame!", "{question} Praise!")):
        TReg(contrastive=TReg().contrastive.__class__(better=better, worse=worse)).prepare(run)
        swapped.append(column(run))
    assert all(np.array_equal(a, -b) and np.abs(a).max() > 0 for a, b in zip(*swapped))


def with_an_observation(run):
    """Gives the first pair a chosen response in whose middle are two tokens that the policy did not emit."""
    group = run.groups[0]
    tool = run.policy.trace_of_ids(group.prompt_ids, [7, 8, 9, 10, 11], emitted=(True, False, False, True, True))
    run.groups[0] = Group(example=group.example, prompt_ids=group.prompt_ids, traces=(tool, group.traces[1]))


@pytest.mark.parametrize(
    ("options", "beta"), [({"beta": 0.3}, 0.3), ({"base": "simpo", "beta": 2.0}, 0.1)], ids=["dpo", "simpo"]
)
def test_rewards_of_a_dpo_model(run, options, beta):
    with_an_observation(run)
    start = run.policy.clone()
    TReg(token_reward="dpo", **options).prepare(run)
    trained = run.train("dpo", beta=beta)  # SimPO's beta is of another scale and not handed on
    assert run.stages.records[-1]["reused"] and run.stages.records[-1]["stage"].startswith("dpo")
    traces = [t for g in run.every for t in g.traces]
    moved = [flat_logps(trained, t) - flat_logps(start, t) for t in traces]
    assert all(np.abs(m).min() > 1e-3 for m in moved)
    for trace, ratio, values in zip(traces, moved, column(run), strict=True):
        expected = np.where(trace.mask, 0.5 * np.tanh(0.5 * ratio), 0.0)
        np.testing.assert_allclose(values, expected, atol=2e-5)
    assert column(run)[0][1:3].tolist() == [0, 0]


def test_sft_rewards(run):
    TReg(token_reward="sft").prepare(run)
    for group in run.every:
        assert [set(v) for v in group.columns["token_reward"]] == [{1.0}, {0.0}]


def test_any_callable_is_a_scorer(run):
    TReg(scorer=lambda trace: np.arange(len(trace)) / 100).prepare(run)
    assert all(np.allclose(v, np.arange(len(v)) / 100) for v in column(run))
    with_an_observation(run)
    TReg(scorer=lambda trace: np.arange(len(trace)) / 100).prepare(run)
    np.testing.assert_allclose(column(run)[0], [0, 0, 0, 0.03, 0.04])  # what was not emitted has no reward


def test_credit_from_the_data(run):
    with pytest.raises(ValueError, match=r"which row 10 lacks; .*add_column"):
        TReg(token_reward="credit").prepare(run)
    for group in run.every:
        group.add_column("token_reward", [np.full(len(t), 0.001) for t in group.traces])
    TReg(token_reward="credit").prepare(run)
    assert "nearly inert" in run.notes[-1] and "mean |rhat| 0.0010" in run.notes[-2]
    run.groups[0].add_column("token_reward", [1.0, 2.0])  # a number a response is no token reward
    with pytest.raises(ValueError, match="row 10"):
        TReg(token_reward="credit").prepare(run)


def test_credit_that_was_read_with_the_data(run):
    for i, group in enumerate(run.every):
        extra = {"token_reward": [[0.1 * i] * len(t) for t in group.traces]}
        object.__setattr__(group, "example", Example(**{**vars(group.example), "extra": extra}))
    TReg(token_reward="credit").prepare(run)
    assert column(run)[3] == [0.1] * len(run.every[1].traces[1])


def test_a_beta_of_dpos_scale_is_reported_for_simpo(run):
    TReg(base="simpo", token_reward="sft").prepare(run)
    assert "SimPO's is 2 to 10" in run.notes[0]


def test_alpha_0_prepares_nothing(run):
    TReg(alpha=0.0).prepare(run)
    assert run.stages.records == [] and run.notes == [] and not any("token_reward" in g.columns for g in run.every)


def test_odd_pairs_are_reported(run):
    group = run.groups[0]
    lm, example = run.policy, group.example
    some, none = (lm.trace_of_ids(group.prompt_ids, ids) for ids in ([5, 6], []))
    run.groups = [
        Group(example=example, prompt_ids=group.prompt_ids, traces=traces) for traces in ((some, none), (some, some))
    ]
    run.held_out = []
    TReg().prepare(run)
    assert len(run.notes[0]) and any("empty response in 1 pairs (row 10" in n for n in run.notes)
    assert any("identical responses in 1 pairs (row 10" in n for n in run.notes)
