# pyright: reportArgumentType=false
"""ClaPS: rewards by hand, influence and pruning identities, searches on a known landscape, and a real model."""

import math

import numpy as np
import pytest
import torch

from pertoken.explain.claps import (
    Asked,
    ClaPS,
    Task,
    calibrated,
    clustered,
    concentration,
    divergence,
    genetic,
    greedy,
    particles,
    prune,
    rewards,
    word_starts,
)
from tests import tiny

LOGITS = np.log(np.array([[[0.7, 0.3], [0.4, 0.6]], [[0.5, 0.5], [0.1, 0.9]]]))
LABELS = np.array([0, 0])
TASK = Task(("the plot was great", "a dull film", "good", "bad"), (1, 0, 1, 0), ("a", "b"), after=" so")


# ---- rewards


def test_rewards_by_hand():
    np.testing.assert_allclose(
        rewards(LOGITS, LABELS, "cross_entropy"), [np.log([0.7, 0.4]).mean(), np.log([0.5, 0.1]).mean()]
    )
    np.testing.assert_allclose(rewards(LOGITS, LABELS, "gap"), [(200 * 0.4 - 180 * 0.2) / 2, (0 - 180 * 0.8) / 2])
    h = lambda *p: -sum(x * math.log(x) for x in p)
    np.testing.assert_allclose(
        rewards(LOGITS, LABELS, "entropy"), [-h(0.7, 0.3) - h(0.4, 0.6), -h(0.5, 0.5) - h(0.1, 0.9)]
    )
    np.testing.assert_allclose(rewards(LOGITS + 7.0, LABELS, "gap"), rewards(LOGITS, LABELS, "gap"))
    with pytest.raises(ValueError, match="cross_entropy, gap"):
        rewards(LOGITS, LABELS, "x")


def test_the_releases_quirks():
    """Two softmaxes in a row; a rival that ties with the label is hidden, so that gap = p_label + 1."""
    twice = [[math.log(math.exp(p) / (math.exp(p) + math.exp(1 - p))) for p in row] for row in ((0.7, 0.4), (0.5, 0.1))]
    np.testing.assert_allclose(rewards(LOGITS, LABELS, "cross_entropy", compat=True), np.mean(twice, 1))
    found = rewards(LOGITS, LABELS, "gap", compat=True)
    np.testing.assert_allclose(found, [(200 * 0.4 - 180 * 0.2) / 2, (200 * 1.5 - 180 * 0.8) / 2])


def test_divergence_and_calibration():
    assert divergence(LOGITS, LOGITS[0])[0] == pytest.approx(0)
    wanted = (
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3) + 0.1 * math.log(0.1 / 0.4) + 0.9 * math.log(0.9 / 0.6)
    )
    assert divergence(LOGITS, LOGITS[0])[1] == pytest.approx(wanted)
    assert np.isfinite(divergence(np.array([[[-1e4, 0.0]]]), np.array([[0.0, -1e4]]))).all()
    rows = np.array([[1.0, 5.0], [3.0, 9.0]])
    np.testing.assert_allclose(calibrated(np.array([[2.0, 7.0]]), rows), [[0.0, 0.0]])
    np.testing.assert_allclose(calibrated(np.array([[3.0, 5.0]]), rows), [[1 / 2**0.5, -1 / 2**0.5]])
    with pytest.raises(ValueError, match="same logit"):
        calibrated(rows, np.ones((3, 2)))


# ---- pruning


def test_pruning():
    delta = np.array([0.1, 0.5, 0.2, 0.9, -0.3])
    assert prune(delta, 75).tolist() == [3] and prune(delta, 0).tolist() == [0, 1, 2, 3]
    assert prune(delta + 11.0, 75).tolist() == [3]
    ties = np.ones(4)
    assert prune(ties, 90).tolist() == [0, 1, 2, 3] and not len(prune(ties, 90, compat=True))
    assert concentration(np.ones(20)) == pytest.approx(0.1) and math.isnan(concentration(np.zeros(4)))
    assert concentration(np.array([9.0, -1, 0, 0, 0, 0, 0, 0, 0, 0])) == 0.9


def test_candidates_begin_words():
    lm = tiny.lm()
    found = word_starts(lm)
    assert found and all(lm.view.piece(i).startswith(b" ") and len(lm.view.piece(i)) > 1 for i in found)
    assert clustered(lm, found, len(found)) == sorted(found)
    some = clustered(lm, found, 4)
    assert 1 <= len(some) <= 4 and set(some) <= set(found) and some == clustered(lm, found, 4)


# ---- searches


POOL = np.arange(10, 20)
GOAL = (13, 17, 11)


def landscape(prompts):
    """Right tokens in their places."""
    return np.array([sum(a == b for a, b in zip(p, GOAL)) + 0.01 * (p[-1] == GOAL[len(p) - 1]) for p in prompts])


def test_greedy_takes_the_best_step_by_step():
    best, history = greedy(landscape, POOL, ClaPS(length=3), np.random.default_rng(0))
    assert best == [GOAL[:1], GOAL[:2], GOAL] and history == sorted(history)
    flat, _ = greedy(lambda prompts: np.zeros(len(prompts)), POOL, ClaPS(length=2), np.random.default_rng(0))
    assert flat[-1] == (10, 10)  # ties: the first


@pytest.mark.parametrize("search", [genetic, particles])
def test_evolution_finds_the_goal_and_repeats_itself(search):
    how = ClaPS(length=3, population=40, epochs=30)
    best, history = search(landscape, POOL, how, np.random.default_rng(1))
    again, _ = search(landscape, POOL, how, np.random.default_rng(1))
    assert best == again and len(history) == 30 and all(set(p) <= set(POOL.tolist()) for p in best)
    assert history[-1] >= 3 and history[-1] >= history[0]
    assert all(abs(landscape([p])[0] - h) < 1e-9 for p, h in zip(best, history))


# ---- on a model


def test_logits_are_those_of_a_plain_forward():
    lm = tiny.lm()
    asked = Asked(lm, TASK)
    prompts = [(), (40,), (41, 50)]
    found = asked.logits(prompts)
    for n, text in enumerate(TASK.texts):
        for k, p in enumerate(prompts):
            ids = [*lm.encode_completion(text, ended=False)[0], *p, *lm.encode_completion(" so", ended=False)[0]]
            with torch.no_grad():
                logits = lm.causal(torch.tensor([ids])).logits[0, -1]
            np.testing.assert_allclose(found[k, n], logits[asked.classes].double(), atol=1e-4)
    assert asked.evaluations == 3 and asked.examples == 12
    asked.logits(prompts)
    assert asked.evaluations == 3  # known ones are free
    assert asked.accuracy([()])[0] == np.mean(found[0].argmax(-1) == np.array(TASK.labels))


def test_a_tie_is_not_right():
    asked = Asked(tiny.lm(), TASK)
    asked._known[()] = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0], [0.0, 2.0]])  # labels 1 0 1 0
    assert asked.accuracy([()])[0] == 0.25 and asked.accuracy([(), ()]).tolist() == [0.25] * 2
    assert asked._known[()][0].tolist() == [1.0, 1.0]


def test_certainty_by_hand():
    asked = Asked(tiny.lm(), TASK)
    asked._known[()] = np.log([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [0.5, 0.5]])
    (top,), (entropy,) = asked.certainty([()])
    assert top == pytest.approx((0.5 + 0.75 + 0.9 + 0.5) / 4)
    told = [0.5, 0.5, 0.25, 0.75, 0.9, 0.1, 0.5, 0.5]
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in told))


def test_influences_of_a_prompt_are_credit():
    lm = tiny.lm()
    asked, prompt = Asked(lm, TASK), tuple(word_starts(lm)[:3])
    credit = ClaPS().credit(asked, prompt)
    base = rewards(asked.logits([()]), asked.labels, "cross_entropy")[0]
    wanted = [rewards(asked.logits([(t,)]), asked.labels, "cross_entropy")[0] - base for t in prompt]
    assert credit.trace.completion_ids == prompt and credit.kind == "attribution"
    assert credit.values == pytest.approx(wanted) and np.ptp(wanted) > 0


def test_a_greedy_prompt_of_one_token_is_the_most_influential():
    lm = tiny.lm()
    asked, method = Asked(lm, TASK), ClaPS(length=1)
    tokens = word_starts(lm)[:12]
    delta = method.influences(asked, tokens)
    found = method.find(asked, tokens)
    assert found.prompt == (tokens[int(np.argmax(delta))],)
    assert found.reward == pytest.approx(delta.max() + rewards(asked.logits([()]), asked.labels, "cross_entropy")[0])
    kl = ClaPS(influence="kl").influences(asked, tokens)
    assert (kl >= -1e-9).all() and kl.shape == delta.shape


def test_the_whole_method():
    lm = tiny.lm()
    found, report = ClaPS(clusters=8, percentile=50, length=2, search="genetic", population=8, epochs=3).run(
        lm, TASK, TASK
    )
    assert len(found.prompt) == 2 and report["kept"] <= report["tokens"] <= 8 and found.evaluations > 0
    assert report["influence_evaluations"] == report["tokens"] + 1 and len(found.text) > 0
    assert 0 <= report["accuracy"] <= 1 and 0.5 <= report["mean_top_probability"] <= 1 and report["entropy"] >= 0
    assert report["most_influential"][0][1] >= report["most_influential"][-1][1]


def test_bad_input():
    lm = tiny.lm()
    with pytest.raises(ValueError, match=r"is \d+ tokens \(.*\|"):
        Asked(lm, Task(("x", "y"), (0, 1), ("wonderfully", "b")))
    with pytest.raises(ValueError, match="give each class"):
        Task(("x",), (0,), ("a", "b"))
    with pytest.raises(ValueError, match="give indices"):
        Task(("x", "y", "z"), (0, 1, 2), ("a", "b"))
    with pytest.raises(ValueError, match="no token"):
        Asked(lm, Task(("", "y"), (0, 1), ("a", "b")))
    with pytest.raises(ValueError, match="no token is left"):
        ClaPS().find(Asked(lm, TASK), [])
    for bad in ({"length": 0}, {"percentile": 100.0}, {"search": "x"}, {"influence": "x"}, {"population": 2}):
        with pytest.raises(ValueError):
            ClaPS(**bad)
