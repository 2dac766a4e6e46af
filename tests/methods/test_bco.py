"""BCO: by hand, the bound, every identity of its specification, the shift's rules, matching, and bad input."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false, reportCallIssue=false

import copy
import dataclasses
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pertoken import catalog
from pertoken.core.data import encode, load_examples
from pertoken.core.loop import LoopConfig, fit
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.core.step import ObjectiveStep
from pertoken.train.bco import BCO, Matching, Shift, bco_loss, density_ratio, desirable_probability
from tests import tiny
from tests.core.training import config, make_groups
from tests.methods.by_hand import gradient, labels, mean, pairs, stats
from tests.methods.one_pass import exact_lm


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def given(*rewards, beta=0.1):
    """Completions of two tokens with these rewards; the reference is -1 a token."""
    return {
        "policy": stats(*([r / beta - 1.0, -1.0] for r in rewards)),
        "reference": stats(*([-1.0, -1.0] for _ in rewards)),
    }


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def up_down(*values):
    return torch.tensor(values, dtype=torch.bool)


# ---- the loss


def test_by_hand():
    """Rewards 2, 0 (up) and -1 (down, weighing 3): class means 1 and -1, so delta = 0 on the first batch."""
    objective = BCO()
    s, batch = given(2, 0, -1), labels(True, True, False)
    batch = dataclasses.replace(batch, columns={"prompt_weight": f64(7, 7, 3)})
    loss = objective.loss(s, batch, objective.init_state(None))
    wanted = -log_sigmoid(2) - log_sigmoid(0) - 3 * log_sigmoid(1)
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-12) and loss.count == 3
    shown = {"rewards/chosen": 1, "rewards/rejected": -1, "logps/chosen": (18 + -2) / 2, "logps/rejected": -12}
    shown |= {"delta": 0, "rewards/saturated": 0}
    assert {name: mean(loss, name) for name in loss.metrics} == pytest.approx(shown)


def test_gradient_by_hand():
    """-beta s(delta - r) up, and beta w s(r - delta) down, on every token; none through delta."""
    objective = BCO(beta=0.5)
    s, batch = given(3, -2, beta=0.5), labels(True, False)
    batch = dataclasses.replace(batch, columns={"prompt_weight": f64(1, 2)})
    found = gradient(objective.loss(s, batch, objective.init_state(None)), s["policy"])
    s_of = lambda x: 1 / (1 + math.exp(-x))
    wanted = [[-0.5 * s_of(0.5 - 3)] * 2, [0.5 * 2 * s_of(-2 - 0.5)] * 2]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_the_bound_holds_for_every_pair_and_shift_and_is_tightest_between():
    """-log s(r_w - r_l) < -log s(r_w - d) - log s(-(r_l - d)), all by numpy but the right side."""
    rng = np.random.default_rng(0)
    for r_w, r_l in rng.normal(0, 3, (20, 2)):
        dpo = np.log1p(np.exp(-(r_w - r_l)))
        shifts = (r_w + r_l) / 2 + np.linspace(-6, 6, 81)
        rewards = f64(r_w, r_l)
        found = [bco_loss(rewards, up_down(True, False), float(d)).sum().item() for d in shifts]
        assert min(found) > dpo
        assert np.argmin(found) == 40, "the midpoint"


def test_without_a_shift_paired_data_is_trls_bco_pair():
    """TRL 1.16, trainer/dpo_trainer.py: -logsigmoid(beta chosen_logratios) - logsigmoid(-beta rejected_logratios)."""
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64) * 30
    theirs = -F.logsigmoid(0.1 * chosen) - F.logsigmoid(-0.1 * rejected)
    rows = torch.stack([chosen, rejected], 1).flatten()
    s = {"policy": stats(*([x] for x in rows.tolist())), "reference": stats(*([0.0] for _ in rows))}
    loss = BCO(shift="none", udm=False).loss(s, labels(*[True, False] * 6))
    torch.testing.assert_close(loss.sum, theirs.sum(), rtol=1e-12, atol=0)
    assert loss.count == 12 and "delta" not in loss.metrics


def test_trls_trainer_with_its_running_mean_and_weights():
    """TRL 0.24, trainer/bco_trainer.py, its batch written out: the mean of all rewards first, then the two losses."""
    torch.manual_seed(1)
    objective, state = BCO(shift="running_mean"), Shift("running_mean")
    seen = torch.zeros(0, dtype=torch.float64)
    for label in ([True, False, False, True, True], [False, False, True], [True, True]):
        r, w, up = (
            torch.randn(len(label), dtype=torch.float64),
            torch.rand(len(label), dtype=torch.float64),
            up_down(*label),
        )
        seen = torch.cat([seen, r])
        delta = seen.mean()
        losses = torch.cat([-F.logsigmoid(r[up] - delta), w[~up] * -F.logsigmoid(-(r[~up] - delta))])
        batch = Batch(None, {"prompt_weight": w}, up)
        loss = objective.loss(given(*r.tolist()), batch, state)
        assert loss.sum.item() / loss.count == pytest.approx(losses.nanmean().item(), rel=1e-9)
        assert mean(loss, "delta") == pytest.approx(delta.item(), rel=1e-9)


@pytest.mark.parametrize("shift", ["class_balanced_ema", "running_mean", "none"])
def test_policy_that_is_the_reference(shift):
    objective = BCO(shift=shift, udm=False)
    state = objective.init_state(None)
    loss = objective.loss(given(0, 0, 0, 0), labels(True, True, True, False), state)
    assert mean(loss) == pytest.approx(math.log(2), abs=1e-12)
    assert state is None or state.delta().item() == 0
    assert objective.batch_coupled == (state is not None)


def test_matching_that_says_half_everywhere_is_no_matching():
    w = density_ratio(np.full(4, 0.5))
    np.testing.assert_allclose(w, 1, atol=2.1e-8, rtol=0)
    s, label = given(1, -2, 3, 0.5), up_down(True, False, False, True)
    plain = BCO(udm=False).loss(s, Batch(None, {}, label), Shift()).sum
    weighted = BCO().loss(s, Batch(None, {"prompt_weight": torch.tensor(w)}, label), Shift()).sum
    torch.testing.assert_close(weighted, plain, atol=1e-7, rtol=0)


def test_weights_are_of_thumbs_down_alone_and_constant():
    r, label = f64(1, -1), up_down(True, False)
    w = f64(5, 3).requires_grad_()
    found = bco_loss(r, label, 0.0, w)
    assert found.tolist() == pytest.approx([-log_sigmoid(1), -3 * log_sigmoid(1)]) and not found.requires_grad


def test_very_long_completions_stay_finite_and_are_reported():
    s, label = given(60, -60, 60, -60, 1), up_down(True, False, False, True, True)
    loss = BCO(shift="none", udm=False).loss(s, Batch(None, {}, label))
    assert loss.sum.item() == pytest.approx(120 + -log_sigmoid(1))
    assert mean(loss, "rewards/saturated") == 4 / 5
    found = gradient(loss, s["policy"])[:, 0]
    assert torch.isfinite(found).all() and found[:2].abs().max() < 1e-20 and found[2].item() == pytest.approx(0.1)


# ---- the shift


def test_the_moving_average_by_hand():
    """m_c begins as the first batch mean of class c, then 0.9 m_c + 0.1 batch mean; an absent class keeps its own."""
    state = Shift(decay=0.9)
    assert state.delta().item() == 0
    state.update(f64(2, 4), up_down(True, True))
    assert state.mean_C.tolist() == [0, 3] and state.delta().item() == 1.5, "a class never seen counts as 0"
    state.update(f64(-1, 1), up_down(False, True))
    assert state.mean_C.tolist() == pytest.approx([-1, 0.9 * 3 + 0.1 * 1])
    state.update(f64(-3), up_down(False))
    assert state.mean_C.tolist() == pytest.approx([0.9 * -1 + 0.1 * -3, 2.8])
    assert state.delta().item() == pytest.approx((-1.2 + 2.8) / 2) and state.count_C.tolist() == [2, 3]


def test_the_first_batch_has_its_own_balanced_mean_whatever_its_counts():
    rewards, label = f64(1, 1, 1, 1, -3), up_down(True, True, True, True, False)
    for kind, wanted in (("class_balanced_ema", -1), ("running_mean", 1 / 5)):
        state = Shift(kind)
        state.update(rewards, label)
        assert state.delta().item() == pytest.approx(wanted)


def test_delta_gets_no_gradient():
    s = given(1, -2)
    state = Shift()
    BCO(udm=False).loss(s, labels(True, False), state)
    assert not state.delta().requires_grad and not any(b.requires_grad for b in state.buffers())
    assert not list(state.parameters())


def test_evaluation_takes_the_stored_shift_and_changes_nothing():
    state = Shift()
    state.update(f64(4, 2), up_down(True, False))
    before = copy.deepcopy(state.state_dict())
    loss = BCO(udm=False).loss(given(1, -1), labels(True, False), state.eval())
    assert mean(loss, "delta") == 3 and loss.sum.item() == pytest.approx(-log_sigmoid(-2) - log_sigmoid(4))
    assert all(torch.equal(before[k], v) for k, v in state.state_dict().items())


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("shift", ["class_balanced_ema", "running_mean", "none"])
def test_a_batch_of_one_class(shift, label):
    objective = BCO(shift=shift, udm=False)
    state = objective.init_state(None)
    s = given(2, 1)
    loss = objective.loss(s, labels(label, label), state)
    delta = {"class_balanced_ema": 0.75, "running_mean": 1.5, "none": 0}[shift]
    sign = 1 if label else -1
    assert loss.sum.item() == pytest.approx(-log_sigmoid(sign * (2 - delta)) - log_sigmoid(sign * (1 - delta)))
    assert torch.isfinite(gradient(loss, s["policy"])).all()


def test_a_reward_that_is_not_finite_does_not_spoil_the_shift():
    """The loop saves the state before such an update."""
    state = Shift()
    state.update(f64(1, -1), up_down(True, False))
    for bad in (math.nan, math.inf):
        state.update(f64(bad, 5), up_down(True, False))
        assert state.mean_C.tolist() == [-1, 1] and state.count_C.tolist() == [1, 1]


def test_sums_and_counts_are_shared_over_processes(monkeypatch):
    """Two processes have the shift of one with all rows; one without rows of its own is left out."""
    rewards, label = f64(3, 1, -1, 5, 9), up_down(True, True, False, False, True)
    alone = Shift()
    alone.update(rewards[:4], label[:4])
    parts = [(rewards[:3], label[:3], True), (rewards[3:4], label[3:4], True), (rewards[4:], label[4:], False)]
    sent = []

    def send(*values):
        sent.append(values)
        return values

    for call in (send, lambda *values: [sum(of_each) for of_each in zip(*sent, strict=True)]):
        monkeypatch.setattr("pertoken.train.bco.summed", call)
        for part in parts:
            state = Shift()
            state.update(*part)
            if call is not send:
                assert torch.equal(state.mean_C, alone.mean_C) and torch.equal(state.count_C, alone.count_C)
    assert len(sent) == 3


def step(shift="class_balanced_ema"):
    lm = exact_lm()
    groups = make_groups(lm, 12, "unpaired", reference=exact_lm(1))
    objective = BCO(shift=shift, udm=False)
    return ObjectiveStep(objective, lm, groups[:9], held_out=groups[9:], max_tokens=40)


@pytest.mark.parametrize("shift", ["class_balanced_ema", "running_mean"])
def test_delta_and_counts_survive_saving_and_loading(tmp_path, shift):
    """The loop resumes a run to the same shift, and evaluates with the stored one."""
    whole, half = step(shift), step(shift)
    history = fit(whole, config(epochs=2, eval_every=2), tmp_path / "whole", progress=False)
    settings = config(epochs=2, eval_every=2, save_every=2)
    half_run, calls = half.run, []

    def stop(rows, *, train):
        calls.append(rows)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return half_run(rows, train=train)

    half.run = stop
    with pytest.raises(KeyboardInterrupt):
        fit(half, settings, tmp_path / "half", progress=False)
    again = step(shift)
    assert again.state is not None and whole.state is not None and not again.state.count_C.any()
    resumed = fit(again, settings, tmp_path / "half", resume=True, progress=False)
    assert torch.equal(again.state.mean_C, whole.state.mean_C) and torch.equal(again.state.count_C, whole.state.count_C)
    assert [r["delta"] for r in resumed] == [r["delta"] for r in history] and history[-1]["delta"] != 0
    assert history[-1]["eval_delta"] == history[-1]["delta"] and whole.state.count_C.sum() == 2 * 9


# ---- matching


def test_density_ratio_by_hand_and_its_clip():
    found = density_ratio(np.array([0.75, 0.25, 0.0, 1.0, 0.9]), 0.4, 10)
    np.testing.assert_allclose(found, [3, 0.4, 0.4, 10, 9], rtol=1e-7)
    assert density_ratio(np.array([1.0]), 0, np.inf) == pytest.approx(1e8)


def test_the_classifier_sees_balanced_classes():
    """Two points, each at both labels: the ratio of the densities is found whatever the number of rows of a label."""
    a, b = np.array([[5.0, 0.0]]), np.array([[0.0, 5.0]])
    up, down = np.concatenate([a.repeat(75, 0), b.repeat(25, 0)]), np.concatenate([a.repeat(100, 0), b.repeat(300, 0)])
    odds = density_ratio(desirable_probability(up, down, np.concatenate([a, b])), 0, np.inf)
    np.testing.assert_allclose(odds, [0.75 / 0.25, 0.25 / 0.75], rtol=0.05)


def by_topic(texts):
    """Vectors of a frozen encoder: the topic, far from 0, and a constant."""
    return np.array([[10.0 * ("film" in t), 10.0 * ("shop" in t), 1.0] for t in texts])


def run_of(tmp_path, rows, n_held_out=2, **options):
    lm = tiny.lm()
    groups, _ = encode(load_examples(rows, kind="unpaired")[0], lm)
    objective = BCO(**({"encode": by_topic} | options))
    return Run(
        slug="bco", objective=objective, policy=lm, groups=groups[: len(groups) - n_held_out],
        held_out=groups[len(groups) - n_held_out :], config=LoopConfig(lr=1e-3, batch_size=4, steps=2),
        out=tmp_path / "out", resolve=catalog.method, progress=False,
    )  # fmt: skip


def row(topic, label, i=0):
    return {"prompt": f"the {topic} {i}?", "completion": f"it was {i}", "label": label}


SHIFTED = [row("film", True, i) for i in range(30)] + [row("shop", True, i) for i in range(10)]
SHIFTED += [row("film", False, i) for i in range(3)] + [row("shop", False, i) for i in range(9)]
HELD_OUT = [row("film", False, 50), row("shop", True, 51)]


def test_preparation_weighs_thumbs_down_by_the_ratio_of_the_prompts(tmp_path):
    """Film: 3/4 of the thumbs up, 1/4 of the thumbs down, so w = 3; shop: 1/3, clipped at 0.5."""
    run = run_of(tmp_path, SHIFTED + HELD_OUT)
    run.objective.prepare(run)
    weights = [g.columns["prompt_weight"] for g in run.every]
    assert weights[:40] == [1.0] * 40 and weights[-1] == 1.0
    assert [weights[i] for i in (40, 42, -2)] == pytest.approx([3] * 3, rel=0.1) and set(weights[43:52]) == {0.5}
    assert len(run.notes) == 1 and "40 thumbs up, 12 thumbs down" in run.notes[0] and "75% at the clip" in run.notes[0]
    again = run_of(tmp_path, SHIFTED + HELD_OUT)
    again.objective.prepare(again)
    assert [r["reused"] for r in again.stages.records] == [True]
    assert [g.columns["prompt_weight"] for g in again.every] == weights


def test_the_weights_reach_the_loss_through_the_loop(tmp_path):
    run = run_of(tmp_path, SHIFTED + HELD_OUT)
    record = run.go()
    assert math.isfinite(record["final"]["loss"]) and record["final"]["rewards/saturated"] == 0
    assert "bco-matching" in [s["stage"] for s in record["stages"]]


def test_prompts_are_embedded_as_words_of_the_user_alone(tmp_path):
    seen = []

    def watch(texts):
        seen.extend(texts)
        return by_topic(texts)

    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "the film?"}]
    turns += [{"role": "assistant", "content": "A"}, {"role": "user", "content": "and?"}]
    rows = [row("shop", True), {**row("shop", False), "prompt": turns}, row("film", True), row("film", False)]
    run = run_of(tmp_path, rows, n_held_out=0, encode=watch)
    run.objective.prepare(run)
    assert seen == ["the shop 0?", "the film?\nand?", "the film 0?", "the film 0?"]


def test_at_most_so_many_prompts_of_a_label_are_fitted(tmp_path, monkeypatch):
    fitted = []

    def watch(up, down, prompts):
        fitted.append((up[:, 2].astype(int).tolist(), len(down), len(prompts)))
        return np.full(len(prompts), 0.5)

    numbered = lambda texts: np.array([[0.0, 0.0, float("".join(c for c in t if c.isdigit()))] for t in texts])
    monkeypatch.setattr("pertoken.train.bco.desirable_probability", watch)
    for seed in (0, 0, 1):
        run = run_of(
            tmp_path / str(len(fitted)),
            SHIFTED + HELD_OUT,
            encode=numbered,
            matching=Matching(prompt_sample_size=20, prompt_sample_seed=seed),
        )
        run.objective.prepare(run)
    assert fitted[0] == fitted[1] != fitted[2] and fitted[0][1:] == (12, 54)
    assert all(len(up) == 20 and max(up) < 50 for up, _, _ in fitted), "held-out prompts are not fitted"


def test_prompts_that_can_be_told_apart_are_warned_about(tmp_path):
    rows = [row("film", True, i) for i in range(8)] + [row("shop", False, i) for i in range(8)]
    run = run_of(tmp_path, rows)
    run.objective.prepare(run)
    assert {g.columns["prompt_weight"] for g in run.every if not g.example.label} == {0.5}
    assert "warning" in run.notes[1] and "udm=False" in run.notes[1]


# ---- bad input


@pytest.mark.parametrize("label, fix", [(True, "thumbs down"), (False, "thumbs up")])
@pytest.mark.parametrize("udm", [True, False])
def test_data_of_one_class_is_refused_with_the_fix(tmp_path, label, fix, udm):
    run = run_of(tmp_path, [row("film", label, i) for i in range(4)] + HELD_OUT, udm=udm)
    with pytest.raises(ValueError, match=f"all 4 training rows .*add rows that are {fix}"):
        run.objective.prepare(run)


def test_labels_are_thumbs_and_anything_else_is_refused_by_its_row():
    values = [True, False, 1, 0, "up", "down", "yes", None, 2, 0.5, "UP", [1]]
    examples, report = load_examples([{"prompt": "p", "completion": "a", "label": x} for x in values])
    assert [e.label for e in examples] == [True, False] * 3
    assert list(report.refused.values()) == [[6, 7, 8, 9, 10, 11]]


def test_pairs_become_a_thumb_up_and_a_thumb_down():
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(2)]
    examples, _ = load_examples(rows, kind="unpaired")
    assert [(e.responses, e.label) for e in examples] == [
        (("a0",), True), (("b0",), False), (("a1",), True), (("b1",), False),
    ]  # fmt: skip


def test_empty_completions_are_dropped_with_a_count():
    rows = [row("film", True), {**row("film", False), "completion": " "}, row("shop", False)]
    groups, report = encode(load_examples(rows)[0], tiny.lm())
    assert len(groups) == 2 and report.refused == {"empty response": [1]}


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unpaired data"):
        BCO().loss(given(1, 2), pairs(), Shift())
    with pytest.raises(ValueError, match=r"prompt_weight.*udm=False"):
        BCO().loss(given(1, 2), labels(True, False), Shift())
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    run = run_of(tmp_path, SHIFTED + HELD_OUT)
    with pytest.raises(ImportError, match=r"pertoken\[classifiers\].*udm=False"):
        run.objective.prepare(run)


def test_options():
    wrongs: list[dict[str, Any]] = [{"beta": 0.0}, {"shift": "ema"}, {"decay": 1.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            BCO(**wrong)
    for matching in (Matching(min_density_ratio=2.0, max_density_ratio=1.0), Matching(prompt_sample_size=0)):
        with pytest.raises(ValueError, match="min_density_ratio <="):
            BCO(matching=matching)
    shown = dataclasses.asdict(BCO())
    assert (shown["beta"], shown["shift"], shown["matching"]["prompt_sample_size"]) == (0.1, "class_balanced_ema", 1024)
    assert (shown["matching"]["min_density_ratio"], shown["matching"]["max_density_ratio"]) == (0.5, 10)
