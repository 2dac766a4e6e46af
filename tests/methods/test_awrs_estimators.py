# pyright: reportArgumentType=false
"""Proper weighting by enumeration: every path of every estimator at every budget, with its probability."""

import math
from collections import Counter

import numpy as np
import pytest

from pertoken.generate._rejection import Draw, Pool, estimate, first_accepted, geometric, recursive, two_rounds
from tests.methods.awrs_by_enumeration import outcomes, sums_of_geometrics

INF = math.inf
P = (0.4, 0.3, 0.2, 0.1)
CASES = [(P, (0, 1, 0, 1)), (P, (1, 0, 1, 1)), (P, (0, 0, 0, 1)), ((0.9, 0.05, 0.05), (0, 1, 1)), ((0.7, 0.3), (1, 0))]
WAYS = {
    "A": lambda s, f: two_rounds(s, f),
    **{f"B{b}": lambda s, f, b=b: recursive(s, f, b) for b in (2, 3, INF)},
    **{f"C{m},{b}": lambda s, f, m=m, b=b: geometric(s, f, b, m) for m in (2, 3, 4) for b in (2, 3, INF)},
}


def moments(way, p, f):
    """E[w 1(x = v)] of each token, and Var[w]."""
    mean, second, total = np.zeros(len(p)), 0.0, 0.0
    defer = way.startswith("C") and way.endswith("inf")
    for draw, probability, source in outcomes(lambda s: WAYS[way](s, lambda v: bool(f[v])), p, defer=defer, cap=3):
        total += probability
        w, shares = np.array([math.exp(draw.logw)]), np.ones(1)
        if source.deferred and draw.token >= 0:  # w = (m - 1) / (m - 1 + r), r = the real rejects and the phantoms
            top = int(way[1]) - 1
            shares = sums_of_geometrics(tuple(sorted(source.deferred)))
            w = top / (top / w + np.arange(len(shares)))
        if draw.token >= 0:
            mean[draw.token] += probability * (shares * w).sum()
            second += probability * (shares * w**2).sum()
    assert total == pytest.approx(1, abs=1e-9)
    return mean, second - mean.sum() ** 2


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_proper(way):
    """The mean of w at each token is p f (so that of w is Z); nothing allowed: dead; all allowed: w is 1, always."""
    for p, f in CASES:
        np.testing.assert_allclose(moments(way, p, f)[0], np.multiply(p, f), atol=1e-9)
    assert not moments(way, P, (0, 0, 0, 0))[0].any()
    for draw, _, _ in outcomes(lambda s: WAYS[way](s, lambda v: True), P):
        assert draw.logw == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("way", "variance"), [("B2", 0.100), ("Binf", 0.050), ("C2,inf", 0.084), ("C4,inf", 0.032)])
def test_reference_variances(way, variance):
    """Of the authors' estimators on these four tokens; a coin flip on the first token has 0.24."""
    assert moments(way, P, (0, 1, 0, 1))[1] == pytest.approx(variance, abs=5e-4)


def test_by_hand():
    """p = (1/2, 1/2), only the first is allowed. A: order 0,(0) 1; 0,(1,0) 1/2; 1,0,(0) 1/4. B: 0, then 1: q = 1/2;
    1, then 0, the last with mass: 1 - 1/2."""
    p, f = (0.5, 0.5), lambda v: v == 0
    found = Counter()
    for draw, probability, _ in outcomes(lambda s: two_rounds(s, f), p):
        found[round(math.exp(draw.logw), 12)] += probability
    assert found == {1.0: 0.25, 0.5: 0.25, 0.25: 0.5}
    found = Counter()
    for draw, probability, _ in outcomes(lambda s: recursive(s, f), p):
        found[round(math.exp(draw.logw), 12)] += probability
    assert found == {0.5: 1.0}


def test_a_budget_of_two_leaves_one_try_after_a_reject():
    """p = (.5, .3, .2), the last two allowed, B: orders 0,1 and 0,2: w = 1 - .5, the third is not looked at; 1,0 and
    2,0: q; 1,2 and 2,1: 1."""

    def run(source):
        seen = []
        return recursive(source, lambda v: seen.append(v) or v > 0, 2), tuple(seen)

    wanted = {(0, 1): 0.5, (0, 2): 0.5, (1, 0): 0.3, (2, 0): 0.2, (1, 2): 1.0, (2, 1): 1.0}
    found = {seen: math.exp(draw.logw) for (draw, seen), _, _ in outcomes(run, (0.5, 0.3, 0.2))}
    assert found == pytest.approx(wanted)


def test_phantoms_fill_the_budget():
    """C, p = (.9, .1), the second allowed, budget 3: 0 is rejected; two phantoms or more (.9^2) reach the budget, and 1
    is not looked at."""

    def run(source):
        seen = []
        return geometric(source, lambda v: seen.append(v) or v == 1, 3), seen

    dead = 0.0
    for (draw, seen), probability, _ in outcomes(run, (0.9, 0.1)):
        if draw.token < 0:
            dead += probability
            assert seen == [0]
    assert dead == pytest.approx(0.9 * 0.9**2)


def test_locally_constrained_decoding_weighs_nothing():
    shares = np.zeros(4)
    for draw, probability, _ in outcomes(lambda s: first_accepted(s, lambda v: v in (1, 3)), P):
        assert draw.logw == 0
        shares[draw.token] += probability
    np.testing.assert_allclose(shares, [0, 0.75, 0, 0.25], atol=1e-12)
    draws = [draw for draw, _, _ in outcomes(lambda s: first_accepted(s, lambda v: v == 3, 1), P)]
    assert sorted(draws) == [(-1, -INF)] * 3 + [(3, 0.0)]


class Even:
    """A generator of uniforms that fill [0, 1) evenly: multiples of the golden ratio."""

    def __init__(self):
        self.k = 0

    def random(self):
        self.k += 1
        return self.k * (math.sqrt(5) - 1) / 2 % 1


def test_the_pool_draws_in_proportion():
    """Shares are weights; after a rejection, those of what is left."""
    weights = np.array([0.0, 2.0, 1.0, 0.0, 5.0])
    for rejected in ((), (4,), (1,), (1, 2)):
        pool = Pool(weights.copy(), Even())
        left = weights.copy()
        for token in rejected:
            pool.reject(token)
            left[token] = 0
        shares = np.bincount([pool.draw() for _ in range(2000)], minlength=5) / 2000
        np.testing.assert_allclose(shares, left / left.sum(), atol=0.005)
        assert pool.rest == pytest.approx(left.sum() / 8, rel=1e-15)


def test_visiting_order_is_that_of_gumbel_keys():
    """Orders of four tokens: 20,000 by the pool, against the probabilities of sampling without replacement; five
    standard errors, false alarms in less than one of 10,000."""
    rng, n = np.random.default_rng(0), 20000
    found = Counter()
    for _ in range(n):
        pool, order = Pool(np.array(P), rng), []
        while (token := pool.draw()) >= 0:
            order.append(token)
            pool.reject(token)
        found[tuple(order)] += 1
    assert len(found) == 24
    for order, count in found.items():
        left, p = 1.0, 1.0
        for token in order:
            p, left = p * P[token] / left, left - P[token]
        assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_what_is_left_stays_exact_when_almost_all_is_rejected():
    """The one allowed token has 1e-30 of the mass: 1 - R in doubles is 0, its weight is p all the same (B); all others
    are visited before it."""
    p = np.concatenate([[1e-30], np.geomspace(1, 1e-25, 40)])
    p /= p.sum()
    draw = estimate(p.copy(), lambda v: v == 0, np.random.default_rng(0), estimator="recursive")
    assert draw.token == 0 and draw.logw == pytest.approx(math.log(p[0]), rel=1e-12)
    draw = estimate(p.copy(), lambda v: v == 0, np.random.default_rng(0), estimator="geometric")
    assert draw.token == 0 and -75 < draw.logw < -60  # 1/(1 + phantoms) of the order of p
    assert estimate(p.copy(), lambda v: v == 0, np.random.default_rng(0), max_rejects=5) == Draw(-1, -INF)


def test_the_rest_may_be_the_least_of_doubles():
    """As at a very low temperature: 1 - R is 1e-309, and so many phantoms that no double holds their number; the weight
    stays a number near p."""
    p = np.array([1.0, 1e-309, 1e-309])
    for seed in range(20):
        draw = estimate(p.copy(), lambda v: v > 0, np.random.default_rng(seed), estimator="geometric")
        assert draw.token > 0 and -720 < draw.logw < -685


def test_one_allowed_token():
    """x is that token, and the mean of w its p: 2,000 runs each, five standard errors."""
    for how in ("two-round", "recursive", "geometric"):
        rng = np.random.default_rng(1)
        found = [estimate(np.array(P), lambda v: v == 2, rng, estimator=how) for _ in range(2000)]
        w = np.exp([d.logw for d in found])
        assert {d.token for d in found} == {2} and abs(w.mean() - 0.2) < 5 * w.std() / math.sqrt(2000) + 1e-12


def test_the_choice_of_estimator():
    """Up to 2/3 recursive: it looks at two tokens when the first is accepted; from there, and for more accepts,
    geometric: at one, if it is drawn twice."""

    def looks(p, **options):
        seen = []
        estimate(np.array(p), lambda v: seen.append(v) or True, Fixed(0.1), **options)
        return len(seen)

    assert looks([0.66, 0.34]) == 2 and looks([0.67, 0.33]) == 1 and looks([0.5, 0.5], max_accepts=3) == 1
    assert looks([6.6, 3.4]) == 2 and looks([6.7, 3.3]) == 1  # relative to the sum
    assert looks([0.5, 0.5], estimator="geometric") == 1 and looks([0.9, 0.1], estimator="recursive") == 2
    assert looks([0.5, 0.5], proper_weights=False) == 1


class Fixed:
    def __init__(self, u):
        self.u = u

    def random(self):
        return self.u


def test_nothing_to_draw_from():
    for p in (np.zeros(3), np.zeros(0)):
        for how in ("two-round", "recursive", "geometric"):
            assert estimate(p.copy(), lambda v: True, np.random.default_rng(0), estimator=how) == Draw(-1, -INF)
