"""Pairs of a world keep the ids that were sampled; skipped prompts are counted."""

import numpy as np
import pytest

from pertoken.core.rollout import Sampling, sample
from pertoken.worlds.experiment import GrammarPairs, best_and_worst
from pertoken.worlds.grammar import GRAMMARS
from tests import tiny


def test_best_and_worst_are_the_sampled_ids():
    lm = tiny.lm()
    drawn = sample(lm, ["how was it", "the film"], 4, Sampling(max_new_tokens=6), seed=0)
    groups, skipped = best_and_worst(drawn, lambda text: float(len(text)), 1.0, "tiny")
    assert groups and sum(skipped.values()) + len(groups) == 2
    for group in groups:
        traces = next(ts for ts in drawn if ts[0].prompt_ids == group.prompt_ids)
        sizes = {t.completion_ids: len(t.text) for t in traces}
        assert group.traces[0].completion_ids in sizes and group.example.prompt in ("how was it", "the film")
        assert len(group.traces[0].text) == max(sizes.values()) and len(group.traces[1].text) == min(sizes.values())
        assert group.example.scores == tuple(float(len(t.text)) for t in group.traces)


def test_prompts_without_a_pair_are_counted():
    lm = tiny.lm()
    same = lm.trace("a", "b")
    groups, skipped = best_and_worst([[same, same], [same, lm.trace("a", "c")]], lambda text: 0.0, 0.1, "tiny")
    assert groups == [] and skipped == {"fewer than two different": 1, "margin": 1}


@pytest.mark.parametrize("ended", [True, False])
def test_truth_stands_on_every_token(ended):
    grammar = GRAMMARS["lexicon64"]
    tokenizer = grammar.tokenizer()
    word = next(iter(grammar.lexicon))
    lm = tiny.lm()
    world = GrammarPairs(grammar, "", [], [], [])
    ids = tokenizer.encode(f" the {word} .")
    pieces = [f" {w}".encode() for w in ("the", word, ".")] + ([b""] if ended else [])
    trace = lm.trace_of_ids([3], ids + [2] * ended, pieces, ended=ended)
    truth = world.truth(trace)
    assert truth.shape == (len(trace),)
    np.testing.assert_array_equal(truth, [0, grammar.lexicon[word], 0] + [0] * ended)
