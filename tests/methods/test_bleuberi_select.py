"""The choice of prompts: orders, ties, slices, seeds; a real model that answers them."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false

import numpy as np
import pytest

from pertoken.core.examples import Example
from pertoken.core.rollout import Sampling
from pertoken.score.bleuberi import Bleuberi
from pertoken.select.bleuberi_select import BleuberiSelect, agreement, chosen
from tests import tiny

SCORES = [0.5, 0.1, 0.9, 0.1, 0.7, 0.1]


def test_orders_by_hand():
    assert chosen(SCORES, 2) == [1, 3]  # ties keep the pool's order
    assert chosen(SCORES, 4) == [0, 1, 3, 5]
    assert chosen(SCORES, 2, "easy") == [2, 4]
    assert chosen(SCORES, 2, "medium") == [0, 5]  # the slice from (6 - 2) // 2 of 1, 3, 5, 0, 4, 2
    assert chosen(SCORES, 99) == [2, 4, 0, 1, 3, 5]
    assert chosen([float("nan"), 0.2], 1) == [0]


@pytest.mark.parametrize("how", ["hard", "easy", "medium", "random"])
def test_a_choice_and_the_rest_make_the_pool(how):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 40) / 5
    kept = chosen(scores, 13, how, seed=3)
    assert len(set(kept)) == 13 and set(kept) <= set(range(40))
    assert sorted(scores[kept], reverse=True) == list(scores[kept])
    assert chosen(scores, 13, how, seed=3) == kept


def test_hard_is_easy_of_negated_scores():
    scores = np.random.default_rng(1).normal(size=30)
    assert set(chosen(scores, 10, "hard")) == set(chosen(-scores, 10, "easy"))
    assert set(chosen(scores, 10, "random", 1)) != set(chosen(scores, 10, "random", 2))


def test_a_model_answers_the_pool():
    examples = [
        Example(prompt=f"film {i}?", kind="prompt", row=i, extra={"references": ["the film"]}) for i in range(4)
    ]
    options = {"lm": tiny.lm(0), "scorer": Bleuberi(), "keep": 2, "sampling": Sampling(max_new_tokens=4)}
    found = BleuberiSelect(**options).weights(examples)
    assert found.values.sum() == 2 and len(found.scores) == 4 and set(np.flatnonzero(found.values)) == set(found.order)
    assert found.provenance["how"] == "hard" and found.scores[list(found.order)].max() <= np.sort(found.scores)[1]
    again = BleuberiSelect(**options).weights(examples)
    np.testing.assert_array_equal(found.scores, again.scores)
    assert BleuberiSelect(keep=1, how="easy").pick(SCORES).order == (2,)


def test_bad_use():
    with pytest.raises(ValueError, match="give lm and scorer"):
        BleuberiSelect().weights([])
    with pytest.raises(ValueError, match="how='hardest' is not one of hard, easy"):
        BleuberiSelect(how="hardest")
    with pytest.raises(ValueError, match="1 or more"):
        BleuberiSelect(keep=0)


def test_agreement_is_the_share_of_shared_winners():
    assert agreement([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)], [0, 1, 0, 1]) == 0.5
