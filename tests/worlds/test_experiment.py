"""Pairs of a world keep the ids that were sampled; skipped prompts are counted."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import math

import numpy as np
import pytest

from pertoken.core.rollout import Sampling, sample
from pertoken.worlds import experiment
from pertoken.worlds.experiment import (
    GrammarPairs,
    best_and_worst,
    development_pairs,
    grammar_pairs,
    labelled_pairs,
)
from pertoken.worlds.grammar import GRAMMARS, prompts
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


def test_what_gives_no_pair_is_counted_and_the_first_of_equals_wins():
    lm = tiny.lm()
    drawn = [
        [lm.trace("a", text) for text in ("fine", "good", "bad", "well", "poor")],
        [lm.trace("a", "good"), lm.trace("a", "good")],
        [lm.trace("a", "good"), lm.trace("a", "well")],  # equal scores
        [lm.trace("a", "good"), lm.trace("a", "fine")],  # closer than the margin
        [lm.trace("a", "nan"), lm.trace("a", " "), lm.trace("a", "good")],
        [],
    ]
    score = {"good": 1.0, "well": 1.0, "fine": 0.5, "bad": -1.0, "poor": -1.0, "nan": math.nan}
    groups, lost = best_and_worst(drawn, lambda text: score[text.strip()], 1.0, "tiny")
    assert [(g.example.responses, g.example.scores) for g in groups] == [(("good", "bad"), (1.0, -1.0))]
    assert lost == {"empty": 1, "score not finite": 1, "fewer than two different": 3, "margin": 2}
    equal = best_and_worst(drawn[2:4], lambda text: score[text.strip()], 0.0, "tiny")
    assert len(equal[0]) == 1 and equal[1]["margin"] == 1  # a margin of 0 pairs 1.0 with 0.5, never equals


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


def test_labelled_pairs_are_texts_of_both_labels_after_one_prompt(tmp_path, monkeypatch):
    small = dataclasses.replace(GRAMMARS["slots45"], steps=2, batch=4)
    monkeypatch.setitem(GRAMMARS, "slots45", small)
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    world = labelled_pairs("slots45", n_train=60, n_held_out=20, progress=False)
    assert (len(world.train), len(world.held_out)) == (60, 20)
    asked = [{g.example.prompt for g in side} for side in (world.train, world.held_out)]
    assert asked[0] <= {*prompts(small)["train"]} and asked[1] <= {*prompts(small)["test"]}
    for group in world.train:
        chosen, rejected = group.pair
        assert chosen.ended and chosen.completion_ids != rejected.completion_ids
        assert group.example.scores == (world.truth(chosen).sum(), world.truth(rejected).sum())
    scores = np.array([g.example.scores for g in world.train])
    assert (scores[:, 0] > scores[:, 1]).mean() > 0.8  # nine slot words of ten match the label
    again = labelled_pairs("slots45", n_train=5, n_held_out=1, progress=False)
    assert [g.traces[0].completion_ids for g in again.train] == [g.traces[0].completion_ids for g in world.train[:5]]


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """The small language's model before its training, in place of the trained one (which takes a minute)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    grammar = GRAMMARS["lexicon64"]
    config = LlamaConfig(
        vocab_size=len(grammar.tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    grammar.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(experiment, "train_lm", lambda *args, **options: tmp_path)


def ids_of(groups):
    return [t.completion_ids for g in groups for t in g.traces]


def test_every_side_has_its_own_draw(untrained):
    sizes = {"n_train": 12, "n_held_out": 6, "max_new_tokens": 12}
    world, same, fresh = (grammar_pairs("lexicon64", held_out_seed=s, **sizes) for s in (None, 0, 2))
    assert len(world.train) == 12 and len(world.held_out) == 6
    assert ids_of(world.train) == ids_of(same.train) == ids_of(fresh.train)
    assert ids_of(world.held_out) == ids_of(same.held_out)
    assert not set(ids_of(world.held_out)) & set(ids_of(fresh.held_out))
    assert {g.prompt_ids for g in fresh.held_out} <= set(world.prompts)
    assert grammar_pairs("lexicon64", **(sizes | {"n_held_out": 0})).held_out == []


def test_development_pairs_share_prompts_with_training_and_no_response(untrained):
    drawn = grammar_pairs("lexicon64", n_train=11, n_held_out=0, seed=1)
    world = GrammarPairs(drawn.grammar, drawn.base, drawn.train[:1], [], [])  # trained on one pair of that draw
    pairs = development_pairs(world, 10)
    assert ids_of(pairs) == ids_of(drawn.train[1:]) and not {g.prompt_ids for g in pairs} & set(drawn.prompts)
    world.train.append(drawn.train[5])
    with pytest.raises(ValueError, match="2 pairs of seed 1 repeat training responses"):
        development_pairs(world, 10)
