"""The captions world: what a rewrite kept, the judge that never sees the prompt, and candidates of other prompts."""

import numpy as np
import pytest

from pertoken.core.rollout import Sampling, sample
from pertoken.worlds.captions import CAPTIONS, content_words, kept, plant, planted_pairs, style_score
from pertoken.worlds.grammar import prompts
from tests import tiny

PROMPT = " a tiny fox reading near the castle :"


def test_what_a_rewrite_keeps():
    assert content_words(PROMPT) == ["tiny", "fox", "reading", "castle"]
    assert kept(PROMPT, " a tiny fox reading near the castle , ornate .") == 1
    assert kept(PROMPT, "A Fox, reading.") == 0.5 and kept(PROMPT, " a wet dog near the beach .") == 0


def test_the_judge_counts_different_words_and_those_of_style_twice():
    assert style_score(" a fox , golden light .") == 4 + 2
    assert style_score("A fox! Ornate, oil painting, ORNATE...") == 5 + 3
    assert style_score("") == 0


def test_rewrites_of_the_language_keep_their_prompt_nine_times_in_ten():
    reviews = CAPTIONS.sample(2000, np.random.default_rng(0))
    share = np.array([kept(" ".join(r.prompt), " ".join(r.completion)) for r in reviews])
    assert 0.87 < (share >= 0.75).mean() < 0.95 and 0.05 < (share < 0.5).mean() < 0.13
    assert not set(prompts(CAPTIONS)["train"]) & set(prompts(CAPTIONS)["test"])
    assert not set(CAPTIONS.lexicon) & {w for r in reviews for w in r.prompt}, "style says nothing about a topic"


def test_planted_candidates_are_the_richest_of_other_prompts_with_their_ids():
    lm = tiny.lm()
    asked = ["how was it", "the film", "a score"]
    drawn = sample(lm, asked, 3, Sampling(max_new_tokens=6), seed=0)
    out = plant(lm, asked, drawn, 1, np.random.default_rng(0))
    richest = [max(traces, key=lambda t: style_score(t.text)).completion_ids for traces in drawn]
    for i, traces in enumerate(out):
        assert [t.completion_ids for t in traces[:3]] == [t.completion_ids for t in drawn[i]]
        assert [t.meta.get("planted", False) for t in traces] == [False] * 3 + [True]
        assert {t.meta["prompt"] for t in traces} == {asked[i]} and len({t.prompt_ids for t in traces}) == 1
        assert traces[3].completion_ids in richest[:i] + richest[i + 1 :]


def test_pairs_are_of_training_captions_and_evaluation_is_on_others():
    lm = tiny.lm()
    made = planted_pairs(lm, 12, 5, own=2, others=1, sampling=Sampling(max_new_tokens=8), seed=3)
    assert len(made.train) + made.lost["margin"] + made.lost["fewer than two different"] == 12 and made.train
    for group in made.train:
        best, worst = group.traces
        assert (
            style_score(best.text) - style_score(worst.text) >= 1 and group.example.prompt in prompts(CAPTIONS)["train"]
        )
    assert made.planted == pytest.approx(np.mean([bool(g.traces[0].meta.get("planted")) for g in made.train]))
    asked = {g.example.prompt for g in made.train}
    assert len(made.development) == len(made.test) == 5 and not asked & {*made.development, *made.test}
    assert set(made.test) <= set(prompts(CAPTIONS)["test"]) and set(made.development) <= set(prompts(CAPTIONS)["train"])
