"""Preference embeddings, the pairwise trainer and the Bradley-Terry fit, against arithmetic done another way."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from pertoken.core.pairwise import (
    HeadOptions,
    PairConfig,
    PreferenceHead,
    bt_embedding,
    cyclic_triples,
    fit_bradley_terry,
    fit_pairs,
    preference_loss,
    regression_loss,
    skew_score,
    skew_table,
)

RNG = np.random.default_rng(0)


def tensor(*shape, dtype=torch.float64):
    return torch.from_numpy(RNG.normal(size=shape)).to(dtype)


# ---- preference embeddings


def test_score_by_hand_and_by_the_matrix_of_the_paper():
    a, b, gate = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([0.5, 0.25])
    assert skew_score(a, b).item() == (1 * 6 - 2 * 5) + (3 * 8 - 4 * 7)
    assert skew_score(a, b, gate).item() == 0.5 * (1 * 6 - 2 * 5) + 0.25 * (3 * 8 - 4 * 7)
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    r, x, y = np.kron(np.eye(3), turn), tensor(5, 6), tensor(5, 6)
    expected = np.einsum("ij,nj,ni->n", r, x.numpy(), y.numpy())  # <R a, b>
    np.testing.assert_allclose(skew_score(x, y).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antisymmetric_to_the_bit(dtype):
    a, b, gate = tensor(200, 8, dtype=dtype), tensor(200, 8, dtype=dtype), tensor(200, 4, dtype=dtype).softmax(-1)
    assert torch.equal(skew_score(a, b, gate), -skew_score(b, a, gate)) and not skew_score(a, a, gate).any()
    table = skew_table(a, gate[0])
    assert torch.equal(table, -table.T) and not table.diagonal().any()
    one_by_one = skew_score(a[:, None], a[None], gate[0])
    torch.testing.assert_close(table, one_by_one, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)


def test_bradley_terry_is_an_embedding():
    r = tensor(7)
    torch.testing.assert_close(skew_table(bt_embedding(r)), r[:, None] - r[None], atol=1e-15, rtol=0)


def test_three_unit_vectors_make_the_cycle():
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    v = torch.stack([angles.cos(), angles.sin()], -1)
    table = skew_table(v)
    wanted = math.sin(2 * math.pi / 3)
    for i in range(3):
        assert table[i, (i + 1) % 3].item() == pytest.approx(wanted, abs=1e-12)
    assert cyclic_triples(table) == 1


def test_cyclic_triples_by_enumeration():
    table = skew_table(tensor(9, 6))
    count = sum(
        bool((table[i, j] > 0) == (table[j, k] > 0) == (table[k, i] > 0))
        for i, j, k in itertools.combinations(range(9), 3)
    )
    assert cyclic_triples(table) == count > 0
    assert cyclic_triples(skew_table(bt_embedding(tensor(9)))) == 0 and cyclic_triples(np.zeros((3, 3))) == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_skew_matrix_of_four_items_is_fitted_by_four_unnormalised_dimensions(seed):
    wanted = np.random.default_rng(seed).normal(size=(4, 4)) * 2
    wanted = torch.from_numpy(wanted - wanted.T)
    head = PreferenceHead(4, HeadOptions(dim=4, normalize=False), torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        head.embed.mul_(5)  # away from the saddle at 0
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = ((skew_table(head(torch.eye(4, dtype=torch.float64))) - wanted) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (skew_table(head(torch.eye(4, dtype=torch.float64))) - wanted).abs().max() < 1e-4


def test_losses_by_hand():
    s, margin = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.0])
    assert preference_loss(s, 0.1, margin).tolist() == pytest.approx(
        [math.log1p(math.exp(-2)), math.log1p(math.exp(2))]
    )
    assert preference_loss(torch.zeros(1), 0.1).item() == pytest.approx(math.log(2))
    assert regression_loss(s, 0.1).tolist() == pytest.approx([0.5 * 49, 0.5 * 144])
    head = PreferenceHead(3, HeadOptions(loss="regression"))
    assert head.losses(s).tolist() == pytest.approx([0.5 * 49, 0.5 * 144])


def test_head_shapes_and_first_weights():
    generator = torch.Generator().manual_seed(1)
    head = PreferenceHead(999, HeadOptions(dim=8, gate="softmax"), generator)
    assert head.embed.shape == (8, 999) and head.gate.shape == (4, 999)
    for weight in (head.embed, head.gate):
        assert weight.std().item() == pytest.approx(1e-3, rel=0.05) and abs(weight.mean().item()) < 5e-5
    again = PreferenceHead(999, HeadOptions(dim=8, gate="softmax"), torch.Generator().manual_seed(1))
    assert torch.equal(head.embed, again.embed)
    assert head(torch.randn(5, 999, generator=generator)).norm(dim=-1).tolist() == pytest.approx([1.0] * 5)
    h = torch.randn(5, 999, generator=generator)
    bt = PreferenceHead(999, HeadOptions(form="bt"), generator)
    torch.testing.assert_close(bt(h), torch.stack([h @ bt.embed[0], torch.ones(5)], -1))


def test_normalised_scores_are_bounded():
    head = PreferenceHead(6, HeadOptions(dim=4, gate="softmax"), torch.Generator().manual_seed(0))
    assert skew_table(head(tensor(50, 6) * 100)).abs().max() <= 1 + 1e-6
    assert not head(torch.zeros(1, 6)).any()  # of an empty completion


def test_gates():
    h = tensor(3, 16, dtype=torch.float32)
    soft, scaled = (
        PreferenceHead(16, HeadOptions(dim=6, gate=gate), torch.Generator().manual_seed(0))
        for gate in ("softmax", "scaled")
    )
    with torch.no_grad():
        soft.gate.mul_(50)
        scaled.gate.copy_(soft.gate)
    logits = h.double() @ soft.gate.detach().double().T
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(soft.gates(h).detach().double(), expected, atol=1e-5, rtol=1e-5)
    scale = (logits / 4).exp()
    torch.testing.assert_close(
        scaled.gates(h).detach().double(), 3 * scale / scale.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5
    )
    assert scaled.gates(h).mean(-1).tolist() == pytest.approx([1.0] * 3)
    assert PreferenceHead(16, HeadOptions()).gates(None) is None
    with pytest.raises(ValueError, match="reads the prompt"):
        soft.gates(None)


def test_learned_tau_starts_at_a_tenth_and_has_a_floor():
    head = PreferenceHead(2, HeadOptions(learn_tau=True))
    assert head.tau.item() == pytest.approx(math.log1p(math.exp(-2.25))) == pytest.approx(0.1002, abs=1e-4)
    preference_loss(torch.tensor([0.1]), head.tau).sum().backward()
    assert head.t.grad is not None and head.t.grad.item() != 0
    with torch.no_grad():
        head.t.fill_(-9.0)
    assert head.tau.item() == pytest.approx(0.01)
    assert PreferenceHead(2, HeadOptions(tau=0.7)).tau.item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 3}, "even dimension"),
        ({"dim": 0}, "even dimension"),
        ({"tau": 0.0}, "above 0"),
        ({"form": "elo"}, "gpm, bt"),
        ({"gate": "hard"}, "softmax, scaled"),
        ({"loss": "hinge"}, "preference, regression"),
        ({"form": "bt", "gate": "softmax"}, "drop it"),
        ({"tau": 1.0, "learn_tau": True}, "starts at 0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HeadOptions(**options)


def test_odd_dimension_is_refused():
    with pytest.raises(ValueError, match="even"):
        skew_score(tensor(3), tensor(3))
    with pytest.raises(ValueError, match="even"):
        skew_table(tensor(4, 5))


# ---- the trainer


def bt_losses(first, second, rows):
    return preference_loss(skew_score(first, second), 1.0)


def linear_pairs(n=60, b=300, width=5, seed=3):
    """Items whose order is a direction of their features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(b)])
    strength = x @ np.arange(1, width + 1)
    return x, np.where((strength[pairs[:, 0]] > strength[pairs[:, 1]])[:, None], pairs, pairs[:, ::-1])


def new_head(width=5, seed=0):
    return PreferenceHead(width, HeadOptions(form="bt"), torch.Generator().manual_seed(seed))


def test_trainer_is_the_plain_loop():
    x, pairs = linear_pairs()
    config = PairConfig(lr=0.05, batch_size=300, epochs=4, dev_share=0.0, optimizer="adam")
    head, by_hand = new_head(), new_head()
    found = fit_pairs(head, x, pairs, bt_losses, config)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    expected = []
    for _ in range(4):
        r = torch.from_numpy(x) @ by_hand.embed[0]
        loss = -torch.log(torch.sigmoid(r[pairs[:, 0]] - r[pairs[:, 1]])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert [h["loss"] for h in found.history] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(head.embed, by_hand.embed, atol=1e-5, rtol=1e-4)
    assert found.best == 3 and len(found.dev_rows) == 0 and len(found.train_rows) == 300


def test_same_seed_same_head_and_global_state_untouched():
    x, pairs = linear_pairs()
    before = torch.get_rng_state()
    heads = [new_head() for _ in range(3)]
    for head, seed in zip(heads, (1, 1, 2)):
        fit_pairs(head, x, pairs, bt_losses, PairConfig(lr=0.05, epochs=2, seed=seed))
    assert torch.equal(heads[0].embed, heads[1].embed) and not torch.equal(heads[0].embed, heads[2].embed)
    assert torch.equal(before, torch.get_rng_state())


def test_early_stopping_keeps_the_best_epoch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 60)).astype(np.float32)
    pairs = np.arange(80).reshape(40, 2)  # noise: more training is worse on the development share
    head, config = new_head(60), PairConfig(lr=0.05, batch_size=8, epochs=60, dev_share=0.25, patience=3)
    found = fit_pairs(head, x, pairs, bt_losses, config)
    dev = [h["dev_loss"] for h in found.history]
    assert len(dev) < 60 and found.best == int(np.argmin(dev)) and len(dev) == found.best + 4
    r = torch.from_numpy(x) @ head.embed[0]
    rows = pairs[found.dev_rows]
    now = -torch.nn.functional.logsigmoid(r[rows[:, 0]] - r[rows[:, 1]]).mean().item()
    assert now == pytest.approx(min(dev), rel=1e-4)


def test_the_split_takes_whole_groups():
    x, pairs = linear_pairs(b=100)
    groups = [i // 5 for i in range(100)]
    found = fit_pairs(new_head(), x, pairs, bt_losses, PairConfig(epochs=1, dev_share=0.2), groups=groups)
    dev = {groups[r] for r in found.dev_rows}
    assert len(dev) == 4 and len(found.dev_rows) == 20
    assert not dev & {groups[r] for r in found.train_rows} and len(found.train_rows) == 80


def test_an_encoder_is_called_once_an_item_and_is_trained():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 5)
            self.seen = []

        def forward(self, items):
            self.seen.append(items)
            return self.table(torch.tensor([ord(i) - ord("a") for i in items]))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder()
    before = encoder.table.weight.detach().clone()
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    config = PairConfig(lr=0.1, epochs=30, dev_share=0.0, batch_size=6)
    found = fit_pairs(new_head(), ["a", "b", "c", "d"], pairs, bt_losses, config, encoder=encoder)
    assert all(sorted(items) == ["a", "b", "c", "d"] for items in encoder.seen)
    assert found.history[-1]["loss"] < 0.2 and not torch.equal(before, encoder.table.weight)


def test_labels_are_looked_up_by_row():
    """Soft labels: the fitted difference is the log-odds of the label."""
    label = torch.tensor([0.8, 0.3])

    def losses(first, second, rows):
        s = skew_score(first, second)
        return nn.functional.binary_cross_entropy_with_logits(s, label[rows], reduction="none")

    head = new_head(2)
    x = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], np.float32)
    fit_pairs(head, x, [(0, 1), (2, 1)], losses, PairConfig(lr=0.05, epochs=400, dev_share=0.0))
    assert head.embed[0].tolist() == pytest.approx([math.log(4), math.log(3 / 7)], abs=1e-3)


def test_bad_pairs():
    x, pairs = linear_pairs()
    for wrong, message in (([], "at least one"), ([(0, 99)], "items up to 99"), ([(0, 1, 2)], "at least one")):
        with pytest.raises(ValueError, match=message):
            fit_pairs(new_head(), x, wrong, bt_losses)
    x[7] = np.nan
    with pytest.raises(ValueError, match=r"loss of pairs \["):
        fit_pairs(new_head(), x, pairs, bt_losses)
    with pytest.raises(ValueError, match="one side empty"):
        fit_pairs(new_head(), x, pairs, bt_losses, groups=["all"] * len(pairs))
    with pytest.raises(ValueError, match="give one each"):
        fit_pairs(new_head(), x, pairs, bt_losses, groups=["a"])
    for wrong in ({"lr": 0.0}, {"epochs": 0}, {"dev_share": 1.0}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError):
            PairConfig(**wrong)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PairConfig().lr = 1.0  # type: ignore[misc]


# ---- Bradley-Terry


def test_two_items_by_hand():
    """3 wins against 1: log 3, error sqrt(1/3 + 1/1)."""
    fit = fit_bradley_terry([(0, 1)] * 3 + [(1, 0)])
    assert fit.difference(0, 1) == pytest.approx((math.log(3), math.sqrt(4 / 3)), abs=1e-7)
    assert fit.scores_N.sum() == pytest.approx(0, abs=1e-12)
    assert fit.errors_N.tolist() == pytest.approx([math.sqrt(4 / 3) / 2] * 2)
    weighted = fit_bradley_terry([(0, 1), (1, 0)], weights_B=[3, 1])
    soft = fit_bradley_terry([(0, 1)], labels_B=[0.75], weights_B=[4])
    for other in (weighted, soft):
        assert other.difference(0, 1) == pytest.approx(fit.difference(0, 1), abs=1e-7)


def test_firth_by_hand():
    """Jeffreys' prior of one binomial adds half a win to either side; it is finite without a single loss."""
    for wins, losses in ((3, 1), (4, 0)):
        fit = fit_bradley_terry([(0, 1)] * wins + [(1, 0)] * losses, firth=True)
        assert fit.difference(0, 1)[0] == pytest.approx(math.log((wins + 0.5) / (losses + 0.5)), abs=1e-6)


def random_comparisons(n=7, b=80):
    rng = np.random.default_rng(5)
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(b)])
    return pairs, rng.choice([0.0, 1.0, 0.5, 0.7], b), rng.integers(1, 4, b).astype(float)


@pytest.mark.parametrize(
    "pairs", [[(0, 1)], [(0, 1), (1, 2), (2, 3)], [(0, k) for k in range(1, 6)], [(0, 1), (2, 1), (2, 3), (4, 3)]]
)
def test_firth_settles_on_sparse_data(pairs):
    """One comparison, a chain, a star, a tree: at the maximum the penalised score is 0, by finite differences."""
    found = fit_bradley_terry(pairs, firth=True).scores_N
    first, second = np.array(pairs).T
    n = int(np.max(pairs)) + 1

    def objective(s):
        p = 1 / (1 + np.exp(-(s[first] - s[second])))
        info = np.full((n, n), 1.0 / n)
        for a, b, v in zip(first, second, p * (1 - p), strict=True):
            info[a, a] += v
            info[b, b] += v
            info[a, b] -= v
            info[b, a] -= v
        return np.log(p).sum() + 0.5 * np.linalg.slogdet(info)[1]

    slopes = [(objective(found + h) - objective(found - h)) / 2e-5 for h in 1e-5 * np.eye(n)]
    np.testing.assert_allclose(slopes, 0, atol=1e-5)
    if pairs == [(0, 1)]:
        np.testing.assert_allclose(found, [np.log(3) / 2, -np.log(3) / 2])


@pytest.mark.parametrize("ridge, firth", [(0.0, False), (0.3, False), (0.0, True), (0.2, True)])
def test_against_a_general_optimiser(ridge, firth):
    pairs, y, w = random_comparisons()
    n = 7

    def negative(free):
        theta = np.append(free, -free.sum())
        x = theta[pairs[:, 0]] - theta[pairs[:, 1]]
        p = 1 / (1 + np.exp(-x))
        value = (w * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum() - ridge / 2 * (theta**2).sum()
        if firth:
            design = np.zeros((len(pairs), n))
            design[np.arange(len(pairs)), pairs[:, 0]], design[np.arange(len(pairs)), pairs[:, 1]] = 1, -1
            info = (design * (w * p * (1 - p))[:, None]).T @ design
            value += 0.5 * np.linalg.slogdet(info[:-1, :-1])[1]
        return -value

    best = optimize.minimize(negative, np.zeros(n - 1), method="BFGS", options={"gtol": 1e-8})
    fit = fit_bradley_terry(pairs, labels_B=y, weights_B=w, ridge=ridge, firth=firth)
    np.testing.assert_allclose(fit.scores_N, np.append(best.x, -best.x.sum()), atol=1e-4)


def test_errors_are_those_of_the_constrained_likelihood():
    pairs, y, w = random_comparisons()
    fit = fit_bradley_terry(pairs, labels_B=y, weights_B=w)
    design = np.zeros((len(pairs), 7))
    design[np.arange(len(pairs)), pairs[:, 0]], design[np.arange(len(pairs)), pairs[:, 1]] = 1, -1
    p = 1 / (1 + np.exp(-design @ fit.scores_N))
    info = (design * (w * p * (1 - p))[:, None]).T @ design
    np.testing.assert_allclose(fit.covariance_NN, np.linalg.pinv(info), atol=1e-9)
    free = np.linalg.inv(info[1:, 1:])  # item 0 fixed at 0
    assert fit.difference(3, 0)[1] == pytest.approx(math.sqrt(free[2, 2]))
    ridged = fit_bradley_terry(pairs, labels_B=y, weights_B=w, ridge=0.5)
    assert (ridged.errors_N < fit.errors_N).all() and np.abs(ridged.scores_N).sum() < np.abs(fit.scores_N).sum()
    np.testing.assert_allclose(ridged.covariance_NN.sum(0), 0, atol=1e-9)


def test_unconnected_items_are_named():
    pairs = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 3)]
    names = ["ant", "bee", "cat", "dog", "eel"]
    for options in ({}, {"ridge": 1.0}, {"firth": True}):
        with pytest.raises(ValueError, match="joins dog, eel to the other"):
            fit_bradley_terry(pairs, names=names, **options)
    with pytest.raises(ValueError, match="joins fox to"):
        fit_bradley_terry([*pairs, (2, 3)], names=[*names, "fox"], ridge=1.0)


def test_items_without_a_finite_strength_are_named():
    pairs = [(0, 1), (1, 2), (2, 0), (3, 0), (3, 1)]
    with pytest.raises(ValueError, match=r"^3 won .or lost. everything.*ridge or firth"):
        fit_bradley_terry(pairs)
    for options in ({"ridge": 0.1}, {"firth": True}):
        fit = fit_bradley_terry(pairs, **options)
        assert np.isfinite(fit.scores_N).all() and fit.scores_N.argmax() == 3
    assert np.isfinite(fit_bradley_terry(pairs, labels_B=[1, 1, 1, 0.9, 1]).scores_N).all()  # half a loss is one


def test_a_long_chain_does_not_recurse():
    n = 3000
    with pytest.raises(ValueError, match="and 2989 more"):
        fit_bradley_terry([(i, i + 1) for i in range(n - 1)])


def test_bad_comparisons():
    for pairs, options, message in (
        ([], {}, "at least one"),
        ([(0, 0)], {}, "two different"),
        ([(0, 1)], {"labels_B": [1.2]}, "probabilities"),
        ([(0, 1)], {"weights_B": [0.0]}, "above 0"),
        ([(0, 1)], {"labels_B": [1, 1]}, "as many labels"),
        ([(0, 5)], {"names": ["a", "b"]}, "as many labels"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_bradley_terry(pairs, **options)
