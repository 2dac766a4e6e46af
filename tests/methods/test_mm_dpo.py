"""MM-DPO: by hand, every identity of its specification, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.data import Group, encode
from pertoken.core.examples import Example
from pertoken.core.protocols import Batch
from pertoken.train.dpo import DPO
from pertoken.train.mm_dpo import COLUMN, MMDPO, Draws, batch_beta, dynamic_beta, ranked_pairs
from tests import tiny
from tests.methods import by_hand
from tests.methods.one_pass import exact_lm, gradient, pair_stats

ONE, INF, NAN = torch.ones((), dtype=torch.float64), math.inf, math.nan
MODELS = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def two(betas=(0.2, 0.05), **options):
    """Two pairs written down: margins 3 and -1; chosen means -1.5 (2 tokens) and -2 (1 token)."""
    policy = by_hand.stats([-1.0, -2.0], [-3.0], [-2.0], [-1.0, -1.5, -0.5])
    reference = by_hand.stats([-2.0, -3.0], [-2.0], [-2.0], [-1.5, -1.5, -1.0])
    columns = {COLUMN: f64(betas[0], NAN, betas[1], NAN)}  # the chosen's entry is the pair's
    batch = Batch(torch.tensor([[0, 1], [2, 3]]), columns)
    return MMDPO(**options).loss({"policy": policy, "reference": reference}, batch, None), policy


def sigmoid_loss(x):
    return math.log1p(math.exp(-x))


def test_loss_by_hand():
    loss, _ = two(gamma=0.25, dpo_alpha=2.0)
    preference = sigmoid_loss(0.2 * 3) + sigmoid_loss(0.05 * -1)
    assert loss.sum.item() == pytest.approx(2 * preference + 0.25 * (1.5 + 2.0), abs=1e-12) and loss.count == 2
    assert by_hand.mean(loss, "beta/mean") == pytest.approx(0.125) and by_hand.mean(loss, "sft/chosen") == 1.75


def test_sft_over_all_tokens_of_a_batch_is_the_releases():
    loss, policy = two(gamma=1.0, dpo_alpha=0.0, sft="batch")
    assert loss.sum.item() / loss.count == pytest.approx((1.0 + 2.0 + 2.0) / 3, abs=1e-12)
    grad = by_hand.gradient(loss, policy) / loss.count
    torch.testing.assert_close(grad[[0, 2]], f64(-1 / 3, -1 / 3, 0, -1 / 3, 0, 0).reshape(2, 3), atol=1e-12, rtol=0)
    assert not grad[[1, 3]].any()


def test_smoothing_is_in_the_standard_convention():
    smooth, _ = two(gamma=0.0, label_smoothing=0.2)
    expected = sum(0.8 * sigmoid_loss(z) + 0.2 * sigmoid_loss(-z) for z in (0.6, -0.05))
    assert smooth.sum.item() == pytest.approx(expected, abs=1e-12)
    assert MMDPO().label_smoothing == 0  # none: with the release's convention this would invert the objective


def test_rewards_are_logged_with_the_unscaled_beta():
    loss, _ = two(beta=0.1)
    assert by_hand.mean(loss, "rewards/chosen") == pytest.approx(0.1 * (2.0 + 0.0) / 2)
    assert by_hand.mean(loss, "rewards/margins") == pytest.approx(0.1 * (3.0 - 1.0) / 2)


def test_beta_gets_no_gradient():
    delta = f64(0.5, -0.5).requires_grad_()
    assert not dynamic_beta(delta).requires_grad
    betas = f64(0.2, NAN, 0.05, NAN).requires_grad_()
    policy = by_hand.stats([-1.0], [-3.0], [-2.0], [-1.0])
    batch = Batch(torch.tensor([[0, 1], [2, 3]]), {COLUMN: betas})
    loss = MMDPO().loss({"policy": policy, "reference": by_hand.stats([-1.0], [-1.0], [-1.0], [-1.0])}, batch, None)
    assert torch.autograd.grad(loss.sum, betas, allow_unused=True)[0] is None


def test_no_weight_is_dpo_to_the_bit():
    groups = tiny.groups(MODELS["policy"], n=4)
    objective = MMDPO(w=0.0, gamma=0.0, beta=0.1)
    stats, batch = pair_stats(objective, MODELS, groups)
    betas = dynamic_beta(torch.linspace(-40, 40, 8, dtype=torch.float64), beta=0.1, w=0.0, k=1e3)
    batch = Batch(batch.pairs_B2, {COLUMN: betas}, rows=batch.rows)
    found, wanted = objective.loss(stats, batch, None), DPO(beta=0.1).loss(stats, batch)
    assert torch.equal(found.sum, wanted.sum)
    policy = MODELS["policy"]
    torch.testing.assert_close(gradient(found.sum, policy), gradient(wanted.sum, policy), atol=1e-12, rtol=0)


def test_beta_of_delta():
    found = dynamic_beta(f64(0.0, 1.0, -1.0), beta=0.2, w=0.5, k=2.0).tolist()
    assert found[0] == 0.2
    assert found[1] == pytest.approx(0.2 * (1 + 0.5 * (1 - math.exp(-2))), abs=1e-12)
    assert found[2] == 1e-3  # 0.2 (1 + 0.5 (1 - e^2)) < 0


def test_beta_rises_within_its_bounds_to_its_limit():
    delta = torch.linspace(0, 30, 400, dtype=torch.float64)
    beta = dynamic_beta(delta, beta=0.2, w=0.7, k=0.5)
    assert beta[0] == 0.2 and (beta.diff() > 0).all() and beta[-1] < 0.2 * 1.7
    assert dynamic_beta(f64(1e3), beta=0.2, w=0.7, k=0.5).item() == pytest.approx(0.2 * 1.7, abs=1e-12)
    assert dynamic_beta(f64(1e-6, 3.0), beta=0.2, w=0.7, k=1e12).tolist() == pytest.approx([0.34, 0.34], abs=1e-12)
    below = dynamic_beta(torch.linspace(-30, 0, 400, dtype=torch.float64), beta=0.2, w=0.7, k=0.5)
    assert (below.diff() >= 0).all() and below.min() == 1e-3


def test_very_negative_missing_and_infinite_deltas():
    found = dynamic_beta(f64(-1e30, -5.0, NAN, INF, -INF), beta=0.1, w=0.01, k=0.5).tolist()
    lowest = 0.1 * (1 + 0.01 * (1 - math.exp(2.5)))  # delta counts as -5, which is not yet the floor
    assert found == pytest.approx([lowest, lowest, 0.1, 0.101, lowest], abs=1e-12)
    huge = dynamic_beta(torch.tensor([-5.0, 5.0]), k=1e30)
    assert torch.isfinite(huge).all() and huge[0] == pytest.approx(1e-3)


def test_batch_beta_by_hand():
    margins = [0.0, 1.0, 2.0, 3.0, 10.0]
    generator = torch.Generator().manual_seed(3)
    found = batch_beta(f64(*margins), 0.1, 0.5, generator).item()
    mean, choices = 3.2, []  # floor(0.8 * 5) = 4 are drawn: one is left out
    for left in margins:
        drawn = (sum(margins) - left) / 4
        choices.append(0.1 * (1 + 0.5 * (drawn - mean)))
    assert min(abs(found - c) for c in choices) < 1e-12
    assert batch_beta(f64(0.0, -1e6), 0.1, 0.5, generator).item() in (1e-3, pytest.approx(0.1 * (1 + 0.25 * 1e6)))


def test_batch_beta_draws_by_a_gaussian_of_the_standardised_margin():
    margins = f64(0.0, 0.1, 4.0)  # 2 of 3 are drawn
    z = (margins.numpy() - np.mean(margins.numpy())) / np.std(margins.numpy(), ddof=1)
    p = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    left_out = np.array(
        [sum(p[i] * p[j] / (1 - p[i]) for i, j in ((a, b), (b, a))) for a, b in ((1, 2), (0, 2), (0, 1))]
    )
    generator = torch.Generator().manual_seed(0)
    values = np.array([batch_beta(margins, 1.0, 1e-3, generator).item() for _ in range(4000)])
    expected = [1 + 1e-3 * ((4.1 - m) / 2 - 4.1 / 3) for m in (0.0, 0.1, 4.0)]
    seen = np.array([np.mean(np.abs(values - e) < 1e-9) for e in expected])
    assert seen.sum() == 1 and np.abs(seen - left_out).max() < 4 * np.sqrt(0.25 / 4000)


def test_batch_beta_does_not_depend_on_the_order_of_the_pairs():
    found = {
        batch_beta(f64(*order), 0.1, 0.5, torch.Generator().manual_seed(1)).item()
        for order in ((0.0, 1.0, 2.0, 3.0, 10.0), (10.0, 2.0, 0.0, 3.0, 1.0), (3.0, 1.0, 10.0, 0.0, 2.0))
    }
    assert len(found) == 1


def test_batch_beta_of_equal_margins_and_of_one():
    assert batch_beta(f64(2.0, 2.0, 2.0), 0.1, 0.5).item() == pytest.approx(0.1, abs=1e-12)
    with pytest.raises(ValueError, match="batch size"):
        batch_beta(f64(1.0), 0.1, 0.5)


def test_batch_beta_in_a_loss():
    groups = tiny.groups(MODELS["policy"], n=5)
    objective = MMDPO(mode="batch_beta", gamma=0.0, w=2.0)
    stats, batch = pair_stats(objective, MODELS, groups)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = objective.init_state(None)
    assert isinstance(state, Draws) and objective.batch_coupled and objective.stochastic
    torch.manual_seed(5)
    again = Draws()
    drawn = torch.get_rng_state()
    found = [objective.loss(stats, batch, state).sum.item() for _ in range(8)]
    assert len(set(found)) > 1, "each batch draws anew"
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(before, drawn), "from a generator of its own"
    for _ in range(5):
        objective.loss(stats, batch, again)
    resumed = Draws()
    resumed.load_state_dict(again.state_dict())
    assert [objective.loss(stats, batch, resumed).sum.item() for _ in range(3)] == found[5:]
    state.eval()
    assert objective.loss(stats, batch, state).sum.item() == DPO().loss(stats, batch).sum.item()


def pairs(*scores):
    return [Example(prompt=f"film {i}", responses=("good", "bad film"), scores=s, row=i) for i, s in enumerate(scores)]


class Prepared(SimpleNamespace):
    """What `prepare` is given, in its smallest form."""

    def __init__(self, scores, held=(), objective=None, **options):
        lm = tiny.lm()
        kept = [s if s is None or all(map(math.isfinite, s)) else (0.0, 0.0) for s in (*scores, *held)]
        groups = encode(pairs(*kept), lm)[0]
        for group, s in zip(groups, (*scores, *held), strict=True):
            object.__setattr__(group.example, "scores", s)  # such as groups that were not encoded may have
        super().__init__(groups=groups[: len(scores)], held_out=groups[len(scores) :], policy=lm, said=[])
        MMDPO(**options).prepare(self)

    @property
    def every(self) -> list[Group]:
        return [*self.groups, *self.held_out]

    def report(self, line):
        self.said.append(line)

    @property
    def betas(self):
        return [g.columns[COLUMN] for g in self.every]


def test_prepare_makes_the_column():
    run = Prepared([(2.0, 1.0), (1.0, 1.0), (0.0, 1.5)], held=[(4.0, 0.0)])
    expected = [0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * d))) for d in (1, 0, -1.5, 4)]
    assert run.betas == pytest.approx(expected, abs=1e-12)
    assert "delta <= 0 in 2 of 3" in run.said[-1]


def test_prepare_standardises_without_a_shift():
    run = Prepared([(2.0, 0.0), (0.0, 4.0), (6.0, 0.0)], held=[(1.0, 0.0)], standardize=True)
    unit = np.std([2.0, -4.0, 6.0])
    expected = [0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * d / unit))) for d in (2, -4, 6, 1)]
    assert run.betas == pytest.approx(expected, abs=1e-12)


def test_prepare_with_a_missing_column_or_number():
    with pytest.raises(ValueError, match="score_chosen"):
        Prepared([(2.0, 1.0), None])
    run = Prepared([(2.0, 1.0), (0.0, 1.0)], held=[None])  # people's own labels may be what is held out
    assert run.betas[2] == 0.1 and any("1 pairs have no finite delta (row 2 first)" in line for line in run.said)
    MMDPO().check(run.every)
    with pytest.raises(ValueError, match="row 2 has no scores"):
        MMDPO().check(run.held_out)
    run = Prepared([(NAN, 1.0), (2.0, 1.0), (INF, 1.0), (0.0, 1.0)])
    assert run.betas[0] == run.betas[2] == 0.1 and run.betas[1] > 0.1 > run.betas[3]
    assert sum("2 pairs have no finite delta (row 0 first)" in line for line in run.said) == 1
    run = Prepared([(NAN, NAN), (1.0, 0.0)], standardize=True)
    assert run.betas[0] == 0.1


def test_equal_deltas_are_explained():
    assert any("this is DPO" in line for line in Prepared([(2.0, 1.0), (3.0, 2.0)]).said)
    with pytest.raises(ValueError, match="no standard deviation"):
        Prepared([(2.0, 1.0), (3.0, 2.0)], standardize=True)


def test_disagreeing_pairs_are_dropped_and_counted():
    run = Prepared([(2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (NAN, 1.0)], held=[(0.0, 1.0)], drop_disagreeing=True)
    assert [g.example.row for g in run.groups] == [0, 3] and [g.example.row for g in run.held_out] == [4]
    assert any("2 training pairs" in line and "dropped" in line for line in run.said)
    with pytest.raises(ValueError, match="left no training pair"):
        Prepared([(1.0, 2.0)], drop_disagreeing=True)


def test_batch_beta_needs_no_scores():
    run = Prepared([None, None], mode="batch_beta")
    assert not any(COLUMN in g.columns for g in run.every)


def test_a_missing_column_in_the_loss_is_named():
    policy = by_hand.stats([-1.0], [-2.0])
    with pytest.raises(ValueError, match="run prepare"):
        MMDPO().loss({"policy": policy, "reference": policy}, by_hand.pairs(), None)


def test_all_comparisons_of_a_ranked_list():
    found = ranked_pairs("q", ["a", "b", "c", "d"], [2, 1, 2, 4], [0.5, 0.9, 0.4, 0.1], row=7)
    assert [e.responses for e in found] == [("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")]
    assert found[0].scores == (0.9, 0.5) and all(e.row == 7 and e.kind == "pair" for e in found)
    assert len(ranked_pairs("q", list("abcde"), [5, 3, 1, 2, 4])) == 10 and not ranked_pairs("q", ["a", "b"], [1, 1])
    assert ranked_pairs("q", ["a", "b"], [1, 2])[0].scores is None
    for wrong in (([1], None), ([1, 2], [0.5]), ([1, NAN], None)):
        with pytest.raises(ValueError, match="rank"):
            ranked_pairs("q", ["a", "b"], *wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 1e-4},
        {"beta": INF},
        {"w": -0.1},
        {"k": 0.0},
        {"gamma": -1.0},
        {"label_smoothing": 1.0},
        {"mode": "x"},
        {"sft": "x"},
    ],
)
def test_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MMDPO(**wrong)
