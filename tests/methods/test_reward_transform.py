"""LSC by hand, its identities, references of every kind, and credit where the rewards stood."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from pertoken.core.credit import Credit
from pertoken.score.reward_transform import (
    References,
    RewardTransform,
    conjunction,
    disjunction,
    gamma_of_kl,
    kl_from_uniform,
    lsc,
    quantile_reference,
    tilted,
)
from pertoken.score.vader import Vader
from tests import tiny

LOGIT = {"scale": "Bradley-Terry logit"}


class Length:
    """A tenth of the text's length, as a logit on the last token."""

    def __init__(self, factor=0.1):
        self.factor = factor

    def score(self, items):
        return [Credit.of_sequence(t, self.factor * len(t.text), method="length", meta=LOGIT) for t in items]


class Letters:
    """1 a token that holds the letter, as token credit."""

    def __init__(self, letter):
        self.letter = letter

    def score(self, items):
        where = [[float(self.letter in p.decode("utf8", "replace")) for p in t.completion_pieces] for t in items]
        return [
            Credit(trace=t, values=np.array(w), method="letters", meta=LOGIT) for t, w in zip(items, where, strict=True)
        ]


def traces(texts=("the film", "a plot", "bad"), prompt="How?"):
    made = [tiny.lm(0).trace(prompt, text, row=i) for i, text in enumerate(texts)]
    return [dataclasses.replace(t, meta=t.meta | {"prompt": prompt}) for t in made]


def test_lsc_is_its_formula_and_its_slope():
    r = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    wanted = torch.nn.functional.logsigmoid(r - 1.5)
    np.testing.assert_allclose(lsc(r.detach().numpy(), 1.5), wanted.detach())
    (slope,) = torch.autograd.grad(wanted.sum(), r)
    h = 1e-6
    found = (lsc(r.detach().numpy() + h, 1.5) - lsc(r.detach().numpy() - h, 1.5)) / (2 * h)
    np.testing.assert_allclose(found, slope, atol=1e-8)
    np.testing.assert_allclose(slope, torch.sigmoid(1.5 - r).detach())


def test_identities():
    assert lsc(0.7, 0.7) == pytest.approx(-math.log(2))
    x = np.linspace(-50, 50, 101)
    assert (lsc(x, 3.0) <= 0).all() and (np.diff(lsc(x, 3.0)) > 0)[:90].all()
    assert lsc(-40.0, 3.0) - (-43.0) == pytest.approx(0.0, abs=1e-12)
    for far, slope in ((-800.0, 1.0), (50.0, math.exp(-50.0))):
        found = (lsc(far + 1e-3, 0.0) - lsc(far - 1e-3, 0.0)) / 2e-3
        assert np.isfinite(lsc(far, 0.0)) and found == pytest.approx(slope, rel=1e-5)
    rng = np.random.default_rng(0)
    r, ref = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    product = np.prod(1 / (1 + np.exp(ref - r)), 0)
    np.testing.assert_allclose(np.exp(conjunction(r, ref)), product)
    shift = rng.normal(size=8)
    np.testing.assert_allclose(conjunction(r + shift, ref + shift), conjunction(r, ref))
    np.testing.assert_allclose(np.exp(disjunction(r, ref)), 1 - np.prod(1 - 1 / (1 + np.exp(ref - r)), 0))
    for far in (-20.0, -40.0, -800.0):  # one of two: twice the probability of each, also where it underflows
        assert disjunction(np.full((2, 1), far), np.zeros((2, 1)))[0] == pytest.approx(far + math.log(2), rel=1e-9)


def test_the_tilted_policy_is_the_probability_to_a_power():
    rng = np.random.default_rng(1)
    r, ref = rng.normal(size=(2, 5)), np.zeros((2, 5))
    p = np.prod(1 / (1 + np.exp(-r)), 0)
    for gamma in (0.5, 1.0, 3.0):
        wanted = p ** (1 / gamma) / (p ** (1 / gamma)).sum()
        np.testing.assert_allclose(tilted(conjunction(r, ref)[None], gamma)[0], wanted)
    assert kl_from_uniform(np.full((1, 4), 0.25))[0] == pytest.approx(0.0)
    assert kl_from_uniform(np.array([[1.0, 0.0, 0.0, 0.0]]))[0] == pytest.approx(math.log(4))


def test_gamma_by_bisection():
    u = np.random.default_rng(2).normal(size=(30, 16))
    gamma = gamma_of_kl(u, 1.0)
    assert kl_from_uniform(tilted(u, gamma)).mean() == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match="no gamma reaches"):
        gamma_of_kl(u, 3.0)


def test_quantiles():
    x = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert quantile_reference(x, 0.85) == pytest.approx(np.quantile(x, 0.85)) == pytest.approx(4.4)
    assert quantile_reference(x, 0.5) == 3.0
    assert quantile_reference(x, 0.85, gaussian=True) == pytest.approx(3 + 1.0364334 * np.std(x), abs=1e-6)
    assert quantile_reference([2.0, 2.0], 0.85) == 2.0 and quantile_reference([7.0]) == 7.0
    with pytest.warns(UserWarning, match="of 3 samples"):
        assert quantile_reference([1.0, 2.0, 3.0], 0.85) == pytest.approx(2 + 1.0364334 * np.std([1, 2, 3]), abs=1e-6)
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite rewards"):
            quantile_reference(bad)


def test_references_are_made_once_from_the_base_policys_samples():
    samples = [traces(("aaa", "bbbbbb", "c", "dd", "eeee"), p) for p in ("one?", "two?")]
    scorer = RewardTransform(rewards=[Length()], q=0.5).refer(samples)
    assert scorer.references.of(samples[0][0]) == (pytest.approx(0.3),)
    found = scorer.score(traces(("abcd", "a" * 9), "one?"))
    np.testing.assert_allclose([c.reduce() for c in found], lsc([0.4, 0.9], 0.3))
    with pytest.raises(ValueError, match="row 0: its prompt has no reference"):
        scorer.score(traces(prompt="three?"))


def test_each_reward_may_have_a_reference_of_its_own_kind():
    """Helpfulness: a quantile of samples; harmlessness: the mean reward of canned answers."""
    samples, canned = [traces(("aaa", "bbbbbb", "c", "dd", "eeee"))], [traces(("no", "oh no no"))]
    scorer = RewardTransform(rewards=[Length(), Letters("o")], q=0.5).refer(samples, of=[0])
    with pytest.raises(ValueError, match="its prompt has no reference"):
        scorer.score(traces())
    scorer.refer(canned, of=[1], mean=True)
    rewards = [c.reduce() for c in Letters("o").score(canned[0])]
    assert scorer.references.of(samples[0][0]) == (pytest.approx(0.3), pytest.approx(np.mean(rewards)))
    assert np.ptp(rewards) > 0 and np.isfinite(scorer.score(traces())[0].reduce())


def test_a_conjunction_of_two_and_its_variants():
    items, refs = traces(), References(default=(0.5, 1.0))
    r = np.array([[0.1 * len(t.text) for t in items], [c.reduce() for c in Letters("o").score(items)]])
    ref = np.array([[0.5], [1.0]])
    both = RewardTransform(rewards=[Length(), Letters("o")], references=refs)
    np.testing.assert_allclose([c.reduce() for c in both.score(items)], conjunction(r, ref))
    values = lambda **o: [
        c.reduce() for c in RewardTransform(rewards=[Length(), Letters("o")], references=refs, **o).score(items)
    ]
    np.testing.assert_allclose(values(mode="any"), disjunction(r, ref))
    np.testing.assert_allclose(values(mode="raw", weights=(2.0, 1.0)), 2 * r[0] + r[1])
    np.testing.assert_allclose(values(mode="centred"), (r - ref).sum(0))
    np.testing.assert_allclose(values(floor=-0.4), np.maximum(lsc(r, ref), -0.4).sum(0))


def test_credit_stands_where_the_rewards_stood():
    (item,) = traces(("foo bar of",))
    credit = RewardTransform(rewards=[Letters("o"), Length()], references=References(default=(1.0, 1.0))).score([item])[
        0
    ]
    own = Letters("o").score([item])[0].values
    parts = list(credit.meta["parts"].values())
    wanted = parts[0] * own / own.sum()
    wanted[-1] += parts[1]
    np.testing.assert_allclose(credit.values, wanted)
    assert sum(parts) == pytest.approx(credit.reduce())


def test_one_reward_keeps_the_order_of_samples():
    items = traces(("a", "bbb", "cc", "ddddd"))
    scorer = RewardTransform(rewards=Length(), references=References(default=(0.2,)))
    raw = [c.reduce() for c in Length().score(items)]
    assert np.argsort(raw).tolist() == np.argsort([c.reduce() for c in scorer.score(items)]).tolist()


def test_scales_are_checked():
    refs = References(default=(0.0,))
    with pytest.warns(UserWarning, match="vader declares the scale 'compound"):
        RewardTransform(rewards=[Vader()], references=refs).score(traces())
    with pytest.warns(UserWarning, match="no scale"):
        RewardTransform(rewards=[lambda text: 1.0], references=refs).score(traces())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardTransform(rewards=[Length()], references=refs).score(traces())
        RewardTransform(rewards=[Vader()], mode="raw").score(traces())  # a plain sum asks for no scale


def test_bad_use():
    with pytest.raises(ValueError, match="give rewards"):
        RewardTransform().score(traces())
    with pytest.raises(ValueError, match="2 weights for 1"):
        RewardTransform(rewards=[Length()], weights=(1.0, 2.0)).score(traces())
    with pytest.raises(ValueError, match="2 references for 1"):
        RewardTransform(rewards=[Length()], references=References(default=(1.0, 2.0))).score(traces())
    with pytest.raises(ValueError, match="quantile"):
        RewardTransform(q=1.0)
    with pytest.raises(ValueError, match="mode='sum' is not one of all, any, raw, centred"):
        RewardTransform(mode="sum")
    with pytest.raises(ValueError, match="nan"):
        RewardTransform(rewards=[lambda text: float("nan")], references=References(default=(1.0,))).score(traces())
