"""Text2Grad's reward: critiques read safely, phrases found, scores on the right tokens of any tokenizer."""

# pyright: reportAttributeAccessIssue=false

# pyright: reportArgumentType=false

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch

from pertoken.core.bytes import byte_view
from pertoken.core.credit import Critique
from pertoken.core.rollout import Sampling
from pertoken.core.trace import Trace
from pertoken.score.text2grad_reward import (
    LengthWeight,
    Matching,
    Quote,
    Rule,
    Text2GradReward,
    Written,
    length_weights,
    occurrences,
    parse,
    token_scores,
    training_examples,
)
from pertoken.score.text2grad_reward.annotators import INSTRUCTION, Writer, instruction
from tests import tiny

TEXT = "The plot was great, the acting was not."


def trace_of(text, tokenizer=None, **fields):
    view = byte_view(tokenizer or tiny.tokenizer())
    ids, pieces = view.pieces_of_text(text)
    return Trace(
        prompt_ids=(1,),
        prompt_pieces=(b"",),
        completion_ids=ids,
        completion_pieces=pieces,
        tokenizer=view.fingerprint,
        **fields,
    )


def trace_by(*pieces, **fields):
    """A trace of given pieces."""
    parts = tuple(p if isinstance(p, bytes) else p.encode() for p in pieces)
    ids = tuple(range(len(parts)))
    return Trace(
        prompt_ids=(1,), prompt_pieces=(b"?",), completion_ids=ids, completion_pieces=parts, tokenizer="t", **fields
    )


def said(good=(), poor=(), **options):
    """A scorer whose annotator always writes this."""
    text = json.dumps({"textual_feedback": "So.", "good_spans": list(good), "poor_spans": list(poor)})
    return Text2GradReward(annotator=lambda prompt, response: text, **options)


def scores(trace, good=(), poor=(), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (credit,) = said(good, poor, **options).score([trace])
    return credit.values.tolist(), credit.meta["counts"]


WORDS = trace_by("The", " plot", " was", " great", ",", " the", " act", "ing", " was", " not", ".")


def test_by_hand():
    values, counts = scores(WORDS, good=["plot was great"], poor=["acting was not."])
    assert values == [0, 1, 1, 1, 0, 0, -1, -1, -1, -1, 0]  # the comma and the full stop have no score
    assert counts == {"exact": 2}
    (credit,) = said(["plot was great"], ["acting was not."]).score([WORDS])
    assert credit.meta["parts"] == {"good": 3.0, "poor": -4.0, "fallback": 0.0}
    assert (credit.meta["critique"], credit.kind, credit.level) == ("So.", "reward", "span")
    (one,) = said(["plot was great"], ["acting was not."], level="sequence").score([WORDS])
    assert one.level == "sequence" and one.values.tolist() == [0] * 10 + [-1]


# ---- identities


def test_no_spans_no_reward():
    assert scores(WORDS) == ([0.0] * 11, {})


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), tiny.sentencepiece("bpe"), tiny.sentencepiece("unigram")])
def test_swapping_good_and_poor_negates(tokenizer):
    trace = trace_of(TEXT, tokenizer)
    one, two = (scores(trace, *lists)[0] for lists in ((["plot was"], ["not"]), (["not"], ["plot was"])))
    assert any(one) and one == [-v for v in two]


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), tiny.sentencepiece("bpe"), tiny.sentencepiece("unigram")])
@pytest.mark.parametrize(
    "noisy", ["plot was great,", "  plot   was\ngreat ", '"plot was great!"', "PLOT, was great", "plot-was great"]
)
def test_sum_does_not_see_noise_in_the_phrase(tokenizer, noisy):
    trace = trace_of(TEXT, tokenizer)
    assert sum(scores(trace, ["plot was great"])[0]) == sum(scores(trace, [noisy])[0]) > 0


def test_a_token_that_begins_with_punctuation_is_scored_by_its_word():
    """Else '"good' would be scored by the phrase with the quotation mark, and not by the one without."""
    trace = trace_by("A", ' "good', '"', " film")
    assert scores(trace, ["good"])[0] == scores(trace, ['"good"'])[0] == [0, 1, 0, 0]


# ---- characters to tokens


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), tiny.sentencepiece("bpe"), tiny.sentencepiece("unigram")])
def test_characters_map_to_their_tokens(tokenizer):
    """Against the offsets that the tokenizer itself gives."""
    text = "The naïve plot was great, my friend said."
    trace = trace_of(text, tokenizer)
    values = scores(trace, good=["naïve plot"], poor=["friend said"])[0]
    a, b = text.index("naïve plot"), text.index("friend said")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    seen = set()
    for value, (start, end) in zip(values, offsets, strict=True):
        letters = [i for i in range(start, end) if text[i].isalnum()]
        for i in letters:
            assert value == (a <= i < a + 10) - (b <= i < b + 11), text[start:end]
        seen |= {value} if letters else set()
    assert seen == {0, 1, -1}


def test_last_word_and_special_tokens():
    """The release loses the last word; the terminator has no score."""
    trace = trace_by("a", " fine", " end", b"", ended=True)
    assert scores(trace, ["fine end"])[0] == [0, 1, 1, 0]


def test_a_character_of_several_tokens_and_scripts_without_spaces():
    face = "😀".encode()
    trace = trace_by("是", "好", "电影", face[:2], face[2:], "坏")
    assert scores(trace, ["好电影"], ["😀"])[0] == [0, 1, 1, -1, -1, 0]
    cut = trace_by("ok", face[:2])  # cut off inside a character
    assert scores(cut, ["ok"])[0] == [1, 0]


def test_composed_and_decomposed_letters_are_the_same():
    trace = trace_by("un ", "cafe\u0301", " noir")
    assert scores(trace, ["caf\u00e9"])[0] == [0, 1, 0]
    assert scores(trace_by("un ", "caf\u00e9", " noir"), ["cafe\u0301"])[0] == [0, 1, 0]
    hangul = "\u1112\u1161\u11ab"  # three letters that make one syllable
    assert scores(trace_by("a ", hangul, " b"), ["\ud55c"])[0] == [0, 1, 0]


def test_tokens_that_the_policy_did_not_emit_are_context():
    trace = trace_by("good", " tool", " said", " good", emitted=(False, False, True, True))
    values, counts = scores(trace, ["good", "tool"])
    assert values == [0, 0, 0, 1] and counts == {"exact": 1, "of_context": 1}


# ---- matching


def test_order_of_matching():
    assert occurrences("Plot", "The plot. Plot") == ([(10, 14)], "exact")  # exactly, though later
    assert occurrences("PLOT was", "The plot, was") == ([(4, 13)], "normalised")
    assert occurrences("great, but", "great,but") == ([(0, 9)], "normalised")
    assert occurrences("art", "a party of art") == ([(11, 14)], "exact")  # whole words first
    assert occurrences("art", "a party") == ([(3, 6)], "exact")
    assert occurrences("dull", "The plot") == ([], "")
    assert occurrences("...", "The plot") == ([], "")


def test_fuzzy_from_90_on():
    trace = trace_by("The", " wonderful", " cinematography", " shines", ".")
    values, counts = scores(trace, ["wonderfull cinematography"])  # 2 * 24 / 49 = 98 at the best window
    assert values == [0, 1, 1, 0, 0] and counts["fuzzy"] == 1
    assert scores(trace, ["wonderfull cinematography"], matching=Matching(fuzzy=None)) == ([0] * 5, {"unmatched": 1})


def test_absent_phrases_score_nothing():
    """The release's windows mark five words +1 for a phrase that is not there."""
    assert scores(WORDS, ["a completely different sentence"], ["lovely music"]) == ([0.0] * 11, {"unmatched": 2})
    short = trace_by("a")  # a text that is a part of the phrase is no quotation of it
    assert scores(short, ["a completely different sentence"]) == ([0.0], {"unmatched": 1})


def test_repeated_phrases():
    trace = trace_by("good", " film", ",", " good", " cast", ",", " good", " end")
    assert scores(trace, ["good"])[0] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert scores(trace, ["good"], matching=Matching(occurrence="all"))[0] == [1, 0, 0, 1, 0, 0, 1, 0]
    assert scores(trace, [{"text": "good", "index": 1}])[0] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert scores(trace, [{"text": "good", "index": 3}]) == ([0.0] * 8, {"unmatched": 1})


def test_overlaps():
    assert scores(WORDS, ["plot was"], ["was great"])[0][:4] == [0, 1, 1, -1]
    assert scores(WORDS, ["plot was"], ["was great"], matching=Matching(overlap="poor"))[0][:4] == [0, 1, -1, -1]
    listed = Critique("", ((0, 8, -1.0), (4, 12, 1.0)))
    assert token_scores(WORDS, listed).tolist()[:4] == [-1, -1, 1, 0]


def test_prompt_quoted_and_wide_spans():
    trace = dataclasses.replace(trace_by("It", " was", " fine"), meta={"prompt": "How was the film yesterday?"})
    assert scores(trace, ["film yesterday"]) == ([0.0] * 3, {"of_context": 1})
    with pytest.warns(UserWarning, match="1 spans cover more than half"):
        (credit,) = said(["It was fine"]).score([trace])
    assert credit.values.tolist() == [1, 1, 1] and credit.meta["counts"]["wide"] == 1
    assert scores(WORDS, [","]) == ([0.0] * 11, {"exact": 1, "no_tokens": 1})


# ---- length weight, fallback


def test_length_weight_by_hand():
    values = np.zeros(70)
    values[3] = 1.0
    w = length_weights(values)
    assert w[:3].tolist() == [1, 1, 1]
    assert w[3] == pytest.approx(1 / (1 + math.exp(-10)))  # l = 1: clipped
    at = lambda l: w[3 + l - 1]
    assert at(48) == pytest.approx(0.9975, abs=5e-5) and at(54) == 0.5
    assert at(60) == at(66) == pytest.approx(0.0025, abs=5e-5)  # the floor, 1 / (1 + e^6)... of the clip at 6
    assert length_weights(np.zeros(50))[48 + 1] == pytest.approx(1 / (1 + math.exp(-4)))


def test_length_weight_and_fallback_in_the_score():
    trace = trace_by("x", " good", ",", " good", " end")
    values, _ = scores(trace, ["good"], matching=Matching(occurrence="all"), length=LengthWeight(target=1, steepness=6))
    assert values == pytest.approx([0, 1 / (1 + math.exp(-6)), 0, 1 / (1 + math.exp(6)), 0])
    assert scores(trace, ["absent phrase"], fallback=0.1)[0] == [0.1, 0.1, 0, 0.1, 0.1]
    assert scores(trace, ["end"], fallback=0.1)[0] == [0, 0, 0, 0, 1]


# ---- reading critiques


def test_reads_json_wherever_it_is():
    text = '{"textual_feedback": "F", "good_spans": ["a b"], "poor_spans": []}'
    assert parse(f"Let me {{think}} [first].\n```json\n{text}\n``` Done.") == Written("F", (Quote("a b"),))
    assert parse(Written("F", (Quote("a", 2),), (Quote("b"),)).to_json()) == Written(
        "F", (Quote("a", 2),), (Quote("b"),)
    )


@pytest.mark.parametrize(
    "text, good, poor",
    [
        ("{'textual_feedback': 'It\\'s', 'good_spans': ['it's fine', 'b'], 'poor_spans': []}", ["it's fine", "b"], []),
        ('{"good_spans": ["a", "b",], "poor_spans": ["c"],}', ["a", "b"], ["c"]),
        ('{"textual_feedback": "x", "good_spans": ["a", "b"], "poor_spans": ["c", "cut of', ["a", "b"], ["c"]),
        ('{"good_spans": ["a"], "poor_spans": None, "n": 1}', ["a"], []),
        ('Well: {good_spans: ["a"], poor_spans: ["b"]}', ["a"], ["b"]),
        ("[('good', 1), ('bad', -1), ('the', 0)]", ["good"], ["bad"]),
    ],
)
def test_repairs_what_is_valid(text, good, poor):
    found = parse(text)
    assert [q.text for q in found.good] == good and [q.text for q in found.poor] == poor
    assert found.repaired and not found.malformed


def test_older_form_and_entries_that_are_no_phrases():
    assert parse('[["good", 1], ["bad", -1], ["the", 0], ["x", 2], 7]') == Written(
        "", (Quote("good"),), (Quote("bad"),), dropped=2
    )
    found = parse('{"good_spans": ["a", 3, "", {"text": "b", "index": -1}, ["c"]], "poor_spans": "d"}')
    assert found == Written("", (Quote("a"),), (Quote("d"),), dropped=4)


@pytest.mark.parametrize(
    "text", ["", "no json", "{", "[" * 5000, '{"a": 1}', "[1, 2]", "{}", '"good_spans"', "9" * 5000, '{"good_spans"']
)
def test_malformed_is_counted_and_earns_nothing(text):
    assert parse(text) == Written(malformed=True)
    with pytest.warns(UserWarning, match="1 critiques without readable spans"):
        (credit,) = Text2GradReward(annotator=lambda *_: text, fallback=0.1).score([WORDS])
    assert not credit.values.any() and credit.meta["counts"] == {"malformed": 1}


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    parse(f"{{'good_spans': [__import__('pathlib').Path('{target}').touch()], 'poor_spans': []}}")
    assert not target.exists()


# ---- annotators


def test_rule_quotes_every_occurrence():
    rule = Rule(lexicon="", good=("good", "nice cast"), poor=("dull",))
    written = rule("", "Good film, nice cast; good but dull. Goods, good.")
    assert written.good == (Quote("Good"), Quote("nice cast"), Quote("good"), Quote("good", 1))
    assert written.poor == (Quote("dull"),) and '"dull" is poor' in written.feedback
    trace = trace_by("good", " film", ",", " dull", " but", " good")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (credit,) = Text2GradReward(rule=rule).score([trace])
    assert credit.values.tolist() == [1, 0, 0, -1, 0, 1]


def test_lexicon_of_vader():
    (credit,) = Text2GradReward().score([trace_by("A", " great", " but", " awful", " film")])
    assert credit.values.tolist() == [0, 1, 0, -1, 0]


def test_row_callable_and_critique():
    row = json.dumps({"good_spans": ["plot"], "poor_spans": []})
    trace = dataclasses.replace(WORDS, meta={"critique": row, "row": 4})
    assert Text2GradReward(annotator="row").score([trace])[0].values.sum() == 1
    with pytest.raises(ValueError, match=r"row 4 has no column 'critique'.*add it"):
        Text2GradReward(annotator="row").score([dataclasses.replace(WORDS, meta={"row": 4})])
    given = Critique("by bytes", ((4, 8, 0.5),))
    (credit,) = Text2GradReward(annotator=lambda *_: given).score([WORDS])
    assert credit.values.tolist()[:3] == [0, 0.5, 0] and credit.meta["critique"] == "by bytes"
    with pytest.raises(ValueError, match="outside of the 39 bytes"):
        Text2GradReward(annotator=lambda *_: Critique("", ((4, 99, 1.0),))).score([WORDS])


def test_options_are_refused():
    for wrong in (
        dict(annotator="gpt"),
        dict(level="span"),
    ):
        with pytest.raises(ValueError, match="is not one of"):
            Text2GradReward(**wrong)
    with pytest.raises(ValueError, match="overlap is first or poor"):
        Matching(overlap="both")
    with pytest.raises(ValueError, match="give lm, or critic"):
        Text2GradReward(annotator="lm").score([WORDS])


def test_a_model_is_asked_for_the_json():
    """What it says is read, whatever it is; a question that is too long is counted."""
    lm = tiny.lm()
    lm.context = 1024
    scorer = Text2GradReward(annotator="lm", lm=lm, sampling=Sampling(max_new_tokens=4, temperature=0.0))
    long = lm.trace("?", "word " * 900)
    with pytest.warns(UserWarning, match="2 critiques without readable spans"):
        one, two, empty = scorer.score([lm.trace("How?", TEXT), long, lm.trace_of_ids([1], [])])
    assert one.meta["counts"] == {"malformed": 1} and two.meta["counts"] == {"malformed": 1, "too_long": 1}
    assert empty.values.shape == (0,) and empty.meta["counts"] == {}
    assert Writer(lm, scorer.sampling).ask([("a", "b"), ("a", "word " * 900)])[1] is None


def test_training_data_of_the_reward_model():
    rule = Rule(lexicon="", good=("good",), poor=("dull",))
    examples, counts = training_examples([("How?", "good but dull"), ("So?", "good, good, good")], rule, most=2)
    assert counts == {"kept": 1, "too_many": 1}
    (one,) = examples
    assert one.kind == "sft" and one.prompt == instruction("How?", "good but dull", 2)
    assert "How?" in one.prompt and "{" not in one.prompt.replace(INSTRUCTION, "")
    assert list(json.loads(one.responses[0])) == ["textual_feedback", "good_spans", "poor_spans"]
    assert parse(one.responses[0]).good == (Quote("good"),)
    liar = lambda prompt, response: '{"good_spans": ["absent"], "poor_spans": []}'
    assert training_examples([("a", "b")], liar) == ([], {"kept": 0, "unfaithful": 1})
    assert training_examples([("a", "b")], lambda *_: "?") == ([], {"kept": 0, "malformed": 1})
    lm = tiny.lm()
    assert training_examples([("a", "good " + "x " * 900)], rule, lm)[1] == {"kept": 0, "too_long": 1}


@pytest.mark.slow
def test_a_model_that_sft_trained_writes_critiques(tmp_path):
    """The whole way: rule -> examples -> sft -> folder -> scorer."""
    from pertoken import catalog
    from pertoken.core.data import encode
    from pertoken.core.loop import LoopConfig
    from pertoken.core.run import Run

    lm = tiny.lm(dtype=torch.float32)
    lm.context = lm.causal.config.max_position_embeddings = 1024
    rule = Rule(lexicon="", good=("good",))
    examples, _ = training_examples([("?", "a good film")], rule, lm)
    groups, _ = encode(examples, lm)
    config = LoopConfig(lr=1e-2, steps=80, batch_size=1)
    run = Run(
        slug="sft",
        objective=catalog.method("sft")(),
        policy=lm,
        groups=groups,
        held_out=[],
        config=config,
        out=tmp_path / "run",
        resolve=catalog.method,
        progress=False,
    )
    run.go()
    scorer = Text2GradReward(
        annotator="lm",
        critic=str(tmp_path / "run" / "model"),
        sampling=Sampling(max_new_tokens=200, temperature=0.0),
    )
    trace = dataclasses.replace(lm.trace("?", "a good film"), meta={"prompt": "?"})
    (credit,) = scorer.score([trace])
    assert credit.meta["counts"] == {"exact": 1}
    assert credit.values.tolist() == Text2GradReward(rule=rule).score([trace])[0].values.tolist()
