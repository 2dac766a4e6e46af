"""A log of thumbs: its shares, its labels, and pairs on prompts of their own; a tiny model writes the responses."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

from collections import Counter

import pytest

from pertoken.core.rollout import Sampling
from pertoken.worlds.thumbs import Source, same_prompt_pairs, shifted_thumbs, split_prompts
from tests import tiny

ASKED = {"train": [f"{'film' if i % 2 else 'score'} {i}" for i in range(50)], "test": ["film a", "score b", "film c"]}

SPLIT = split_prompts(ASKED)


def score(text):
    """Neither sign is rare, and some are 0."""
    return (sum(text.encode()) % 7) - 3.0


def source(**changes):
    options = {"lm": tiny.lm(), "score": score, "kind": lambda p: p.startswith("film")}
    return Source(**(options | {"sampling": Sampling(max_new_tokens=6)} | changes))


def made(seed=0):
    return shifted_thumbs(source(), SPLIT["train"], up=20, down=10, mostly=0.9, seed=seed)


def test_shares_of_labels_and_kinds_are_those_asked_for():
    groups = made()
    counts = Counter((bool(g.example.label), str(g.example.prompt).startswith("film")) for g in groups)
    assert counts == {(True, True): 18, (True, False): 2, (False, True): 1, (False, False): 9}
    for row, group in enumerate(groups):
        (trace,) = group.traces
        assert group.example.row == row and group.example.responses == (trace.text,)
        assert (score(trace.text) > 0) == group.example.label and score(trace.text) != 0
    labels = [g.example.label for g in groups]
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True), "up and down are mixed"


def test_pairs_are_of_one_prompt_half_of_each_kind():
    pairs = same_prompt_pairs(source(), SPLIT["test"], 12)
    kinds = [str(g.example.prompt).startswith("film") for g in pairs]
    assert len(pairs) == 12 and all(kinds[:6]) and not any(kinds[6:])
    assert all(score(g.traces[0].text) > 0 > score(g.traces[1].text) for g in pairs)
    assert {g.example.prompt for g in pairs} <= set(ASKED["test"])


def test_every_fifth_training_prompt_is_for_validation():
    assert SPLIT["validation"] == ASKED["train"][::5] and SPLIT["test"] == ASKED["test"]
    assert sorted(SPLIT["validation"] + SPLIT["train"]) == sorted(ASKED["train"])


def test_another_seed_is_another_log():
    ids = lambda groups: [[t.completion_ids for t in g.traces] for g in groups]
    assert ids(made(seed=0)) == ids(made(seed=0)) != ids(made(seed=1))


def test_what_cannot_be_had_is_said():
    with pytest.raises(ValueError, match="of a kind and label"):
        shifted_thumbs(source(score=lambda text: -1.0), SPLIT["train"], up=4, down=1)
    with pytest.raises(ValueError, match="fewer than 12 pairs"):
        same_prompt_pairs(source(), ["film a"], 12)
