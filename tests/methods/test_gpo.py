"""GPO: by hand, every identity of its specification, its preparation with real models, and bad input."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.lm import load
from pertoken.core.loop import LoopConfig
from pertoken.core.protocols import Batch
from pertoken.core.rollout import Sampling
from pertoken.core.run import Run, completions_stats
from pertoken.core.stats import Stats
from pertoken.core.trace import Trace
from pertoken.score.gpm import GPM
from pertoken.train.gpo import COLUMN, GPO, gpo_loss, log_partition, policy_scores, preference_table
from tests import tiny
from tests.core.training import make_groups
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats

RNG = np.random.default_rng(0)


def skew(k=5, scale=2.0):
    x = RNG.normal(size=(k, k)) * scale
    return x - x.T


# ---- arithmetic


def test_scores_by_hand():
    table = np.array([[0.0, 2.0, -1.0], [-2.0, 0.0, 4.0], [1.0, -4.0, 0.0]])
    assert policy_scores(table).tolist() == pytest.approx([1 / 3, 2 / 3, -1.0])
    p = 1 / (1 + np.exp(-table))
    assert p.diagonal().tolist() == [0.5] * 3
    assert policy_scores(table, "sppo").tolist() == pytest.approx((p.mean(1) - 0.5).tolist())


def test_mean_score_is_zero_and_the_log_partition_is_not_negative():
    for target in ("gpo", "sppo"):
        for beta in (0.05, 1.0, 30.0):
            s = policy_scores(skew(), target)
            assert s.mean() == pytest.approx(0, abs=1e-12)
            z = log_partition(s, beta)
            assert z >= 0 and z == pytest.approx(math.log(np.exp(s / beta).mean()), rel=1e-9)
    far = policy_scores(skew(), "gpo")
    assert log_partition(far, 100.0) == pytest.approx((far**2).mean() / 2e4, rel=0.1)  # second order in s / beta
    assert math.isfinite(log_partition(np.array([1e5, -1e5]), 1e-3))


def test_loss_by_hand():
    ratio, score = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, -0.4, 9.0])
    assert gpo_loss(ratio, score, 0.1, 5.0).tolist() == pytest.approx([4.0, 4.0, 20.25])


def tensors(logp, ref, scores):
    mask = torch.ones(len(logp), len(logp[0]), dtype=torch.bool)
    column = torch.zeros(len(logp), len(logp[0]), dtype=torch.float64)
    column[:, -1] = torch.tensor(scores, dtype=torch.float64)
    as_stats = lambda x: Stats(mask, torch.tensor(x, dtype=torch.float64), mask)
    return {"policy": as_stats(logp), "reference": as_stats(ref)}, Batch(torch.tensor([[0, 1]]), {COLUMN: column})


def test_objective_by_hand():
    stats, batch = tensors([[-1, -2], [-3, -1]], [[-2, -2], [-1, -1]], [0.3, -0.2])
    loss = GPO(beta=0.1).loss(stats, batch)
    expected = 0.5 * ((1 - 3) ** 2 + (-2 + 2) ** 2)
    assert (loss.sum.item(), loss.count) == (pytest.approx(expected), 1)
    shown = means(loss)
    assert (shown["scores/chosen"], shown["scores/rejected"]) == pytest.approx((0.3, -0.2))
    assert shown["rewards/margins"] == pytest.approx(0.1 * 3) and shown["logps/chosen"] == -3
    assert GPO(beta=0.1, clamp=2.5).loss(stats, batch).sum.item() == pytest.approx(0.5 * (1.5**2 + 0.0))


def test_zero_at_the_closed_form_for_zero_partition():
    """Over a finite set of responses with pi_t uniform on them: pi = pi_t exp(s / beta) where its sum is 1."""
    beta, old = 0.7, np.log(np.array([0.25, 0.25, 0.5]))
    s = beta * np.log(np.array([0.1, 0.5, 0.2]) * np.array([4, 4, 2]))  # chosen so that sum pi_t exp(s / beta) = 0.8
    s = s - beta * math.log(0.8)  # now it is 1
    new = old + s / beta
    assert np.exp(new).sum() == pytest.approx(1.0)
    stats, batch = tensors(new[:2, None].tolist(), old[:2, None].tolist(), s[:2].tolist())
    assert GPO(beta=beta).loss(stats, batch).sum.item() == pytest.approx(0, abs=1e-24)
    away, batch = tensors((new[:2, None] + 0.1).tolist(), old[:2, None].tolist(), s[:2].tolist())
    assert GPO(beta=beta).loss(away, batch).sum.item() == pytest.approx(0.01)


def test_gradient_goes_through_the_policy_alone_and_pulls_to_the_target():
    models = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
    groups = tiny.groups(models["policy"], n=3)
    objective = GPO(beta=0.5)
    stats, batch = pair_stats(objective, models, groups)
    column = GPO.example_columns(np.random.default_rng(0), stats["policy"].mask_NT)[COLUMN] * 100
    column = column.requires_grad_()
    batch = Batch(batch.pairs_B2, {COLUMN: column})
    loss = objective.loss(stats, batch)
    assert torch.autograd.grad(loss.sum, [column], allow_unused=True, retain_graph=True) == (None,)
    u = stats["policy"].sums() - stats["reference"].sums()
    residual = (u - (column * stats["policy"].mask_NT).sum(1) / 0.5).detach()
    assert loss.sum.item() == pytest.approx((0.5 * (residual**2)).sum().item())  # each completion is in one pair
    expected = gradient((residual * stats["policy"].sums()).sum(), models["policy"])
    torch.testing.assert_close(gradient(loss.sum, models["policy"]), expected, atol=1e-8, rtol=1e-8)


# ---- preference models


class Table:
    """A preference model that gives a fixed table, or probabilities."""

    def __init__(self, values, probabilities=False):
        self.values = np.asarray(values, float)
        setattr(self, "prefer" if probabilities else "pairwise_table", lambda traces: self.values)


def test_tables_of_scorers():
    table = skew(3)
    np.testing.assert_allclose(preference_table(Table(table), [None] * 3), table)  # type: ignore[list-item]
    p = 1 / (1 + np.exp(-table))
    np.testing.assert_allclose(preference_table(Table(p, True), [None] * 3), table, atol=1e-6)  # type: ignore[list-item]
    sure = preference_table(Table([[0.5, 1.0], [0.0, 0.5]], True), [None] * 2)  # type: ignore[list-item]
    assert np.isfinite(sure).all() and sure[0, 1] == -sure[1, 0] == pytest.approx(math.log(1e9), rel=1e-3)
    for wrong, message in (
        (Table(np.ones((2, 2))), "add up to 1"),
        (Table([[0.5, 0.8], [0.4, 0.5]], True), "add up to 1"),
        (Table(np.zeros((3, 3))), "shape"),
        (Table(np.full((2, 2), np.nan)), "not finite"),
        (object(), "neither pairwise_table nor prefer"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_table(wrong, [None] * 2)  # type: ignore[list-item]


class Low:
    """Prefers responses with few high ids; says how often it was asked."""

    def __init__(self):
        self.asked = 0

    def identity(self):
        return {"name": "low"}

    def pairwise_table(self, traces):
        self.asked += 1
        high = np.array([sum(i > 160 for i in t.completion_ids) for t in traces], float)
        return np.subtract.outer(-high, -high)


class Alike(Low):
    """Tells nothing apart."""

    def pairwise_table(self, traces):
        return np.zeros((len(traces), len(traces)))


SAMPLING = Sampling(max_new_tokens=6)


def make_run(out, objective, n=4, held_out=2, **config):
    lm = exact_lm(0)
    groups = [dataclasses.replace(g, columns={}) for g in make_groups(lm, n + held_out)]
    settings = LoopConfig(**({"lr": 1e-3, "batch_size": 4, "steps": 2, "warmup": 0.0, "seed": 1} | config))
    return Run(
        slug="gpo",
        objective=objective,
        policy=lm,
        groups=groups[:n],
        held_out=groups[n:],
        config=settings,
        out=out,
        resolve=catalog.method,
        progress=False,
    )


def test_preparation_keeps_best_and_worst_of_the_policys_samples(tmp_path):
    scorer = Low()
    run = make_run(tmp_path, GPO(rounds=1, samples=4, scorer=scorer, sampling=SAMPLING))
    prompts = [g.prompt_ids for g in run.every]
    run.objective.prepare(run)
    assert scorer.asked == 6
    samples = json.loads(next((tmp_path / "stages").glob("gpo-samples-*/samples.json")).read_text())
    assert [len(some) for some in samples] == [4] * 6 and [tuple(some[0]["prompt_ids"]) for some in samples] == prompts
    made = iter(run.every)
    for some in samples:
        high = np.array([sum(i > 160 for i in t["completion_ids"]) for t in some])
        if len(set(high)) == 1:
            continue
        group = next(made)
        scores = (high.mean() - high).tolist()
        for trace, values, pick in zip(group.traces, group.columns[COLUMN], (high.argmin(), high.argmax())):
            assert list(trace.completion_ids) == some[pick]["completion_ids"]
            assert values.tolist() == [0.0] * (len(trace) - 1) + [scores[pick]]
        assert group.example.scores == (max(scores), min(scores))
    assert next(made, None) is None and len(run.held_out) <= 2
    assert "log-partition" in run.notes[1] and "prompts x 4 samples" in run.notes[0]
    again = make_run(tmp_path / "again", GPO(rounds=1, samples=4, scorer=scorer, sampling=SAMPLING))
    again.stages.folder = run.stages.folder
    again.objective.prepare(again)
    assert scorer.asked == 6 and [g.traces[0].completion_ids for g in again.every] == [
        g.traces[0].completion_ids for g in run.every
    ]


def test_identical_and_equal_samples_are_dropped_and_counted(tmp_path):
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match="no prompt gave two samples"):
        make_run(tmp_path / "a", GPO(rounds=1, scorer=Low(), sampling=greedy)).go()
    run = make_run(tmp_path / "b", GPO(rounds=1, scorer=Low(), sampling=greedy))
    with pytest.raises(ValueError, match="no prompt gave"):
        run.objective.prepare(run)
    assert "dropped: 6 whose samples are identical, 0 whose" in run.notes[0]
    run = make_run(tmp_path / "c", GPO(rounds=1, scorer=Alike(), sampling=SAMPLING))
    with pytest.raises(ValueError, match="no prompt gave"):
        run.objective.prepare(run)
    assert "dropped: 0 whose samples are identical, 6 whose samples score alike" in run.notes[0]


def test_rounds_start_from_each_other(tmp_path):
    objective = GPO(rounds=3, beta=5.0, scorer=Low(), sampling=SAMPLING)
    run = make_run(tmp_path / "run", objective, n=4, held_out=0)
    record = run.go()
    assert record["updates"] == 3 * 2
    made = sorted((s for s in record["stages"]), key=lambda s: s["stage"])
    assert [s["stage"] for s in made] == ["gpo-model", "gpo-model", "gpo-samples", "gpo-tables"]
    # the reference of the last round is the policy of the second, not the start
    start, hashes = exact_lm(0), [s["hash"] for s in run.stages.records if s["stage"] == "gpo-model"]
    trained = load(run.stages.folder / f"gpo-model-{hashes[1]}" / "model", dtype="float64", device="cpu")
    weights = [p.detach().clone() for p in trained.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(weights, start.model.parameters()))
    group = run.groups[0]
    expected = [s["logp"] for s in completions_stats(trained, group.traces)]
    for found, want in zip(group.columns["reference_logps"], expected):
        np.testing.assert_allclose(found, want, atol=1e-8)
    again = make_run(tmp_path / "again", objective, n=4, held_out=0)
    again.stages.folder = run.stages.folder
    repeated = again.go()
    assert all(s["reused"] for s in repeated["stages"])
    assert repeated["final"]["loss"] == pytest.approx(record["final"]["loss"], abs=1e-12)


def test_training_moves_to_the_preferred(tmp_path):
    """Low ids are preferred, and the policy comes to say them."""
    from pertoken.core.rollout import sample

    objective = GPO(rounds=1, beta=0.3, samples=6, scorer=Low(), sampling=SAMPLING)
    run = make_run(tmp_path, objective, n=16, held_out=0, steps=16, lr=4e-3, batch_size=16)
    before = run.policy.reference()
    history = run.go()
    prompts = [g.prompt_ids for g in run.groups][:12]
    high = [
        np.mean([i > 160 for some in sample(lm, prompts, 8, SAMPLING, seed=5) for t in some for i in t.completion_ids])
        for lm in (before, run.policy)
    ]
    assert high[1] < high[0] - 0.05 and history["final"]["rewards/margins"] > 0


def test_a_saved_gpm_is_the_preference_model(tmp_path):
    lm = exact_lm(0)
    GPM.example(lm).save(tmp_path / "gpm")
    objective = GPO(rounds=1, samples=3, beta=1.0, preference=str(tmp_path / "gpm"), sampling=SAMPLING)
    run = make_run(tmp_path / "run", objective)
    record = run.go()
    assert math.isfinite(record["final"]["loss"])
    table = GPM(folder=str(tmp_path / "gpm"), lm=lm).pairwise_table(run.groups[0].traces)
    assert table[0, 1] == pytest.approx(-table[1, 0])


@pytest.mark.parametrize("rounds", [2, 3])
def test_the_judge_stays_what_it_is_over_rounds(tmp_path, rounds):
    """A GPM on the policy's own features judges with the start's, whatever the rounds have made of the policy."""
    lm = exact_lm(0)
    GPM.example(lm).save(tmp_path / "gpm")
    objective = GPO(rounds=rounds, samples=3, beta=1.0, preference=str(tmp_path / "gpm"), sampling=SAMPLING)
    run = make_run(tmp_path / "run", objective)
    run.config = dataclasses.replace(run.config, lr=5e-2)
    objective.prepare(run)
    assert max(float((p - q).abs().max()) for p, q in zip(lm.model.parameters(), run.policy.model.parameters())) > 1e-2
    judge = GPM(folder=str(tmp_path / "gpm"), lm=lm)
    (samples,) = run.stages.folder.glob("gpo-samples-*/samples.json")  # of the last round
    (tables,) = run.stages.folder.glob("gpo-tables-*/tables.npy")
    drawn = [[Trace.from_json(t) for t in some] for some in json.loads(samples.read_text())]
    np.testing.assert_allclose(np.load(tables), [judge.pairwise_table(some) for some in drawn], atol=1e-6)
    own = GPM.example(run.policy)
    with pytest.raises(ValueError, match="which rounds change; give it a copy"):
        GPO(rounds=2, samples=3, scorer=own, sampling=SAMPLING).prepare(run)
    run.given = {"reference": exact_lm(1)}
    with pytest.raises(ValueError, match="do not give it another one"):
        GPO(rounds=1, samples=3, scorer=judge, sampling=SAMPLING).prepare(run)


def test_doubled_tables_are_halved():
    lm = exact_lm(0)
    traces = [lm.trace("how was it", text) for text in ("good", "bad", "fine")]
    plain, doubled = (preference_table(GPM.example(lm, compat=c), traces) for c in ("paper", "reference"))
    np.testing.assert_allclose(plain, doubled, atol=1e-12)


def test_bad_input(tmp_path):
    for options, message in (
        ({"samples": 1}, "take 2 or more"),
        ({"beta": 0.0}, "above 0"),
        ({"clamp": 0.0}, "above 0"),
        ({"target": "dpo"}, "gpo, sppo"),
        ({"rounds": 0}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            GPO(**options)
    with pytest.raises(ValueError, match="needs a preference model"):
        make_run(tmp_path, GPO()).go()
    run = make_run(tmp_path / "lora", GPO(scorer=Low(), sampling=SAMPLING))
    run.policy = run.policy.clone(lora=2)
    with pytest.raises(ValueError, match="rounds=1"):
        run.go()
    stats, batch = tensors([[-1.0], [-2.0]], [[-1.0], [-2.0]], [0.0, 0.0])
    with pytest.raises(ValueError, match="run prepare"):
        GPO().loss(stats, Batch(batch.pairs_B2))
    defaults: Any = GPO()
    assert (defaults.beta, defaults.samples, defaults.rounds, defaults.clamp) == (0.0005, 5, 3, 1000.0)
