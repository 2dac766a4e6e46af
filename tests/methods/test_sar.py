# pyright: reportArgumentType=false
"""SAR: relevance, the sentence score in logs, the identities of the specification, and what breaks it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pertoken.core.signals import token_signals
from pertoken.explain.sar import (
    SAR,
    clusters_of,
    lexical_similarity,
    minilm_similarity,
    relevance,
    semantic_entropy,
    sentence_sar,
    token_sar,
)
from tests import tiny

rng = np.random.default_rng(0)
E = [rng.uniform(0.1, 3, n) for n in (4, 2, 6)]
LOGP = np.array([-e.sum() for e in E])
G = np.array([[1.0, 0.4, 0.0], [0.4, 1.0, 0.9], [0.0, 0.9, 1.0]])


def naive(p, g, t):
    return [-math.log(p[j] + sum(g[j][k] * p[k] for k in range(len(p)) if k != j) / t) for j in range(len(p))]


# ---- tokens


def test_relevance_by_hand():
    np.testing.assert_allclose(relevance(np.array([0.9, 0.7, 1.0])), [0.25, 0.75, 0.0])
    np.testing.assert_allclose(relevance(1 - 3 * (1 - np.array([0.9, 0.7, 1.0]))), [0.25, 0.75, 0.0])  # scale-free


def test_equal_relevance_is_the_mean_and_one_alone_is_its_own():
    for e in E:
        assert token_sar(e, relevance(np.full(len(e), 0.3))).sum() == pytest.approx(e.mean())
        one = np.ones(len(e))
        one[1] = 0.2
        assert token_sar(e, relevance(one)).sum() == pytest.approx(e[1])


def test_nothing_relevant_is_uniform_and_noise_above_one_is_clipped():
    np.testing.assert_allclose(relevance(np.ones(4)), [0.25] * 4)
    np.testing.assert_allclose(relevance(np.array([1.0000001, 0.5])), [0.0, 1.0])
    np.testing.assert_allclose(relevance(np.array([-0.5, 0.0])), [0.5, 0.5])  # a cosine below 0: as unlike as can be
    assert relevance(np.zeros(0)).shape == (0,)
    with pytest.raises(ValueError, match="NaN"):
        relevance(np.array([math.nan, 0.5]))


# ---- sentences


@pytest.mark.parametrize("t", [0.001, 0.5, 10.0])
def test_sentence_score_against_the_plain_formula(t):
    np.testing.assert_allclose(sentence_sar(LOGP, G, t), naive(np.exp(LOGP), G, t), rtol=1e-12)


def test_without_agreement_it_is_the_surprise():
    np.testing.assert_allclose(sentence_sar(LOGP, np.eye(3), 0.001), -LOGP)
    np.testing.assert_allclose(sentence_sar(LOGP, np.zeros((3, 3)), 0.001), -LOGP)
    np.testing.assert_allclose(sentence_sar(LOGP[:1], G[:1, :1], 0.001), -LOGP[:1])
    np.testing.assert_allclose(sentence_sar(LOGP, G, math.inf), -LOGP)


def test_full_agreement():
    p, t = np.exp(LOGP), 0.01
    np.testing.assert_allclose(sentence_sar(LOGP, np.ones((3, 3)), t), -np.log(p + (p.sum() - p) / t))


def test_permuting_samples_changes_nothing():
    order = [2, 0, 1]
    np.testing.assert_allclose(sentence_sar(LOGP[order], G[np.ix_(order, order)]), sentence_sar(LOGP, G)[order])


def test_long_answers_do_not_underflow():
    found = sentence_sar(np.array([-2000.0, -2001.0]), np.full((2, 2), 0.5), 0.001)
    assert np.isfinite(found).all() and found[0] == pytest.approx(2000 - math.log(1 + 500 * math.exp(-1)))


def test_similarities_are_clipped_and_t_checked():
    wild = np.array([[1.0, -0.5], [1.5, 1.0]])
    held = np.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(sentence_sar(LOGP[:2], wild), sentence_sar(LOGP[:2], held))
    with pytest.raises(ValueError, match="t=0"):
        sentence_sar(LOGP, G, 0)


# ---- baselines


def test_semantic_entropy_by_hand():
    nll = np.array([1.0, 2.0, 3.0])
    wanted = -((math.log(math.exp(-1) + math.exp(-2)) - 5) + (-3 - 5)) / 2
    assert semantic_entropy(nll, [0, 0, 1]) == pytest.approx(wanted)
    assert clusters_of(np.array([[1, 0.95, 0.1], [0.95, 1, 0.2], [0.1, 0.2, 1]])) == [0, 0, 1]


def test_lexical_similarity():
    assert lexical_similarity(["a b c"]) == 1.0
    assert lexical_similarity(["a b c d", "a b x y", "a b c d"]) == pytest.approx((0.5 + 1 + 0.5) / 3)


# ---- on traces


def overlap(pairs):
    """Share of common letters."""
    return [len(set(a) & set(b)) / max(len(set(a) | set(b)), 1) for a, b in pairs]


def answers(lm, texts=("great plot", "dull", "a wonderful score"), prompt="how was the film"):
    return [lm.trace(prompt, text) for text in texts]


def test_credit_sums_to_the_answers_score():
    lm = tiny.lm()
    traces = answers(lm)
    credits = SAR(similarity=overlap).explain(lm, traces)
    logps = [s["logp"] for s in token_signals(lm, traces, ("logp",))]
    tokens, log_p = [], []
    for trace, (credit,), logp in zip(traces, credits, logps, strict=True):
        pieces, whole = trace.completion_pieces, trace.prompt_text + trace.text
        probes = [
            (whole, trace.prompt_text + (b"".join(pieces[:i] + pieces[i + 1 :])).decode()) for i in range(len(pieces))
        ]
        r = np.array([1 - g for g in overlap(probes)])
        r = r / r.sum() if r.sum() else np.full(len(r), 1 / len(r))
        np.testing.assert_allclose(credit.values, r * -logp, atol=1e-9)
        assert credit.kind == "surprisal" and credit.meta["token_sar"] == pytest.approx(credit.reduce())
        tokens.append((r * -logp).sum())
        log_p.append(logp.sum())
    whole = [t.prompt_text + t.text for t in traces]
    g = [[overlap([(a, b)])[0] for b in whole] for a in whole]
    scores = credits[0][0].meta["scores"]
    assert scores["token_sar"] == pytest.approx(np.mean(tokens))
    assert scores["sentence_sar"] == pytest.approx(np.mean(naive(np.exp(log_p), g, 0.001)))
    assert scores["sar"] == pytest.approx(np.mean(naive(np.exp(-np.array(tokens)), g, 0.001)))
    assert scores["perplexity_entropy"] == pytest.approx(-np.mean(log_p))
    assert scores["length_normalised_entropy"] == pytest.approx(-np.mean([v.mean() for v in logps]))
    assert all(c.meta["scores"] == scores and c.meta["answers"] == 3 for (c,) in credits)


def test_questions_are_told_apart_by_their_prompts():
    lm = tiny.lm()
    one, two = answers(lm), answers(lm, ("bad",), "so?")
    mixed = SAR(similarity=overlap).explain(lm, [one[0], two[0], one[1], one[2]])
    alone = SAR(similarity=overlap).explain(lm, one)
    assert mixed[0][0].meta["scores"] == pytest.approx(alone[0][0].meta["scores"])
    assert mixed[1][0].meta["answers"] == 1
    assert mixed[1][0].meta["scores"]["sar"] == pytest.approx(mixed[1][0].meta["scores"]["token_sar"])


def test_relevance_may_be_judged_in_the_answer_alone():
    lm, seen = tiny.lm(), []

    def g(pairs):
        seen.extend(pairs)
        return overlap(pairs)

    SAR(similarity=g, tokens="alone", answers="alone").explain(lm, answers(lm))
    assert seen and not any("how was" in a + b for a, b in seen)
    seen.clear()
    SAR(similarity=g, join=" | ").explain(lm, answers(lm))
    assert seen and all("how was" in a and " | " in a for a, _ in seen)


def test_removal_of_occurrences():
    lm = tiny.lm()
    trace = lm.trace("q", "ooo")
    assert trace.completion_pieces[:3] == (b"o", b"o", b"o")
    assert SAR().without(trace)[:3] == ["oo"] * 3
    assert SAR(removal="occurrences").without(trace)[:3] == [""] * 3


def test_broken_characters_and_tool_outputs():
    lm = tiny.lm()
    trace = lm.trace("q", "naïve 😀")
    assert any("�" in text for text in SAR().without(trace))
    emitted = tuple(k != 1 for k in range(len(trace)))
    partly = lm.trace_of_ids(
        trace.prompt_ids, trace.completion_ids, trace.completion_pieces, emitted=emitted, ended=True
    )
    ((credit,),) = SAR(similarity=overlap).explain(lm, [partly])
    assert credit.values[1] == 0 and np.isfinite(credit.values).all()


def test_empty_and_one_token_answers():
    lm = tiny.lm()
    empty = lm.trace_of_ids(lm.encode_prompt("q"), [lm.terminator], ended=True)
    credits = SAR(similarity=overlap).explain(lm, [empty])
    logp = token_signals(lm, [empty], ("logp",))[0]["logp"]
    np.testing.assert_allclose(credits[0][0].values, -logp)


def test_similarity_that_fails_is_named():
    lm = tiny.lm()
    with pytest.raises(ValueError, match="NaN"):
        SAR(similarity=lambda pairs: [math.nan] * len(pairs)).explain(lm, answers(lm))
    constant = SAR(similarity=lambda pairs: [1.0] * len(pairs)).explain(lm, answers(lm))
    assert constant[0][0].meta["token_sar"] == pytest.approx(constant[0][0].meta["token_sar"])


def test_minilm_similarity_takes_any_encoder():
    encode = lambda texts: np.array([[len(t), 1.0] if t else [0.0, 0.0] for t in texts])
    g = minilm_similarity(encode)
    assert g([("ab", "ab"), ("", "x")]) == pytest.approx([1.0, 1.0]) and len(g([])) == 0
    opposite = minilm_similarity(lambda texts: np.array([[1.0], [-1.0]]))
    assert opposite([("a", "b")]) == pytest.approx([0.0])


def test_bad_options():
    for bad in ({"t": 0.0}, {"removal": "x"}, {"answers": "x"}, {"tokens": "x"}):
        with pytest.raises(ValueError):
            SAR(**bad)


def test_nothing_relevant_is_the_mean_over_what_the_policy_emitted():
    lm = tiny.lm()
    trace = lm.trace("q", "great plot")
    emitted = tuple(k not in (1, 2) for k in range(len(trace)))
    partly = lm.trace_of_ids(
        trace.prompt_ids, trace.completion_ids, trace.completion_pieces, emitted=emitted, ended=True
    )
    ((credit,),) = SAR(similarity=lambda pairs: np.ones(len(pairs))).explain(lm, [partly])
    logp = token_signals(lm, [partly], ("logp",))[0]["logp"]
    assert credit.meta["token_sar"] == pytest.approx(-logp[list(emitted)].mean())
    assert credit.meta["token_sar"] == pytest.approx(credit.meta["scores"]["length_normalised_entropy"])


def test_questions_in_messages_are_read_as_their_words():
    lm, seen = tiny.lm(), []

    def g(pairs):
        seen.extend(pairs)
        return overlap(pairs)

    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "how was it"})
    SAR(similarity=g).explain(lm, [replace(lm.trace(messages, "dull"), meta={"prompt": messages})])
    assert seen and all(a == "be brief\nhow was itdull" for a, _ in seen)


def test_similarities_of_another_shape_are_refused():
    lm = tiny.lm()
    for g in (lambda p: 0.5, lambda p: [0.5] * (len(p) - 1), lambda p: np.full((len(p), 1), 0.5)):
        with pytest.raises(ValueError, match="one number a pair"):
            SAR(similarity=g).explain(lm, answers(lm))
    with pytest.raises(ValueError, match="NaN"):
        SAR(similarity=lambda p: [math.nan] * len(p)).explain(lm, answers(lm))
