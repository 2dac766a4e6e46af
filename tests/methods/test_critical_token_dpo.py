"""cDPO: by hand, every identity of its specification through a real pass, startup data, preparation, and bad input."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.credit import Credit
from pertoken.core.data import encode
from pertoken.core.describe import describe
from pertoken.core.examples import Example
from pertoken.core.loop import LoopConfig
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.train._startup_data import sides_of, startup_data
from pertoken.train.critical_token_dpo import (
    CriticalTokenDPO,
    Estimation,
    critical_token_losses,
    token_weights,
    with_terminator,
)
from pertoken.train.dpo import DPO
from tests import tiny
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats

MODELS = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
GROUPS = tiny.groups(MODELS["policy"], n=4)
LOG2 = math.log(2)


def one_pass(objective, s, groups=GROUPS):
    """Loss, statistics, batch and column of one real pass; s: a number for all tokens, or a function of the shape."""
    stats, batch = pair_stats(objective, MODELS, groups)
    shape = stats["policy"].mask_NT.shape
    column = torch.as_tensor(s(shape)) if callable(s) else torch.full(shape, float(s), dtype=torch.float64)
    batch = Batch(batch.pairs_B2, {"contrastive_s": column}, rows=batch.rows)
    return objective.loss(stats, batch), stats, batch, column


def drawn(shape):
    return np.random.default_rng(0).uniform(size=shape)


def tensors(logp, s, mask=None, ref=None):
    """Statistics and a batch of one pair, given by hand."""
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(logp.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    ref = torch.zeros_like(logp) if ref is None else torch.tensor(ref, dtype=torch.float64)
    stats = {"policy": Stats(mask, logp, mask), "reference": Stats(mask, ref, mask)}
    return stats, Batch(torch.tensor([[0, 1]]), {"contrastive_s": torch.tensor(s, dtype=torch.float64)})


# ---- arithmetic


def test_by_hand():
    stats, batch = tensors(
        [[-1, -2], [-3, -1]], [[0.5, 0.25], [0.9, 0.2]], ref=[[-2, -2.5], [-1, -4]]
    )  # l: chosen 1, .5; rejected -2, 3
    margin = 0.5 * ((1 + 0.5) - (0.1 * -2 + 0.8 * 3))
    loss = CriticalTokenDPO(beta=0.5).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-12) and loss.count == 1
    shown = means(loss)
    assert shown["rewards/weighted_margins"] == pytest.approx(margin)
    assert shown["rewards/margins"] == pytest.approx(0.5 * (1.5 - 1))  # the usual one, without weights
    assert shown["weight/rejected"] == pytest.approx((0.1 + 0.8) / 2) and shown["weight/chosen"] == 1
    both = CriticalTokenDPO(beta=0.5, only_neg=False).loss(stats, batch)
    margin = 0.5 * ((0.5 * 1 + 0.25 * 0.5) - (0.1 * -2 + 0.8 * 3))
    assert both.sum.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-12)
    assert means(both)["weight/chosen"] == pytest.approx(0.375)


def test_position_by_hand():
    """The release: log-sigmoid of the difference at each position, mean over pairs x positions; padding adds log 2."""
    stats, batch = tensors(
        [[-1, -2, -0.5], [-3, 9, 9]], [[0.5, 0.25, 0.0], [0.9, 0.0, 0.0]], mask=[[1, 1, 1], [1, 0, 0]]
    )
    stats = {k: Stats(v.mask_NT.bool(), v.logp_NT, v.present_NT.bool()) for k, v in stats.items()}
    differences = [-1 - 0.1 * -3, -2, -0.5]
    loss = CriticalTokenDPO(beta=0.5, reduction="position").loss(stats, batch)
    assert loss.count == 3
    assert loss.sum.item() == pytest.approx(sum(math.log1p(math.exp(-0.5 * d)) for d in differences), abs=1e-12)
    chosen, rejected = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])  # the second position is padding
    found = critical_token_losses(chosen, rejected, 1.0, "position")
    assert found.tolist() == [[pytest.approx(math.log1p(math.exp(-0.5))), pytest.approx(LOG2)]]
    assert critical_token_losses(chosen, rejected, 1.0).tolist() == [pytest.approx(math.log1p(math.exp(-0.5)))]


def test_a_longer_batch_adds_log_2_per_position():
    objective = CriticalTokenDPO(reduction="position")
    short, long = (
        tensors([[-1.0], [-2.0]], [[0.5], [0.5]]),
        tensors([[-1.0, 7.0], [-2.0, 7.0]], [[0.5, 0.0], [0.5, 0.0]], mask=[[True, False], [True, False]]),
    )
    a, b = objective.loss(*short), objective.loss(*long)
    assert b.sum.item() == pytest.approx(a.sum.item() + LOG2) and (a.count, b.count) == (1, 2)
    assert objective.batch_coupled and not CriticalTokenDPO().batch_coupled
    a, b = CriticalTokenDPO().loss(*short), CriticalTokenDPO().loss(*long)
    assert a.sum.item() == b.sum.item() and a.count == b.count == 1


def test_weights():
    s = torch.tensor([[0.2, 0.9], [0.3, 1.0]], requires_grad=True)
    rejected = torch.tensor([False, True])
    np.testing.assert_allclose(token_weights(s, rejected), [[1, 1], [0.7, 0]], atol=1e-7)
    np.testing.assert_allclose(token_weights(s, rejected, False), [[0.2, 0.9], [0.7, 0]], atol=1e-7)
    assert not token_weights(s, rejected, False).requires_grad


# ---- identities, through a real pass in float64


def test_s_0_is_dpo_to_the_bit():
    loss, stats, batch, _ = one_pass(CriticalTokenDPO(beta=0.3), 0.0)
    dpo = DPO(beta=0.3).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(dpo.sum.item(), rel=1e-14) and loss.count == dpo.count
    policy = MODELS["policy"]
    torch.testing.assert_close(gradient(loss.sum, policy), gradient(dpo.sum, policy), atol=1e-12, rtol=0)
    shown = means(loss)
    assert {name: shown[name] for name in means(dpo)} == means(dpo)


@pytest.mark.parametrize("reduction", ["sequence", "position"])
def test_s_1_leaves_the_rejected_side_without_gradient(reduction):
    stats, batch = tensors([[-1.0, -2.0], [-3.0, -1.0]], [[0.4, 0.7], [1.0, 1.0]])
    loss = CriticalTokenDPO(reduction=reduction).loss(stats, batch)
    (slope,) = torch.autograd.grad(loss.sum, stats["policy"].logp_NT)
    assert slope[1].tolist() == [0.0, 0.0] and (slope[0] < 0).all()
    loss, stats, batch, _ = one_pass(CriticalTokenDPO(reduction=reduction), 1.0)
    (slope,) = torch.autograd.grad(loss.sum, stats["policy"].logp_NT)
    assert not slope[batch.rejected].any() and slope[batch.chosen].any()


@pytest.mark.parametrize("only_neg", [True, False])
def test_the_gradient_is_dpos_with_weighted_tokens(only_neg):
    beta, policy = 0.3, MODELS["policy"]
    loss, stats, batch, s = one_pass(CriticalTokenDPO(beta=beta, only_neg=only_neg), drawn)
    w, l, mask = batch.chosen, batch.rejected, stats["policy"].mask_NT
    ratio = (stats["policy"].logp_NT - stats["reference"].logp_NT) * mask
    up, down = (ratio if only_neg else s * ratio)[w].sum(1), ((1 - s) * ratio)[l].sum(1)
    strength = torch.sigmoid(-beta * (up - down)).detach()
    got = gradient(loss.sum, policy)
    assert got.abs().max() > 0.01
    expected = gradient((-beta * strength * (up - down)).sum(), policy)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_s_is_a_constant():
    stats, batch = tensors([[-1.0], [-3.0]], [[0.4], [0.7]])
    s = batch.columns["contrastive_s"].requires_grad_()
    loss = CriticalTokenDPO(only_neg=False).loss(stats, batch)
    assert torch.autograd.grad(loss.sum, s, allow_unused=True) == (None,)


def test_chosen_s_counts_only_without_only_neg():
    for only_neg, same in ((True, True), (False, False)):
        a, b = (
            CriticalTokenDPO(only_neg=only_neg).loss(*tensors([[-1.0], [-3.0]], [[s], [0.7]])).sum.item()
            for s in (0.1, 0.8)
        )
        assert (a == b) is same


def test_masked_tokens_and_what_is_beyond_the_end_do_not_count():
    nan = float("nan")
    for reduction in ("sequence", "position"):
        objective = CriticalTokenDPO(reduction=reduction, only_neg=False)
        mask = [[True, False], [True, False]]
        plain = objective.loss(*tensors([[-1.0, -4.0], [-3.0, -5.0]], [[0.5, 0.3], [0.7, 0.2]], mask=mask))
        odd = objective.loss(*tensors([[-1.0, nan], [-3.0, nan]], [[0.5, nan], [0.7, nan]], mask=mask))
        assert plain.sum.item() == odd.sum.item() and math.isfinite(odd.sum.item())


# ---- the terminator, and alignment


def test_the_terminators_multiplier_is_1_on_both_sides():
    s = np.array([0.25, 0.5, 0.75])
    assert with_terminator(s, 3, ended=True, rejected=False).tolist() == [0.25, 0.5, 1.0]
    assert with_terminator(s, 3, ended=True, rejected=True).tolist() == [0.25, 0.5, 0.0]  # weighs 1 - 0
    assert with_terminator(s, 3, ended=False, rejected=True).tolist() == [0.25, 0.5, 0.75]  # cut off: no terminator
    assert s.tolist() == [0.25, 0.5, 0.75] and with_terminator(np.zeros(0), 0, ended=True, rejected=True).shape == (0,)


def test_lengths_that_differ_raise_with_both():
    for n in (2, 4):
        with pytest.raises(ValueError, match=f"s has {n} values and the response 3 tokens"):
            with_terminator(np.full(n, 0.5), 3, ended=True, rejected=True)
    for bad in ([0.5, 1.5], [-0.1, 0.5], [math.nan, 0.5]):
        with pytest.raises(ValueError, match="give probabilities"):
            with_terminator(np.array(bad), 2, ended=False, rejected=False)


# ---- startup data


LM = tiny.lm(0, dtype=torch.float32)


def said(*texts):
    return [LM.trace("how was the film", text, ended=True) for text in texts]


def last_word(text):
    return text.split()[-1].lower().strip(".") if text.split() else ""


def texts(groups, side=0):
    return [g.traces[side].text for g in groups]


def test_startup_data_by_hand():
    samples = said("so great", "it is great", "a bad", "the bad", "Bad.", "too dull", "dull", "odd", "", "  ")
    found = startup_data([samples], last_word, ["great"])
    assert texts(found.positive) in (["so great"], ["it is great"])
    # six wrong ones, so three are to be covered: "bad" has three, and "dull" is not needed any more
    assert texts(found.negative) in (["a bad"], ["the bad"], ["Bad."])
    (pair,) = found.pairs
    assert texts([pair]) == texts(found.positive) and texts([pair], 1) == texts(found.negative)
    assert pair.example.scores == (1.0, 0.0) and pair.example.kind == "pair"
    assert pair.traces[1].completion_ids in {t.completion_ids for t in samples}  # the sampled ids
    wanted = {"empty answer": 2, "no correct sample": 0, "no wrong sample": 0, "wrong answer left out": 2}
    wanted |= {"pair too long": 0, "questions": 1, "positive": 1, "negative": 1, "pairs": 1}
    assert found.counts == wanted


def test_the_negative_set_covers_half_of_the_wrong_samples():
    samples = said(*["a"] * 3, *["b"] * 2, *["c"] * 2, *["d"] * 2, "e")  # ten: five to be covered
    assert texts(startup_data([samples], last_word, ["x"]).negative)[0] == "a"
    for top_p, n in ((0.3, 1), (0.31, 2), (0.5, 2), (0.51, 3), (0.9, 4), (1.0, 4)):  # "e" is seen once only: never
        assert len(startup_data([samples], last_word, ["x"], top_p=top_p).negative) == n
    once = startup_data([said("a", "b", "c")], last_word, ["x"])  # one seen once counts only as the very first
    assert len(once.negative) == 1 and once.counts["wrong answer left out"] == 2


def test_questions_without_a_right_or_a_wrong_sample_are_counted():
    asked = [said("good", "fine"), said("good", "good"), said("bad", "bad"), said("", ""), [], said("good", "bad")]
    found = startup_data(asked, last_word, ["good", "good", "good", "good", "good", "good"])
    assert (found.counts["no correct sample"], found.counts["no wrong sample"]) == (3, 3)
    assert (found.counts["positive"], found.counts["negative"], found.counts["pairs"]) == (3, 3, 2)
    assert [g.example.row for g in found.pairs] == [0, 5] and found.counts["empty answer"] == 2


def test_answers_are_compared_normalised():
    found = startup_data([said("Great.", "great", "GREAT", "bad")], last_word, ["great"])
    assert len(found.positive) == 1 and texts(found.negative) == ["bad"]


def test_choices_are_drawn_by_the_seed():
    samples = said(*(f"{i} good" for i in range(9)), *(f"{i} bad" for i in range(9)))
    first, again = (texts(startup_data([samples], last_word, ["good"]).pairs) for _ in range(2))
    assert first == again
    assert len({texts(startup_data([samples], last_word, ["good"], seed=k).pairs)[0] for k in range(12)}) > 3


def test_pairs_that_are_too_long_are_counted():
    samples = said("good", "a bad")
    prompt, longest = len(samples[0].prompt_ids), max(len(t) for t in samples) - 1  # without the terminator
    for options in ({"max_prompt": prompt}, {"max_length": prompt + longest}):
        found = startup_data([samples], last_word, ["good"], **options)
        assert (found.counts["pair too long"], found.pairs) == (1, ()) and len(found.positive) == 1
    fits = startup_data([samples], last_word, ["good"], max_prompt=prompt + 1, max_length=prompt + longest + 1)
    assert len(fits.pairs) == 1


def test_bad_startup_data():
    with pytest.raises(ValueError, match="2 right answers for 1 questions"):
        startup_data([said("a")], last_word, ["a", "b"])
    with pytest.raises(ValueError, match="question 1 has no right answer"):
        startup_data([said("a"), said("a")], last_word, ["a", ""])
    with pytest.raises(ValueError, match="top_p=0"):
        startup_data([said("a")], last_word, ["a"], top_p=0.0)


def test_startup_data_stand_in_a_record_as_a_hash():
    one, two = (startup_data([said("good", bad)], last_word, ["good"]) for bad in ("bad", "dull"))
    shown = [describe(CriticalTokenDPO(startup=data))["startup"] for data in (one, two)]
    assert shown[0]["positive"] == shown[1]["positive"] and shown[0]["negative"] != shown[1]["negative"]
    assert len(json.dumps(shown)) < 300


# ---- preparation


@pytest.fixture
def run(tmp_path):
    """A run on real (tiny) data; `.objective` is set by the test."""
    rows = [("how was the film", "great", "a dull one"), ("how was the plot", "I loved it", "not great")]
    examples = [Example(prompt=p, responses=(w, l), row=10 + i) for i, (p, w, l) in enumerate(rows)]
    groups, _ = encode(examples, LM)
    return Run(
        slug="critical-token-dpo", objective=None, policy=tiny.lm(0, dtype=torch.float32), groups=groups[:1],
        held_out=groups[1:], config=LoopConfig(epochs=1, batch_size=2, lr=1e-2), out=tmp_path / "out",
        resolve=catalog.method, progress=False,
    )  # fmt: skip


def column(run):
    return [v for group in run.every for v in group.columns["contrastive_s"]]


FAST = Estimation(ce_lora=2, ce_lr=1e-2, ce_epochs=1, ce_batch_size=1, ce_warmup_steps=0)


def test_the_two_models_are_trained_and_score(run):
    CriticalTokenDPO(estimation=FAST).prepare(run)
    values = column(run)
    assert [len(v) for v in values] == [len(t) for g in run.every for t in g.traces]
    assert [float(v[-1]) for v in values] == [1.0, 0.0, 1.0, 0.0]  # the terminators
    inner = np.concatenate([v[:-1] for v in values])
    assert (inner > 0).all() and (inner < 1).all()
    stages = [r["stage"] for r in run.stages.records]
    assert len(stages) == 3 and stages[0].startswith("sft-model") and stages[2].startswith("contrastive-s")
    assert run.notes[-1].startswith("cdpo: mean(1 - s)") and "rejected" in run.notes[-1]
    pushed = np.concatenate([1 - v[:-1] for v in values[1::2]]).mean()  # terminators left out
    assert f"{pushed:.4f}" in run.notes[-1]
    CriticalTokenDPO(estimation=FAST).prepare(run)  # nothing is made again
    assert [r["reused"] for r in run.stages.records] == [False] * 3 + [True] * 3
    assert all(np.array_equal(a, b) for a, b in zip(values, column(run), strict=True))


def test_the_positive_model_learns_the_chosen_side(run):
    """Swapped sides give other models, and s of the chosen tokens is higher the right way round."""
    strong = dataclasses.replace(FAST, ce_lr=3e-2, ce_epochs=6)
    CriticalTokenDPO(estimation=strong).prepare(run)
    right = column(run)
    positive, negative = sides_of(run.groups)
    assert texts(positive) == ["great"] and texts(negative) == ["a dull one"]
    assert all(len(g.traces) == 1 and not g.columns for g in positive + negative)
    assert right[0][:-1].mean() > right[1][:-1].mean()


def test_given_startup_data_and_contrast(run):
    data = startup_data([said("a great", "so dull")], last_word, ["great"])
    for contrast in (1.0, 0.0):
        estimation = dataclasses.replace(FAST, contrast=contrast)
        CriticalTokenDPO(startup=data, estimation=estimation).prepare(run)
    assert any("startup data: 0 empty answer" in note and "1 pairs" in note for note in run.notes)
    only_right = startup_data([said("a great")], last_word, ["great"])
    with pytest.raises(ValueError, match="no negative response"):
        CriticalTokenDPO(startup=only_right).prepare(run)
    with pytest.raises(ValueError, match="startup_data"):
        CriticalTokenDPO(startup=[1])


def test_warm_up_that_never_ends_is_reported(run):
    CriticalTokenDPO(estimation=Estimation(ce_lora=2)).prepare(run)
    assert sum("warm-up" in note for note in run.notes) == 2
    loop = Estimation().loop(6 * 400)  # the release: 100 of 400 updates
    config = LoopConfig(**loop)
    rates = [config.learning_rate(k, config.total_steps(2400)) for k in range(400)]
    assert config.total_steps(2400) == 400 and np.argmax(rates) in (99, 100) and rates[0] == pytest.approx(3e-6)


def test_any_scorer_will_do(run):
    CriticalTokenDPO(scorer=lambda trace: np.full(len(trace), 0.25)).prepare(run)
    assert column(run)[1].tolist()[:-1] == [0.25] * (len(run.groups[0].traces[1]) - 1)
    assert len(run.stages.records) == 1
    CriticalTokenDPO(scorer=lambda trace: np.ones(len(trace)), only_neg=False).prepare(run)
    assert "mean(1 - s) 0.0000" in run.notes[-2] and "mean s 1.0000 on chosen" in run.notes[-2]


def test_nothing_critical_is_reported(run):
    CriticalTokenDPO(scorer=lambda trace: np.full(len(trace), 0.999)).prepare(run)
    assert "mean(1 - s) 0.0010" in run.notes[-2] and "nothing in the rejected answers looks critical" in run.notes[-1]
    CriticalTokenDPO(scorer=lambda trace: np.full(len(trace), 0.9)).prepare(run)
    assert "mean(1 - s) 0.1000" in run.notes[-1]


def test_s_of_other_tokens_is_refused(run):
    class Elsewhere:
        def score(self, items):
            other = [tiny.lm(0).trace("so", "plot film plot") for _ in items]
            return [Credit(trace=t, values=np.full(len(t), 0.5), kind="probability") for t in other]

    with pytest.raises(ValueError, match=r"s stands on \d+ tokens of tokenizer \w+ and the response has \d+ of"):
        CriticalTokenDPO(scorer=Elsewhere()).prepare(run)
    with pytest.raises(ValueError, match="give probabilities"):
        CriticalTokenDPO(scorer=lambda trace: np.full(len(trace), 2.0)).prepare(run)


def test_a_run_from_data_to_model(run):
    run.objective = CriticalTokenDPO(estimation=FAST)
    record = run.go()
    assert record["updates"] == 1 + 1 + 1  # the two models' too
    assert math.isfinite(record["final"]["loss"]) and 0 < record["final"]["weight/rejected"] <= 1
    assert record["final"]["loss"] == pytest.approx(LOG2, abs=1e-4)  # before the first update pi = pi_ref


# ---- bad input


def test_options():
    wrongs: list[dict[str, Any]] = [{"beta": 0.0}, {"beta": math.inf}, {"reduction": "mean"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CriticalTokenDPO(**wrong)
    bad = {"contrast": -1.0, "ce_lora": -1, "ce_lr": 0.0, "ce_epochs": 0.0, "ce_batch_size": 0, "ce_warmup_steps": -1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name}.* needed"):
            Estimation(**{name: value})  # type: ignore[arg-type]
    ours, theirs = ({f.name for f in dataclasses.fields(kind)} for kind in (Estimation, LoopConfig))
    assert not ours & theirs  # on the command line nested options have no prefix
    stats, batch = pair_stats(CriticalTokenDPO(), MODELS, GROUPS)
    with pytest.raises(ValueError, match="'contrastive_s'"):
        CriticalTokenDPO().loss(stats, batch)


def test_the_page_says_that_it_is_not_conservative_dpo():
    import pertoken.train.critical_token_dpo as module

    assert "label smoothing" in (module.__doc__ or "") and "conservative" in catalog.about("critical-token-dpo").title
