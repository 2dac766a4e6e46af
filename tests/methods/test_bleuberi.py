"""BLEUBERI's BLEU by hand and against plain counting, its family, its identities, and where credit stands."""

import math

import numpy as np
import pytest

from pertoken.core.credit import Credit
from pertoken.score.bleuberi import (
    Bleuberi,
    answer_of,
    bleu,
    format_ok,
    harmonic,
    references_of,
    rouge_l,
    sacrebleu,
    tokenize,
    where_earned,
    z_scores,
)
from tests import tiny

REFERENCE = "The plot was great, but the acting was not."


def trace_of(text, references=(REFERENCE,), **meta):
    return tiny.lm(0).trace("How was it?", text, references=list(references), row=3, **meta)


def test_identical_text_has_one_and_one_right_token_too():
    assert bleu(REFERENCE, [REFERENCE]) == pytest.approx(1.0)
    assert bleu("Yes", ["Yes"]) == pytest.approx(1.0)


def test_disjoint_text_by_hand():
    """Five disjoint tokens: p = 1/6, 1/5, 1/4, 1/3."""
    found = bleu("a b c d e", ["v w x y z"])
    assert found == pytest.approx((1 / 6 * 1 / 5 * 1 / 4 * 1 / 3) ** 0.25)


def test_by_hand_with_clipping_and_brevity():
    """'the the cat' against 'the cat sat on the mat' and 'cat cat': clipped by the most of any one reference."""
    hypothesis, references = "the the cat cat", ["the cat sat on the mat", "a cat cat dog bird x y"]
    p = [(2 + 2 + 1) / 5, (2 + 1) / 4, 1 / 3, 1 / 2]  # 'the cat', 'cat cat' of three bigrams
    wanted = math.exp(1 - 6 / 4) * math.exp(sum(map(math.log, p)) / 4)  # the shortest reference has six words
    assert bleu(hypothesis, references) == pytest.approx(wanted)


def test_the_shortest_reference_is_the_length_not_the_closest():
    hypothesis = "a b c d e f"
    short, close = "a b", "a b c d e f g"
    assert bleu(hypothesis, [short, close]) == pytest.approx(
        math.exp(sum(math.log((6 - n + 1 + 1) / (6 - n + 1 + 1)) for n in range(1, 5)) / 4)
    )
    assert bleu(hypothesis, [close]) < bleu(hypothesis, [short, close])
    assert sacrebleu(hypothesis, [short, close]) != pytest.approx(bleu(hypothesis, [short, close]))


def test_order_of_references_does_not_matter_and_one_more_never_loses_a_match():
    rng = np.random.default_rng(0)
    words = list("abcdefg")
    for _ in range(50):
        texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(4)]
        hypothesis, refs = texts[0], texts[1:]
        assert bleu(hypothesis, refs) == pytest.approx(bleu(hypothesis, refs[::-1]))
        shortest = min(refs, key=lambda r: len(r.split()))
        assert bleu(hypothesis, [shortest, *refs]) >= bleu(hypothesis, [shortest]) - 1e-12
        assert 0 < bleu(hypothesis, refs) <= 1 + 1e-12


def test_words_are_cut_as_mteval_13a_and_case_is_kept():
    assert tokenize("Hello, world! It&quot;s 3.5 <skipped>high-\nly") == [
        "Hello",
        ",",
        "world",
        "!",
        "It",
        '"',
        "s",
        "3.5",
        "highly",
    ]
    assert bleu("the film", ["The film"]) < 1
    assert tokenize("“quoted”") == ["“quoted”"]  # Unicode quotes are not split


def test_blank_and_empty():
    for blank in ("", "  \n", "<skipped>", "<answer> </answer>"):
        assert bleu(answer_of(blank), [REFERENCE]) == 0.0
    for refs in ([], [""], [REFERENCE, " "], ["<skipped>"]):
        with pytest.raises(ValueError, match="reference"):
            bleu("a", refs)


def test_answers_are_taken_out_of_their_tags():
    assert answer_of("x <answer> a </answer> y <answer>b</answer>") == "a"
    assert answer_of("<answer>a<answer>b</answer>") == "a" and answer_of("</answer> x <answer> a") == "a"
    assert answer_of("x <answer> a ") == "a" and answer_of(" plain ") == "plain"
    assert Bleuberi().score([trace_of(f"<think>t</think><answer>{REFERENCE}</answer>")])[0].reduce() == pytest.approx(
        1.0
    )


def test_family():
    assert rouge_l(REFERENCE, ["other words", REFERENCE]) == pytest.approx(1.0) and rouge_l(" ", ["a"]) == 0.0
    assert rouge_l("a b c d", ["a x c d"]) == pytest.approx(0.75)
    assert harmonic(0.0, 0.0) == 0.0 and harmonic(0.5, 0.25) == pytest.approx(1 / 3)
    assert format_ok("<think>a</think><answer>b</answer>") and not format_ok("<think>a\n</think><answer>b</answer>")
    assert not format_ok(" <think>a</think><answer>b</answer>")
    np.testing.assert_allclose(z_scores([1.0, 2.0, 3.0]), np.array([-1, 0, 1]) / (1 + 1e-6))
    assert not z_scores([2.0]).any() and not z_scores([2.0, 2.0]).any()
    found = Bleuberi(flavour="bleu_rouge_f1").score([trace_of("The plot was great")])[0].reduce()
    one, two = bleu("The plot was great", [REFERENCE]), rouge_l("The plot was great", [REFERENCE])
    assert found == pytest.approx(2 * one * two / (one + two))


def test_reasoning_adds_the_format():
    credit = Bleuberi(reasoning=True).score([trace_of(f"<think>t</think><answer>{REFERENCE}</answer>")])[0]
    assert credit.meta["parts"] == {"overlap": pytest.approx(1.0), "format": 1.0} and credit.reduce() == pytest.approx(
        2.0
    )


def test_bleu_and_a_reward_model_by_z_scores_within_a_prompt():
    class Model:
        def score(self, items):
            return [Credit.of_sequence(t, float(len(t.text))) for t in items]

    lm = tiny.lm(0)
    texts = ["The plot was great", "bad", REFERENCE]
    items = [lm.trace("one?", t, references=[REFERENCE]) for t in texts] + [trace_of("so so")]
    found = [c.reduce() for c in Bleuberi(flavour="bleu_rm", reward_model=Model()).score(items)]
    b, m = z_scores([bleu(t, [REFERENCE]) for t in texts]), z_scores([len(t) for t in texts])
    np.testing.assert_allclose(found[:3], (b + m) / 2)
    assert found[3] == 0.0  # alone in its group
    over_all = [c.reduce() for c in Bleuberi(flavour="bleu_rm", reward_model=Model(), z_over="call").score(items)]
    assert over_all[3] != 0.0
    with pytest.raises(ValueError, match="reward_model"):
        Bleuberi(flavour="bleu_rm")


def test_credit_stands_on_the_words_that_match():
    text = "Honestly the acting was not what I hoped"
    credit = Bleuberi().score([trace_of(text)])[0]
    assert credit.reduce() == pytest.approx(bleu(text, [REFERENCE]))
    span = lambda word: credit.spans([(text.index(word), text.index(word) + len(word))])[0]
    assert span("acting was not") > 0.9 * credit.reduce() - 0.05
    assert span("hoped") < span("acting")
    nothing = where_earned("zz yy", [REFERENCE], 0.4)
    assert [v for *_, v in nothing] == pytest.approx([0.2, 0.2])
    assert Bleuberi(level="sequence").score([trace_of(text)])[0].values[-1] == pytest.approx(credit.reduce())


@pytest.mark.parametrize(
    "text", ["naïve 😀 film, not", "a &amp; b &lt; great", "<answer>great</answer> tail", "great-\nness was"]
)
def test_credit_sums_for_odd_text(text):
    lm = tiny.lm(0)
    trace = lm.trace("?", text, references=[REFERENCE, "naïve & great film"])
    cut = lm.trace_of_ids(trace.prompt_ids, trace.completion_ids[:7], trace.completion_pieces[:7], meta=trace.meta)
    for t in (trace, cut):
        credit = Bleuberi().score([t])[0]
        assert credit.reduce() == pytest.approx(bleu(answer_of(t.text), references_of(t)))


def test_credit_is_the_answers_not_that_of_the_same_words_in_the_thinking():
    text = f"<think>{REFERENCE}</think><answer>{REFERENCE}</answer>"
    credit = Bleuberi().score([trace_of(text)])[0]
    start = len("<think>") + len(REFERENCE)
    assert credit.spans([(0, start)])[0] == pytest.approx(0.0)
    assert credit.spans([(text.index("<answer>"), len(text))])[0] == pytest.approx(1.0)


def test_credit_is_not_the_tags_where_the_answer_is_their_word():
    text = "<answer>answer</answer>"
    credit = Bleuberi().score([trace_of(text, ["answer"])])[0]
    start = len("<answer>")
    assert credit.spans([(start, start + len("answer"))])[0] > 0.6 > credit.spans([(0, start)])[0]  # tokens span both


@pytest.mark.parametrize("option", [{"flavour": "blue"}, {"z_over": "all"}, {"level": "word"}])
def test_a_misspelt_choice_is_refused(option):
    with pytest.raises(ValueError, match="is not one of"):
        Bleuberi(**option)


def test_rows_without_references_are_named():
    for refs in ([], None, [" "], [3]):
        with pytest.raises(ValueError, match="row 3: bleuberi compares"):
            Bleuberi().score([tiny.lm(0).trace("?", "a", references=refs, row=3)])
    assert references_of(tiny.lm(0).trace("?", "a", references="one text")) == ["one text"]
