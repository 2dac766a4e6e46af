"""Sem-DPO: by hand, every identity of its specification, weights through preparation, drift, pairs, and bad input."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.data import encode, load_examples
from pertoken.core.loop import LoopConfig
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.train.dpo import DPO
from pertoken.train.sem_dpo import (
    SemDPO,
    choose_pairs,
    distance_of_similarity,
    effective_sample_size,
    mean_distance,
    sem_dpo_loss,
    semantic_weights,
    weighted_mean_distance,
)
from tests import tiny
from tests.methods.by_hand import gradient, mean, pairs, stats
from tests.methods.one_pass import exact_lm, pair_stats
from tests.methods.one_pass import gradient as gradient_of

WORDS = ("film", "plot", "shop", "dog")


def count(texts):
    """Vectors of a frozen encoder: how often each word stands in a text, so that cosines can be done in one's head."""
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], np.float64)


def weighted(batch, *weights):
    return dataclasses.replace(batch, columns={"semantic_weight": torch.tensor(weights, dtype=torch.float64)})


# ---- the loss


def given():
    """Two pairs with log-ratios 3, 1 and -1, 2."""
    ratios = (3.0, 1.0, -1.0, 2.0)
    return {"policy": stats(*([r - 1, -1.0] for r in ratios)), "reference": stats(*([-1.0, -1.0] for _ in ratios))}


def test_by_hand():
    """The mean is over pairs, not over weights."""
    loss = SemDPO(beta=0.5).loss(given(), weighted(pairs(2), 0.25, 0.25, 0.5, 0.5))
    wanted = 0.25 * math.log1p(math.exp(-0.5 * 2)) + 0.5 * math.log1p(math.exp(0.5 * 3))
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-12) and loss.count == 2
    assert mean(loss, "weight/mean") == 0.375 and mean(loss, "rewards/margins") == pytest.approx(0.5 * (2 - 3) / 2)


def test_the_gradient_is_dpos_times_the_weight_and_none_goes_through_it():
    s = given()
    found = gradient(SemDPO(beta=0.5).loss(s, weighted(pairs(2), 0.25, 0.25, 0.5, 0.5)), s["policy"])[:, 0]
    slopes = [0.25 * 0.5 / (1 + math.exp(1)), 0.5 * 0.5 / (1 + math.exp(-1.5))]
    assert found.tolist() == pytest.approx([-slopes[0], slopes[0], -slopes[1], slopes[1]])
    margin, w = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(sem_dpo_loss(margin, w).sum(), (margin, w), allow_unused=True)[1] is None


def test_a_of_0_is_exactly_dpo():
    models = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
    objective = SemDPO(a=0.0, beta=0.3)
    s, batch = pair_stats(objective, models, tiny.groups(models["policy"], n=4))
    ours, theirs = objective.loss(s, batch), DPO(beta=0.3).loss(s, batch)
    assert ours.sum.item() == theirs.sum.item() and ours.metrics.keys() == theirs.metrics.keys()
    policy = models["policy"]
    assert torch.equal(gradient_of(ours.sum, policy), gradient_of(theirs.sum, policy))
    assert (semantic_weights(np.array([0.0, 0.7, 2.0]), 0.0) == 1).all()


def test_the_column_is_the_chosen_responses_whatever_the_order_of_completions():
    swapped = Batch(torch.tensor([[1, 0], [3, 2]]))
    loss = SemDPO().loss(given(), weighted(swapped, 9.0, 0.25, 9.0, 0.5))
    wanted = 0.25 * math.log1p(math.exp(0.1 * 2)) + 0.5 * math.log1p(math.exp(-0.1 * 3))
    assert loss.sum.item() == pytest.approx(wanted)


# ---- weights


def test_weights_by_hand():
    assert semantic_weights(np.array([0.5, 1.0]), 2.0).tolist() == pytest.approx([math.exp(-1), math.exp(-2)])
    same, orthogonal, opposite = distance_of_similarity(np.array([1.0, 0.0, -1.0]))
    assert (same, orthogonal, opposite) == (0, 1, 2)
    assert semantic_weights(np.array([same, opposite]), 1.5).tolist() == pytest.approx([1, math.exp(-3)])
    assert distance_of_similarity(np.array([1 + 1e-9, -1 - 1e-9])).tolist() == [0, 2], "rounding is clipped"


@pytest.mark.parametrize("a", [0.5, 1, 4])
def test_a_chosen_response_that_means_the_prompt_weighs_1_and_its_opposite_exp_of_minus_2a(a):
    encode = lambda texts: np.array([{"x": [3.0, 4.0], "same": [3.0, 4.0], "not": [-6.0, -8.0]}[t] for t in texts])
    d = SemDPO(a=a, encode=encode).distances(["x", "x"], ["same", "not"])
    assert semantic_weights(d, a).tolist() == pytest.approx([1, math.exp(-2 * a)])
    assert SemDPO(a=a, encode=encode).weights(["x"], ["not"]) == pytest.approx([math.exp(-2 * a)])


def test_weights_do_not_depend_on_the_size_of_embeddings():
    texts = ["film plot", "film film dog", "shop"], ["film", "dog shop", "plot shop"]
    one = SemDPO(encode=count).distances(*texts)
    scaled = SemDPO(encode=lambda t: count(t) * np.linspace(0.1, 50, len(t))[:, None]).distances(*texts)
    np.testing.assert_allclose(scaled, one, atol=1e-12)
    assert one[0] == pytest.approx(1 - 1 / math.sqrt(2)) and one[1] == pytest.approx(1 - 1 / math.sqrt(10))


def test_effective_sample_size():
    assert effective_sample_size(np.array([0.5, 0.5, 1.0])) == pytest.approx(4 / 1.5)
    assert effective_sample_size(np.zeros(3)) == 0 and effective_sample_size(np.full(7, 1e-9)) == pytest.approx(7)
    rng = np.random.default_rng(0)
    assert all(effective_sample_size(rng.random(n) ** 8) <= n + 1e-9 for n in range(1, 40))


def test_the_weighted_distance_is_below_the_mean_and_falls_with_a():
    d = np.random.default_rng(0).uniform(0, 2, 50)
    curve = [weighted_mean_distance(d, a) for a in (0, 0.5, 1, 2, 4, 8, 1e4)]
    assert curve[0] == pytest.approx(d.mean()) == mean_distance(d) and (np.diff(curve) < 0).all()
    assert curve[-1] == pytest.approx(d.min()), "a large a keeps the nearest pair, without underflow"
    w = np.exp(-2 * d)
    assert weighted_mean_distance(d, 2) == pytest.approx((w * d).sum() / w.sum())
    assert weighted_mean_distance(np.full(3, 0.7), 3.0) == pytest.approx(0.7)
    assert weighted_mean_distance(np.array([0.2, np.nan]), 1.0) == 0.2 and math.isnan(mean_distance(np.array([np.nan])))


# ---- preparation


ROWS = [
    {"prompt": "film plot", "chosen": "film plot", "rejected": "dog"},
    {"prompt": "film plot", "chosen": "film dog", "rejected": "film plot"},
    {"prompt": "film", "chosen": "shop", "rejected": "film dog"},
    {"prompt": "dog", "chosen": "dog dog shop", "rejected": "plot"},
]
DISTANCES = [0, 0.5, 1, 1 - 2 / math.sqrt(5)]


def run_of(tmp_path, rows=ROWS, n_held_out=1, **options):
    lm = tiny.lm()
    groups, _ = encode(load_examples(rows, kind="pair")[0], lm)
    objective = SemDPO(**({"encode": count} | options))
    n = len(groups) - n_held_out
    return Run(
        slug="sem-dpo", objective=objective, policy=lm, groups=groups[:n], held_out=groups[n:],
        config=LoopConfig(lr=1e-3, batch_size=2, steps=2), out=tmp_path / "out", resolve=catalog.method, progress=False,
    )  # fmt: skip


def prepared(tmp_path, *args, **options):
    run = run_of(tmp_path, *args, **options)
    run.objective.prepare(run)
    return [g.columns["semantic_weight"] for g in run.every], run


def test_preparation_weighs_every_pair_by_its_words(tmp_path):
    weights, run = prepared(tmp_path, a=2.0)
    assert weights == pytest.approx([math.exp(-2 * d) for d in DISTANCES])
    (note,) = run.notes
    w = np.exp(-2 * np.array(DISTANCES[:3]))
    assert f"mean weight {w.mean():.4f}" in note and f"effective pairs {w.sum() ** 2 / (w**2).sum():.1f} of 3" in note
    assert f"chosen {0.5:.4f}, weighted {(w * DISTANCES[:3]).sum() / w.sum():.4f}" in note


def test_weights_depend_neither_on_the_rejected_response_nor_on_the_policy(tmp_path):
    first, _ = prepared(tmp_path / "a")
    other, _ = prepared(tmp_path / "b", [{**row, "rejected": "was great"} for row in ROWS])
    assert first == other
    run = run_of(tmp_path / "c")
    run.policy = tiny.lm(seed=5)
    run.objective.prepare(run)
    assert [g.columns["semantic_weight"] for g in run.every] == first


def test_another_encoder_changes_the_weights_alone(tmp_path):
    blind = lambda texts: np.ones((len(texts), 2))
    run, same = run_of(tmp_path / "a"), run_of(tmp_path / "b", encode=blind)
    for one in (run, same):
        one.objective.prepare(one)
    assert [g.columns["semantic_weight"] for g in same.every] == pytest.approx([1.0] * 4)
    assert run.groups[1].columns["semantic_weight"] == pytest.approx(math.exp(-0.5))
    s = given()
    with_weights = [one.objective.loss(s, weighted(pairs(2), 1.0, 1.0, 1.0, 1.0)) for one in (run, same)]
    assert with_weights[0].sum.item() == with_weights[1].sum.item()


def test_distances_are_kept_and_serve_every_a(tmp_path):
    calls = []

    class Watch:
        def identity(self):  # what it has seen is no part of what it is
            return "watch"

        def __call__(self, texts):
            calls.append(list(texts))
            return count(texts)

    weights = [prepared(tmp_path, encode=Watch(), a=a)[0] for a in (1.0, 4.0)]
    assert len(calls) == 1 and [w**4 for w in weights[0]] == pytest.approx(weights[1])
    assert calls[0][:4] == ["film plot", "film plot", "film", "dog"] and calls[0][4] == "film plot"


def test_normalized_weights_have_mean_1_over_the_training_pairs(tmp_path):
    plain, _ = prepared(tmp_path / "a", a=4.0)
    scaled, run = prepared(tmp_path / "b", a=4.0, normalize="mean1")
    assert np.mean(scaled[:3]) == pytest.approx(1) and np.allclose(np.divide(scaled, plain), 1 / np.mean(plain[:3]))
    assert f"mean weight {np.mean(plain[:3]):.4f}" in run.notes[0]


def test_the_weights_reach_the_loss_through_the_loop(tmp_path):
    """At the start every loss is log 2 times the weight, divided by the number of pairs."""
    run = run_of(tmp_path, ROWS[:3] + ROWS[:1], n_held_out=0, a=2.0)
    run.config = dataclasses.replace(run.config, batch_size=4, steps=1)
    final = run.go()["final"]
    wanted = np.mean(np.exp(-2 * np.array([*DISTANCES[:3], 0])))
    assert final["loss"] == pytest.approx(wanted * math.log(2), rel=1e-5)
    assert final["weight/mean"] == pytest.approx(wanted, rel=1e-6)


def test_texts_are_words_without_template_and_of_the_last_user_turn(tmp_path):
    seen: list[str] = []

    def watch(texts):
        seen.extend(texts)
        return count(texts)

    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "film"}]
    turns += [{"role": "assistant", "content": "A"}, {"role": "user", "content": "dog"}]
    said = lambda text: [{"role": "assistant", "content": text}]
    rows = [{"prompt": turns, "chosen": said("dog shop"), "rejected": said("no")}]
    prepared(tmp_path / "a", rows, 0, encode=watch)
    assert seen == ["dog", "dog shop"]
    seen.clear()
    prepared(tmp_path / "b", rows, 0, encode=watch, turns="all")
    assert seen == ["film\ndog", "dog shop"]


def test_similarity_and_distance_are_told_apart_by_name(tmp_path):
    by_length = lambda prompts, chosen: np.array([float(len(a) == len(b)) for a, b in zip(prompts, chosen)])
    similar, _ = prepared(tmp_path / "a", encode=None, similarity=by_length)
    distant, _ = prepared(tmp_path / "b", encode=None, distance=lambda p, c: 1 - by_length(p, c))
    assert similar == distant == pytest.approx([1, math.exp(-1)] * 2)
    for wrong, named in (({"similarity": lambda p, c: np.full(len(p), 1.7)}, "distance="),
                         ({"distance": lambda p, c: np.full(len(p), -0.4)}, "similarity=")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            prepared(tmp_path / named, encode=None, **wrong)


# ---- pitfalls


def test_a_text_without_direction_weighs_0_and_is_counted(tmp_path):
    rows = [*ROWS[:3], {"prompt": "film", "chosen": "was great", "rejected": "dog"}, {**ROWS[3], "prompt": "unknown"}]
    weights, run = prepared(tmp_path, rows, 0)
    assert weights[3:] == [0, 0] and all(w > 0 for w in weights[:3])
    assert any("2 pairs have no direction" in note for note in run.notes)
    constant = lambda texts: np.ones((len(texts), 2))
    d = SemDPO(encode=constant).distances(["x", "", "x"], ["y", "y", " "])
    assert abs(d[0]) < 1e-12 and np.isnan(d[1:]).all(), "no words, whatever an encoder makes of that"
    assert semantic_weights(d).tolist() == pytest.approx([1, 0, 0])


def test_weights_that_train_next_to_nothing_are_warned_about(tmp_path):
    _, run = prepared(tmp_path / "a", [ROWS[2]] * 3, 0, a=4.0)
    assert any("mean weight is below" in note for note in run.notes) and not any("effective," in n for n in run.notes)
    rows = [ROWS[0]] + [ROWS[2]] * 29
    _, run = prepared(tmp_path / "b", rows, 0, a=20.0)
    assert any("fewer than 10% of the pairs are effective" in note for note in run.notes)
    _, run = prepared(tmp_path / "c", [ROWS[2]] * 3, 0, a=4.0, normalize="mean1")
    assert len(run.notes) == 1, "all alike, and normalised: nothing is wrong"
    _, run = prepared(tmp_path / "d", a=1.0)
    assert len(run.notes) == 1


@pytest.mark.parametrize("long, said", [("chunk", "averaged over windows"), ("truncate", "their beginning alone")])
def test_texts_beyond_the_window_are_reported_also_when_they_are_known(tmp_path, long, said):
    class Windows:
        def __call__(self, texts):
            return count(texts)

        def too_long(self, texts):
            return sum(len(t.split()) > 2 for t in texts)

    for _ in range(2):  # the second time from the stage
        run = run_of(tmp_path, encode=Windows(), long=long)
        run.objective.prepare(run)
        assert any("1 texts lie beyond" in note and said in note for note in run.notes)


def test_choosing_pairs_by_any_scorer():
    prompts = ["p", "q", "r", "s", "t"]
    rewrites = [["aa", "a", "aaaa"], ["b", " ", "bbb", "nan"], ["c", "d"], [], ["e" * 4, "e" * 2]]
    asked = []

    def scorer(prompt, texts):
        asked.append((prompt, list(texts)))
        return [math.nan if text == "nan" else len(text) for text in texts]

    found, lost = choose_pairs(prompts, rewrites, scorer, margin=2.0)
    assert [tuple(choice) for choice in found] == [(0, 2, 1, (4, 1)), (1, 2, 0, (3, 1)), (4, 0, 1, (4, 2))]
    assert lost == {"empty": 1, "score not finite": 1, "margin": 2}
    assert asked[1] == ("q", ["b", "bbb", "nan"]) and len(asked) == 4
    assert len(choose_pairs(prompts, rewrites, scorer, margin=2.5)[0]) == 1
    assert choose_pairs(["p"], [["a", "b"]], lambda p, t: [0.0, 0.0])[0] == [], "equal scores make no pair"


def test_options_and_what_is_missing():
    wrongs: list[dict[str, Any]] = [
        {"beta": 0.0},
        {"a": -1.0},
        {"normalize": "sum"},
        {"long": "cut"},
        {"turns": "first"},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            SemDPO(**wrong)
    with pytest.raises(ValueError, match="one of encode, similarity and distance"):
        SemDPO(encode=count, similarity=count)
    with pytest.raises(ValueError, match=r"semantic_weight.*a=0"):
        SemDPO().loss(given(), pairs(2))
    assert (SemDPO().a, SemDPO().beta, SemDPO().normalize, SemDPO().turns) == (1.0, 0.1, "none", "last")
