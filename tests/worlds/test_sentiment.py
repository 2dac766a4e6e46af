"""The sentiment world: its prompts, its pairs, its known credit, and the measure of a credit's quality."""

import math
from typing import Any

import numpy as np
import pytest

from pertoken.core.credit import Credit
from pertoken.core.trace import Trace
from pertoken.score import vader
from pertoken.worlds import sentiment
from pertoken.worlds.quality import credit_quality


def cut(*pieces, **given: Any):
    data = tuple(p.encode() if isinstance(p, str) else p for p in pieces)
    options: dict[str, Any] = {"prompt_ids": (7,), "prompt_pieces": (b"How was it?",), "tokenizer": "toy"} | given
    return Trace(completion_ids=tuple(range(len(data))), completion_pieces=data, **options)


def labels(text):
    data = text.encode("utf-8", "surrogateescape")
    found = [(data.find(w), data.find(w) + len(w), s) for w, s in ((b"yes", 1), (b"no", -1))]
    return [f for f in found if f[0] >= 0]


def test_prompts_are_many_distinct_and_split_for_good():
    split = sentiment.prompts()
    train, test = split["train"], split["test"]
    assert len(train) + len(test) >= 220 and len({*train, *test}) == len(train) + len(test)
    assert 0.7 < len(train) / (len(train) + len(test)) < 0.8
    assert all(p == p.strip() and len(p) > 20 for p in train + test)
    assert split == sentiment.prompts()
    assert [m["role"] for m in sentiment.messages(train[0])] == ["system", "user"]


def test_prompts_carry_no_sentiment():
    pytest.importorskip("vaderSentiment", reason="pip install 'pertoken[sentiment]'")
    split = sentiment.prompts()
    assert [p for p in split["train"] + split["test"] if vader.lexicon_labels(p)] == []


def test_truth_marks_the_tokens_of_a_word():
    trace = cut("oh", " y", "es", b"\xf0\x9f", " no", b"", ended=True)
    truth = sentiment.lexicon_truth(trace, labels)
    assert truth.dtype == np.int8 and truth.tolist() == [0, 1, 1, 0, -1, 0]
    assert sentiment.lexicon_truth(cut("yes", " no", emitted=(True, False)), labels).tolist() == [1, 0]
    assert sentiment.lexicon_truth(cut("yes no"), labels).tolist() == [1]  # the longer share wins
    assert sentiment.lexicon_truth(cut(), labels).shape == (0,)


def credit(values, **options):
    return Credit(trace=cut(*["x"] * len(values), **options), values=np.array(values, float))


def test_quality_by_hand():
    got = credit_quality([credit([3, 1, 0, 2]), credit([1, -1])], [np.array([1, -1, 0, 0]), np.array([1, -1])])
    # positives 3, 1; negatives 1, -1; neutral 0, 2: the pairs are 3>1, 3>-1, 1=1, 1>-1
    expected = {"auc": 3.5 / 4, "gap": 2.0, "d_prime": 2.0, "n_pos": 2, "n_neg": 2, "n_neutral": 2}
    assert got == pytest.approx(expected)


def test_quality_counts_all_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    values, truth = rng.integers(-5, 6, 300) + 0.0, rng.integers(-1, 2, 300)
    values += truth
    auc = credit_quality([credit(values)], [truth])["auc"]
    pos, neg = values[truth > 0][:, None], values[truth < 0]
    assert auc == pytest.approx((pos > neg).mean() + (pos == neg).mean() / 2)


def test_quality_leaves_out_terminators_and_given_tokens_and_says_nan():
    trace = cut("x", "y", "z", "tool", b"", ended=True, emitted=(True, True, True, False, True))
    odd = Credit(trace=trace, values=np.array([1.0, 0, 0, 0, 99]))
    got = credit_quality([odd], [np.array([1, 0, 0, -1, 0])])
    assert (got["n_pos"], got["n_neg"], got["n_neutral"]) == (1, 0, 2)
    assert math.isnan(got["auc"]) and math.isnan(got["gap"]) and math.isnan(got["d_prime"])
    assert credit_quality([], [])["n_pos"] == 0
    with pytest.raises(ValueError, match="one label a completion token"):
        credit_quality([odd], [np.zeros(2)])
    with pytest.raises(ValueError, match="1 credits but 0 truths"):
        credit_quality([odd], [])
