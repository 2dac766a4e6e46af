"""A log of thumbs: its shares, its labels, and pairs on prompts of their own; a tiny model writes the responses."""

from collections import Counter

import pytest

from pertoken.core.rollout import Sampling
from pertoken.worlds.thumbs import Source, shifted_thumbs
from tests import tiny

ASKED = {"train": [f"{'film' if i % 2 else 'score'} {i}" for i in range(50)], "test": ["film a", "score b", "film c"]}


def score(text):
    """Neither sign is rare, and some are 0."""
    return (sum(text.encode()) % 7) - 3.0


def source(**changes):
    options = {"lm": tiny.lm(), "score": score, "kind": lambda p: p.startswith("film")}
    return Source(**(options | {"sampling": Sampling(max_new_tokens=6)} | changes))


def made(seed=0, **changes):
    sizes = {"up": 20, "down": 10, "mostly": 0.9, "n_validation": 8, "n_test": 12}
    return shifted_thumbs(source(), ASKED, **(sizes | changes), seed=seed)


def test_shares_of_labels_and_kinds_are_those_asked_for():
    groups = made().train
    counts = Counter((bool(g.example.label), str(g.example.prompt).startswith("film")) for g in groups)
    assert counts == {(True, True): 18, (True, False): 2, (False, True): 1, (False, False): 9}
    for row, group in enumerate(groups):
        (trace,) = group.traces
        assert group.example.row == row and group.example.responses == (trace.text,)
        assert (score(trace.text) > 0) == group.example.label and score(trace.text) != 0
    labels = [g.example.label for g in groups]
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True), "up and down are mixed"


def test_pairs_are_of_one_prompt_that_nobody_trained_on_half_of_each_kind():
    thumbs = made()
    for pairs, n in ((thumbs.validation, 8), (thumbs.test, 12)):
        kinds = [str(g.example.prompt).startswith("film") for g in pairs]
        assert len(pairs) == n and all(kinds[: n // 2]) and not any(kinds[n // 2 :])
        assert all(score(g.traces[0].text) > 0 > score(g.traces[1].text) for g in pairs)
    asked = [{g.example.prompt for g in some} for some in (thumbs.train, thumbs.validation, thumbs.test)]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    assert asked[1] <= set(ASKED["train"][::5]) and asked[2] <= set(ASKED["test"])


def test_another_seed_is_another_log_with_the_same_pairs():
    one, two = made(seed=0), made(seed=1)
    ids = lambda groups: [[t.completion_ids for t in g.traces] for g in groups]
    assert ids(one.train) == ids(made(seed=0).train) != ids(two.train)
    assert ids(one.test) == ids(two.test) and ids(one.validation) == ids(two.validation)


def test_what_cannot_be_had_is_said():
    with pytest.raises(ValueError, match="of a kind and label"):
        shifted_thumbs(source(score=lambda text: -1.0), ASKED, up=4, down=1, n_test=2)
    with pytest.raises(ValueError, match="fewer than 12 pairs"):
        shifted_thumbs(source(), {**ASKED, "test": ["film a"]}, up=4, down=2, n_validation=2, n_test=12)
