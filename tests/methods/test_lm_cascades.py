# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""LM cascades: scores, curves and learned rules by hand; the cascade calls the large model for what it defers, only."""

import math

import numpy as np
import pytest
import torch

from pertoken.core.decode import LMGuide, decode
from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling
from pertoken.generate import lm_cascades
from pertoken.generate.lm_cascades import (
    GRID,
    Answer,
    FixedRule,
    LearnedRule,
    Learning,
    LMCascade,
    area,
    chow_average,
    chow_quantile,
    chow_sum,
    deferral_curve,
    features,
    observe,
    standings,
    targets,
    threshold_for,
    usable,
)
from tests import tiny

SHORT = Sampling(max_new_tokens=6, temperature=0.0)
PROMPTS = ["the plot", "a film", "a friend and a score", "naive"]


def answers(*lists, truncated=()):
    return [Answer({"logp": np.array(x)}, k in truncated) for k, x in enumerate(lists)]


# ---- fixed rules


def test_scores_by_hand():
    c = np.array([-0.1, -2.0, -0.4, -0.3])
    assert chow_sum(c) == pytest.approx(2.8) and chow_average(c) == pytest.approx(0.7)
    assert chow_quantile(c, 0.0) == 2.0 and chow_quantile(c, 1.0) == pytest.approx(0.1)
    assert chow_quantile(c, 0.5) == pytest.approx(0.35)  # halfway between -0.4 and -0.3
    assert chow_quantile(c, 0.1) == pytest.approx(2.0 - 0.3 * 1.6)  # at place 0.3 from -2.0 to -0.4


def test_one_token_and_constant_lists():
    for c, n in ((np.array([-1.25]), 1), (np.full(7, -0.5), 7)):
        value = -c[0]
        assert chow_sum(c) == pytest.approx(n * value) and chow_average(c) == pytest.approx(value)
        for alpha in GRID:
            assert chow_quantile(c, alpha) == pytest.approx(value)


def test_empty_answers_and_infinite_log_probs():
    for rule in (FixedRule("sum"), FixedRule("average"), FixedRule("quantile")):
        assert rule.score(answers([], [-1.0]))[0] == math.inf
    assert chow_sum(np.array([-math.inf, -1.0])) == 10_001
    assert chow_quantile(np.array([-math.inf, -2.0]), 0.5) == 5_001  # capped before it is interpolated: not NaN
    assert np.isnan(features(answers([]))).all(1).tolist() == [False]  # `truncated` is known
    assert np.isnan(features(answers([]))[0, :-1]).all()


def test_other_signals():
    answer = Answer({"entropy": np.array([0.5, 0.1]), "top1_logp": np.log([0.5, 0.9]), "margin": np.array([0.2, 3.0])})
    assert FixedRule("sum", "entropy").score([answer])[0] == pytest.approx(0.6)
    assert FixedRule("average", "max-prob").score([answer])[0] == pytest.approx((0.5 + 0.1) / 2)
    assert FixedRule("quantile", "margin").score([answer])[0] == pytest.approx(-0.2)
    for bad in ({"kind": "mean"}, {"signal": "variance"}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match="kind is sum, average or quantile"):
            FixedRule(**bad)


def test_features():
    (row,) = features(answers([-0.5, -1.5], truncated=(0,)))
    expected = [-1.5 + alpha for alpha in GRID]  # a straight line from -1.5 to -0.5
    np.testing.assert_allclose(row, [*expected, 2.0, 1.0, 1.0])
    stated = Answer({"logp": np.array([-1.0])}, False, {"embed-1": np.array([3.0, 4.0]), "embed-2": np.array([5.0])})
    assert features([stated], ("embed-1", "embed-2"))[0, -4:].tolist() == [0.0, 3.0, 4.0, 5.0]


# ---- curves


def test_curve_by_hand():
    q1, q2 = [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    curve = deferral_curve([0.9, 0.1, 0.5, 0.4], q1, q2)  # order 0, 2, 3, 1
    np.testing.assert_allclose(curve, [0.5, 0.75, 1.0, 1.0, 0.75])
    assert area(curve) == pytest.approx((0.25 + 0.75 + 1.0 + 1.0 + 0.375) / 4)
    assert curve[0] == np.mean(q1) and curve[-1] == np.mean(q2)
    found, dropped = standings({"s": [0.9, 0.1, 0.5, 0.4]}, q1, q2)
    assert found["random"].area == 0.625 and found["s"].area == found["oracle"].area and dropped == 0
    assert found["s"].oracle_share == pytest.approx(1.0)
    assert found["s"].gain == pytest.approx(100 * (area(curve) / 0.625 - 1))


def test_equal_scores_keep_their_order():
    curve = deferral_curve([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 4.0])
    np.testing.assert_allclose(curve * 3, [0.0, 1.0, 3.0, 7.0])
    reversed_curve = deferral_curve([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [4.0, 2.0, 1.0])
    np.testing.assert_allclose(reversed_curve * 3, [0.0, 4.0, 6.0, 7.0])


def test_identities_of_areas():
    rng = np.random.default_rng(0)
    score, q1, q2 = rng.normal(size=60), rng.random(60), rng.random(60)
    mine = area(deferral_curve(score, q1, q2))
    for transform in (np.exp, lambda s: 3 * s - 7, np.arctan, lambda s: s + 100):
        assert area(deferral_curve(transform(score), q1, q2)) == pytest.approx(mine, abs=1e-12)
    shuffle = rng.permutation(60)  # no ties here
    assert area(deferral_curve(score[shuffle], q1[shuffle], q2[shuffle])) == pytest.approx(mine, abs=1e-12)
    best = area(deferral_curve(q2 - q1, q1, q2))
    areas = [area(deferral_curve(rng.permutation(60), q1, q2)) for _ in range(2000)]
    assert best >= max(areas)
    # seed fixed; a mean of 2000 draws lies within 5 standard errors, false alarm 6e-7
    assert abs(np.mean(areas) - (q1.mean() + q2.mean()) / 2) < 5 * np.std(areas) / 2000**0.5


def test_unknown_quality_is_left_out_of_all_curves_alike():
    q1, q2 = [0.0, math.nan, 1.0, 0.0], [1.0, 1.0, math.nan, 0.0]
    assert usable(q1, q2).tolist() == [True, False, False, True]
    found, dropped = standings({"a": [4, 3, 2, 1], "b": [1, 9, 9, 2]}, q1, q2)
    assert dropped == 2 and found["a"].area == area(deferral_curve([4, 1], [0, 0], [1, 0]))
    assert found["b"].area == area(deferral_curve([1, 2], [0, 0], [1, 0]))
    with pytest.raises(ValueError, match="leave that example out"):
        deferral_curve([1, 2, 3, 4], q1, q2)
    with pytest.raises(ValueError, match="one of each"):
        deferral_curve([1, 2], [0.0], [1.0])
    assert math.isnan(standings({}, [1.0], [1.0])[0]["oracle"].oracle_share)  # the oracle has nothing to gain


def test_thresholds():
    score = np.arange(11.0)
    for budget in (0.0, 0.1, 0.3, 0.9):
        assert threshold_for(score, budget) == pytest.approx(10 * (1 - budget))
        assert threshold_for(score + 5, budget) == pytest.approx(10 * (1 - budget) + 5)
    assert (score > threshold_for(score, 0.0)).sum() == 0 and (score > threshold_for(score, 1.0)).all()
    assert threshold_for([1.0, math.inf, 2.0, math.inf], 0.5) == math.inf  # no NaN between them
    for bad in (([], 0.5), ([1.0], 1.5), ([math.nan], 0.5)):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            threshold_for(*bad)


# ---- learned rules


def test_targets():
    assert targets([-1, 0, 1, 1]).tolist() == [0.0, 0.5, 1.0, 1.0]
    assert targets([0.2, 0.6, 0.4]).tolist() == pytest.approx([0.0, 1.0, 0.5])
    # ranks 1, 2.5, 2.5, 4
    assert targets([-3, 0, 0, 9], "rank").tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0])


def planted(n=300, seed=0):
    """The large model is better iff exactly one token is unlikely; long answers have many tokens of probability 1/2."""
    rng, lists, gain = np.random.default_rng(seed), [], []
    for _ in range(n):
        length, bad = int(rng.integers(3, 30)), rng.random() < 0.4
        c = np.where(rng.random(length) < 0.3, np.log(0.5), -0.01)
        if bad:
            c[rng.integers(length)] = -1.2
        lists.append(c)
        gain.append(float(bad))
    return answers(*lists), np.zeros(n), np.array(gain)


@pytest.mark.parametrize("kind", ["mlp", "logistic"])
def test_a_learned_rule_finds_what_was_planted(kind):
    seen, q1, q2 = planted()
    rule = LearnedRule.learn(seen, q1, q2, learning=Learning(kind=kind, epochs=40, rate=1e-2))
    fresh, p1, p2 = planted(seed=1)
    found, _ = standings({"learned": rule.score(fresh), "sum": FixedRule("sum").score(fresh)}, p1, p2)
    assert found["learned"].oracle_share > 0.9 > found["sum"].oracle_share
    assert ((rule.score(fresh) > 0) & (rule.score(fresh) < 1)).all()
    assert rule.score(answers([], [-1.0]))[0] == math.inf


def test_members_learn_as_if_alone():
    seen, q1, q2 = planted(120)
    phi = features(seen)
    some = {"epochs": 8, "width": 4}
    together, told = Learning(seeds=(0, 1), **some).fit(phi, q1, q2)
    for member, seed in enumerate((0, 1)):
        alone, by_itself = Learning(seeds=(seed,), **some).fit(phi, q1, q2)
        for key in ("layer0", "layer1", "layer2"):
            np.testing.assert_allclose(together[key][member], alone[key][0], atol=1e-12)
        assert told["best_epochs"][member] == by_itself["best_epochs"][0]


def test_logistic_regression_by_hand():
    """One epoch of one batch: Adam's first step is its rate times the sign of the gradient."""
    phi, q1, q2 = np.repeat([[-1.0], [1.0]], 20, 0), np.zeros(40), np.repeat([0.0, 1.0], 20)
    learning = Learning(kind="logistic", seeds=(3,), epochs=1, batch=64, rate=0.1, decay=0.0)
    arrays, _ = learning.fit(phi, q1, q2)
    start = torch.rand(2, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1
    assert arrays["layer0"][0, 0, 0] - start[0, 0].item() == pytest.approx(0.1, abs=1e-6)  # more phi, more gain
    s = LearnedRule(arrays).arrays
    np.testing.assert_allclose(s["mean"], [0.0])
    np.testing.assert_allclose(s["scale"], [1.0])


def test_standardisation_and_a_constant_feature():
    seen, q1, q2 = planted(120)
    arrays, told = Learning(epochs=2).fit(features(seen), q1, q2)
    phi = features(seen)
    assert arrays["scale"][-1] == 0.0 and np.ptp(phi[:, -1]) == 0  # nothing was truncated
    np.testing.assert_allclose(arrays["scale"][:-1] * phi.std(0)[:-1], 1.0)
    assert told["examples"] == 120 and told["left_out"] == 0


def test_early_stopping_keeps_the_best_epoch():
    seen, q1, q2 = planted(200)
    _, told = Learning(epochs=200, patience=3, rate=1e-2, seeds=(0,)).fit(features(seen), q1, q2)
    (best,), (held,) = told["best_epochs"], told["held_out_areas"]
    _, cut = Learning(epochs=best, patience=3, rate=1e-2, seeds=(0,)).fit(features(seen), q1, q2)
    assert cut["held_out_areas"] == [held] and cut["best_epochs"] == [best]
    _, fewer = Learning(epochs=best - 1 or 1, patience=3, rate=1e-2, seeds=(0,)).fit(features(seen), q1, q2)
    assert best == 1 or fewer["held_out_areas"][0] < held


def test_nothing_to_learn_gives_the_fixed_rule():
    seen, q1, q2 = planted(60)
    with pytest.warns(RuntimeWarning, match="better on 0 of 60"):
        rule = LearnedRule.learn(seen, q2, q1, fallback=FixedRule("quantile", alpha=0.05))
    assert rule == FixedRule("quantile", alpha=0.05)
    with pytest.warns(RuntimeWarning, match="too few"):
        assert LearnedRule.learn(seen, q1, q1) == FixedRule()


def test_rows_that_cannot_be_learned_from_are_counted():
    seen, q1, q2 = planted(120)
    seen[3] = answers([])[0]
    q1[5] = math.nan
    rule = LearnedRule.learn(seen, q1, q2, learning=Learning(epochs=1))
    assert rule.told["left_out"] == 2 and rule.told["examples"] == 118


def test_only_whether_the_small_one_is_wrong():
    seen, q1, q2 = planted(120)
    q1[::2] = 1.0
    arrays, _ = Learning(epochs=2, seeds=(0,)).fit(features(seen), q1, q2)
    other, _ = Learning(epochs=2, seeds=(0,), predict="wrong").fit(features(seen), q1, q2)
    assert not np.allclose(arrays["layer0"], other["layer0"])


def test_a_saved_rule(tmp_path):
    seen, q1, q2 = planted(120)
    rule = LearnedRule.learn(seen, q1, q2, learning=Learning(epochs=3))
    again = LearnedRule.load(rule.save(tmp_path / "rule.safetensors"))
    np.testing.assert_array_equal(again.score(seen), rule.score(seen))
    assert again.told["examples"] == 120 and again.inputs == () and again.layer == 1
    with pytest.raises(ValueError, match="no saved deferral rule"):
        LearnedRule.load(tmp_path / "nothing")


# ---- the cascade


def plain(lm, n=1, sampling=SHORT):
    return decode(lm, LMGuide(lm=lm), PROMPTS, n=n, sampling=sampling)


def test_who_answers(monkeypatch):
    small, large = tiny.lm(0), tiny.lm(1)
    cascade = LMCascade(large=large, rule="sum")
    first, second = plain(small), plain(large)
    by_hand = [-t.policy_logps.sum() for (t,) in first]
    cascade = LMCascade(large=large, rule="sum", threshold=float(np.median(by_hand)))
    asked = []
    real = lm_cascades.decode
    monkeypatch.setattr(lm_cascades, "decode", lambda lm, *a, **k: asked.append((lm, list(a[1]))) or real(lm, *a, **k))
    drawn = cascade.generate(small, PROMPTS, sampling=SHORT)
    for i, (d,) in enumerate(drawn):
        deferred = by_hand[i] > cascade.threshold
        assert d.meta["answered_by"] == ("large" if deferred else "small")
        assert d.trace.completion_ids == (second if deferred else first)[i][0].completion_ids
        assert d.meta["score"] == pytest.approx(by_hand[i]) and d.trace.sampling["place"] == [i, 0]
        assert d.meta.get("small_answer") == (first[i][0].text if deferred else None)
        assert d.trace.sampling["model"] == ("tiny-1" if deferred else "tiny-0")
    deferred = [p for p, s in zip(PROMPTS, by_hand) if s > cascade.threshold]
    assert asked[1] == (large, deferred) and len(asked) == 2 and len(deferred) == 2


@pytest.mark.parametrize(("threshold", "who"), [(-math.inf, 1), (math.inf, 0)])
def test_limits_are_the_models_alone(threshold, who):
    pair = tiny.lm(0), tiny.lm(1)
    warm = Sampling(max_new_tokens=5)
    drawn = LMCascade(large=pair[1], threshold=threshold).generate(pair[0], PROMPTS, n=3, sampling=warm)
    for mine, alone in zip(drawn, plain(pair[who], 3, warm), strict=True):
        assert [d.trace.completion_ids for d in mine] == [t.completion_ids for t in alone]  # draw for draw


def test_a_sample_draws_alike_whoever_else_is_deferred():
    small, large, warm = tiny.lm(0), tiny.lm(1), Sampling(max_new_tokens=5)
    every = LMCascade(large=large, threshold=-math.inf).generate(small, PROMPTS, n=2, sampling=warm)
    scores = sorted(d.meta["score"] for row in every for d in row)
    some = LMCascade(large=large, threshold=scores[4]).generate(small, PROMPTS, n=2, sampling=warm)
    by_large = [(a, b) for r, q in zip(some, every) for a, b in zip(r, q) if a.meta["answered_by"] == "large"]
    assert len(by_large) == 3 and all(a.trace.completion_ids == b.trace.completion_ids for a, b in by_large)


def test_streams_what_is_answered():
    small, large, seen = tiny.lm(0), tiny.lm(1), []
    scores = sorted(-t.policy_logps.min() for row in plain(small, 2, Sampling(max_new_tokens=5)) for t in row)
    cascade = LMCascade(large=large, threshold=scores[3])
    drawn = cascade.generate(small, PROMPTS, n=2, sampling=Sampling(max_new_tokens=5), stream=seen.append)
    assert {d.meta["answered_by"] for row in drawn for d in row} == {"small", "large"}
    for i, row in enumerate(drawn):
        for k, d in enumerate(row):
            mine = [s for s in seen if (s.prompt, s.sample) == (i, k)]
            assert tuple(s.token for s in mine) == d.trace.completion_ids
            assert [s.ended for s in mine] == [False] * (len(mine) - 1) + [True]


def test_calibration():
    small, large = tiny.lm(0), tiny.lm(1)
    scores = sorted(max(-t.policy_logps) for (t,) in plain(small))
    cascade = LMCascade(large=large).calibrated(small, PROMPTS, 0.5, sampling=SHORT)
    assert cascade.threshold == pytest.approx((scores[1] + scores[2]) / 2)
    drawn = cascade.generate(small, PROMPTS, sampling=SHORT)
    assert sum(d.meta["answered_by"] == "large" for (d,) in drawn) == 2


def test_the_terminator_may_be_left_out():
    lm = tiny.lm()
    trace = lm.trace("the plot", "a", ended=True)
    empty = lm.trace_of_ids(trace.prompt_ids, [lm.terminator], ended=True)
    cut = lm.trace_of_ids(trace.prompt_ids, [50, 51], ended=False)
    with_eos = observe(lm, [trace, empty, cut], [FixedRule()])
    without = observe(lm, [trace, empty, cut], [FixedRule()], eos=False)
    assert [len(a.signals["logp"]) for a in with_eos] == [len(trace), 1, 2]
    assert [len(a.signals["logp"]) for a in without] == [len(trace) - 1, 0, 2]
    assert [a.truncated for a in without] == [False, False, True]
    assert FixedRule().score(without)[1] == math.inf > FixedRule().score(with_eos)[1]


def test_scores_are_of_temperature_one():
    small = tiny.lm()
    hot = Sampling(max_new_tokens=5, temperature=2.0, top_k=3)
    traces = [t for (t,) in plain(small, sampling=hot)]
    for answer, t in zip(observe(small, traces, [FixedRule()]), traces, strict=True):
        with torch.no_grad():
            logp = small.causal(torch.tensor([t.ids("all")])).logits[0].log_softmax(-1)
        at = range(len(t.prompt_ids) - 1, len(t.ids("all")) - 1)
        expected = [logp[k, token].item() for k, token in zip(at, t.completion_ids, strict=True)]
        np.testing.assert_allclose(answer.signals["logp"], expected, atol=1e-5)


def test_states():
    small, large = tiny.lm(0), tiny.lm(1, layers=4)
    traces = [t for (t,) in plain(small)]
    rule = LearnedRule({}, ("embed-1", "embed-2"), 2)
    seen = observe(small, traces, [rule], large=large, prompts=PROMPTS)
    for prompt, trace, answer in zip(PROMPTS, traces, seen, strict=True):
        with torch.no_grad():
            said = small.causal(torch.tensor([trace.ids("all")]), output_hidden_states=True).hidden_states[-1][0]
            ids = torch.tensor([large.encode_prompt(prompt)])
            inside = large.causal(ids, output_hidden_states=True).hidden_states[2][0, -1]
        mean = said[len(trace.prompt_ids) - 1 : -1].mean(0)
        np.testing.assert_allclose(answer.states["embed-1"], mean, atol=1e-5)
        np.testing.assert_allclose(answer.states["embed-2"], inside, atol=1e-5)
    with pytest.raises(ValueError, match="give large"):
        observe(small, traces, [rule])
    with pytest.raises(ValueError, match="from 1 to 3"):
        observe(small, traces, [LearnedRule({}, ("embed-2",), 4)], large=large, prompts=PROMPTS)


def test_only_the_first_layers_of_the_large_model_look():
    small, large, ran = tiny.lm(0), tiny.lm(1, layers=4), []
    for k, layer in enumerate(large.causal.model.layers):
        layer.register_forward_hook(lambda *_, k=k: ran.append(k))
    traces = [t for (t,) in plain(small)]
    observe(small, traces, [LearnedRule({}, ("embed-2",), 2)], large=large, prompts=PROMPTS)
    assert set(ran) == {0, 1}


def test_peeking_is_a_rule_of_two_stages():
    small, large = tiny.lm(0), tiny.lm(1)
    traces = [t for (t,) in plain(small)]
    width = 32
    arrays = {"mean": np.zeros(17 + width), "scale": np.ones(17 + width)}
    weights = np.zeros((1, 17 + width + 1, 1))
    weights[0, 17, 0] = 1.0  # the first number of the large model's state
    peek = LearnedRule(arrays | {"layer0": weights}, ("embed-2",), 1)
    first = np.array([max(-t.policy_logps) for t in traces])
    above = float(np.median(first))
    cascade = LMCascade(large=large, peek=peek, peek_above=above, threshold=0.0)
    score = cascade.scores(small, traces, PROMPTS, large)
    assert ((score == -math.inf) == (first <= above)).all()
    for i in np.flatnonzero(first > above):
        ids = torch.tensor([large.encode_prompt(PROMPTS[i])])
        with torch.no_grad():
            state = large.causal(ids, output_hidden_states=True).hidden_states[1][0, -1, 0].item()
        assert score[i] == pytest.approx(1 / (1 + math.exp(-state)), abs=1e-5)
    drawn = cascade.generate(small, PROMPTS, sampling=SHORT)
    assert [d.meta["answered_by"] == "large" for (d,) in drawn] == (first > above).tolist()
    assert all(d.meta["score"] is None for (d,), s in zip(drawn, score) if s == -math.inf)


def test_another_tokenizer_answers():
    small, large = tiny.lm(0), LM(tiny.llama(1, vocab=500), tiny.sentencepiece(), name="other")
    drawn = LMCascade(large=large, threshold=-math.inf).generate(small, PROMPTS, sampling=SHORT)
    assert all(d.trace.tokenizer == large.view.fingerprint for (d,) in drawn)
    with pytest.raises(ValueError, match="different tokenizers"):
        LMCascade(large=large).generate(small, [(5, 6)], sampling=SHORT)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="give large"):
        LMCascade().generate(tiny.lm(), PROMPTS)
    with pytest.raises(ValueError, match="no saved deferral rule"):
        LMCascade(large=tiny.lm(1), rule="meen").generate(tiny.lm(), PROMPTS, sampling=SHORT)
    with pytest.raises(ValueError, match="give numbers"):
        LMCascade(threshold=math.nan)
    with pytest.raises(ValueError, match="alpha"):
        LMCascade(alpha=2.0)
    for options, what in (
        ({"kind": "linear"}, "mlp or logistic"),
        ({"predict": "q1"}, "gain or wrong"),
        ({"target": "minmax"}, "not one of min-max, rank"),
        ({"seeds": ()}, "a seed or more"),
        ({"rate": math.nan}, "rate > 0"),
    ):
        with pytest.raises(ValueError, match=what):
            Learning(**options)
    with pytest.raises(ValueError, match="not one of min-max, rank"):
        targets([0.0, 1.0], "minmax")
