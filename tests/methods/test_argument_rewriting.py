# pyright: reportAttributeAccessIssue=false
"""Appropriateness rewriting: alignments against brute force and a plain copy of the release's recursion, matching by
hand, mixtures, templates, the classifier against scikit-learn's own, the corpus, and where credit stands."""

# encoders, similarities and classifiers that stand in
# pyright: reportArgumentType=false

import csv
import dataclasses
import math
from functools import lru_cache

import numpy as np
import pytest

from pertoken.score.argument_rewriting import (
    ArgumentRewriting,
    NGramClassifier,
    SentenceClassifier,
    alpaca_prompt,
    best_of,
    copy_rate,
    edit_similarity,
    fit_classifier,
    length_ratio,
    load_classifier,
    load_corpus,
    macro_f1,
    match_shares,
    mixed,
    perplexities,
    rewrite_of,
)
from pertoken.score.argument_rewriting.corpus import argument_of
from pertoken.score.argument_rewriting.edits import hirschberg, operations
from tests import tiny

RNG = np.random.default_rng(0)
PAIRS = [tuple(RNG.choice(list("abcde"), RNG.integers(0, 11)).tolist() for _ in "xy") for _ in range(400)]
A = {"nice film here": 0.75, "a film": 0.25}


def brute(x, y):
    """(m, d) of the shortest of the best alignments, by trying all."""

    @lru_cache(None)
    def best(i, j):  # (score, -m, d) of x[i:], y[j:]
        if i == len(x) and j == len(y):
            return (0, 0, 0)
        ways = []
        if i < len(x) and j < len(y):
            s, m, d = best(i + 1, j + 1)
            ways.append((s + 2, m - 1, d) if x[i] == y[j] else (s - 2, m - 1, d + 1))
        for step in ((1, 0), (0, 1)):
            if i + step[0] <= len(x) and j + step[1] <= len(y):
                s, m, d = best(i + step[0], j + step[1])
                ways.append((s - 2, m - 1, d + 1))
        return max(ways)

    _, m, d = best(0, 0)
    return -m, d


def plain_row(x, y):
    last = [-2 * j for j in range(len(y) + 1)]
    for a in x:
        new = [last[0] - 2]
        for j, b in enumerate(y):
            new.append(max(last[j] + (2 if a == b else -2), last[j + 1] - 2, new[j] - 2))
        last = new
    return last


def plain_hirschberg(x, y):
    """The specification's words, with loops."""
    if not x or not y:
        return ["INS"] * len(y) + ["DEL"] * len(x)
    if 1 in (len(x), len(y)):
        table, ops, i, j = [plain_row(x[:i], y) for i in range(len(x) + 1)], [], len(x), len(y)
        while i or j:
            same = i and j and x[i - 1] == y[j - 1]
            if i and j and table[i][j] == table[i - 1][j - 1] + (2 if same else -2):
                ops, i, j = ["KEEP" if same else "SUB", *ops], i - 1, j - 1
            elif i and table[i][j] == table[i - 1][j] - 2:
                ops, i = ["DEL", *ops], i - 1
            else:
                ops, j = ["INS", *ops], j - 1
        return ops
    half = len(x) // 2
    sums = [a + b for a, b in zip(plain_row(x[:half], y), plain_row(x[half:][::-1], y[::-1])[::-1])]
    cut = sums.index(max(sums))
    return plain_hirschberg(x[:half], y[:cut]) + plain_hirschberg(x[half:], y[cut:])


def test_alignments_are_the_shortest_of_the_best():
    for x, y in PAIRS:
        m, d = brute(tuple(x), tuple(y))
        assert operations(x, y) == (m, d)
        expected = 1.0 if m == 0 else 0.0 if m == d else 1.0 if d == 0 else math.exp(-d / (m - d))
        assert edit_similarity(x, y) == edit_similarity(y, x) == pytest.approx(expected)


def test_the_release_halves_and_takes_the_first():
    differ = unequal = 0
    for x, y in PAIRS:
        assert hirschberg(x, y) == plain_hirschberg(x, y)
        differ += operations(x, y) != operations(x, y, "reference")
        unequal += operations(x, y, "reference") != operations(y, x, "reference")
    assert 0 < differ < 40 and 0 < unequal < 40


def test_edit_similarity_by_hand():
    assert edit_similarity("I like this film", "I like that film") == pytest.approx(math.exp(-1 / 3))
    assert edit_similarity("I like it", "I really like it") == pytest.approx(math.exp(-1 / 3))
    for compat in (None, "reference"):
        assert edit_similarity("a b", "a b", compat) == 1.0 and edit_similarity("a b", "c d", compat) == 0.0
        assert edit_similarity("", "a b", compat) == edit_similarity("a", "", compat) == 0.0
    assert edit_similarity("", "") == 1.0 and edit_similarity("", "", "reference") == 0.0
    # three SUB tie with one KEEP and four others: the short one has no KEEP
    assert operations("a b c", "c x y") == (3, 3)
    with pytest.raises(ValueError, match="reference"):
        edit_similarity("a", "a", "theirs")
    assert copy_rate("I like this film", "I like that film") == 0.75 and copy_rate("", "a") == 0.0
    assert length_ratio("a b c", "a b") == 1.5


def test_the_match_by_hand_and_its_split():
    y, x = np.array([[1.0, 0], [0, 1], [0, 1]]), np.array([[0.6, 0.8], [0, 1]])
    best_y, best_x = np.array([0.6, 1, 1]), np.array([0.8, 1])
    p, r = best_y.mean(), best_x.mean()
    f1, shares = match_shares(y, x)
    assert f1 == pytest.approx(2 * p * r / (p + r)) == pytest.approx(shares.sum())
    # both words of the original find the second piece (the first of the equal ones)
    dp, dr = 2 * r * r / (p + r) ** 2, 2 * p * p / (p + r) ** 2
    np.testing.assert_allclose(shares, [dp * 0.6 / 3, dp / 3 + dr * 1.8 / 2, dp / 3])
    assert match_shares(-x[1:], x[1:])[0] == 0.0 and match_shares(y[:0], x)[0] == 0.0


def test_mixtures():
    assert mixed(0.3, -0.2, 1, 0) == (0.3, 0) and sum(mixed(0.3, -0.2, 0.4, 0.6)) == pytest.approx(0.0)
    a, s = 0.3, 0.8
    assert sum(mixed(a, s, mixture="harmonic")) == pytest.approx(2 * a * s / (a + s))
    assert sum(mixed(a, s, 0.7, 0.3, "weighted_harmonic")) == pytest.approx(1 / (0.7 / a + 0.3 / s))
    assert sum(mixed(a, s, 1, 0, "weighted_harmonic")) == pytest.approx(a)
    assert mixed(a, s, 0.5, 0.5, "weighted_harmonic") == pytest.approx(mixed(a, s, mixture="harmonic"))
    step = 1e-6  # each part is its argument times the slope
    value = lambda a, s: 2 * a * s / (a + s)
    slope = (value(a + step, s) - value(a - step, s)) / (2 * step)
    assert mixed(a, s, mixture="harmonic")[0] == pytest.approx(a * slope, abs=1e-8)
    for how in ("harmonic", "weighted_harmonic"):
        assert mixed(0.0, 0.5, mixture=how) == mixed(0.9, -0.1, mixture=how) == (0.0, 0.0)


def test_templates():
    prompt = alpaca_prompt("some words")
    assert prompt.endswith("### Input:\nsome words\n\n### Response:\n") and argument_of(prompt) == "some words"
    assert rewrite_of(prompt + "other words</s>") == "other words"
    assert rewrite_of(prompt + "one\n### Response:\ntwo") == "one" and rewrite_of(prompt) == ""
    assert rewrite_of("other words") == "" and rewrite_of("a ### Response: b") == "" and argument_of("x") is None


class Words:
    """An encoder whose pieces are words, and whose vectors are a place each."""

    known = ("nice", "film", "here", "a", "the")

    def tokens(self, text):
        found, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            found.append((start, at))
        vectors = np.array([[float(text[a:b] == w) for w in self.known] for a, b in found])
        return vectors.reshape(-1, len(self.known)), found

    def too_long(self, texts):
        return sum(len(t) > 60 for t in texts)


def scorer(**options):
    judge = lambda texts: [A.get(t, 0.5) for t in texts]
    return ArgumentRewriting(**{"classifier": judge, "similarity": Words(), **options})


def trace_of(text, original="a film", prompt="?", **options):
    return tiny.lm(0).trace(prompt, text, original=original, row=4, **options)


def test_reward_by_hand():
    one = scorer(w_a=0.4, w_s=0.6).score([trace_of("nice film here")])[0]
    f1 = 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    assert one.meta["parts"] == pytest.approx({"appropriateness": 0.3, "similarity": 0.6 * f1})
    assert one.reduce() == pytest.approx(0.3 + 0.6 * f1) and one.level == "token"
    told = one.meta["counts"]
    assert told["a"] == 0.75 and told["s"] == pytest.approx(f1) and told["length_ratio"] == 1.5
    assert told["copy_rate"] == pytest.approx(1 / 3) and told["edit_similarity"] == pytest.approx(math.exp(-2))
    assert told["still_inappropriate"] == told["empty"] == told["identical"] == 0.0
    # all that was kept is the word film, and a stands at the end
    at = [(0, 4), (5, 9), (10, 14)]
    sums = one.spans(at)
    assert sums[0] == 0 and sums[1] == pytest.approx(0.6 * f1) and one.values[-1] == pytest.approx(0.3)
    last = scorer(w_a=0.4, w_s=0.6, level="sequence").score([trace_of("nice film here")])[0]
    assert last.level == "sequence" and last.values[-1] == pytest.approx(one.reduce()) == last.values.sum()


def test_identities():
    copy = scorer(w_a=0.3, w_s=0.7).score([trace_of("a film")])[0]
    assert copy.meta["counts"]["s"] == 1.0 and copy.meta["counts"]["identical"] == 1.0
    assert copy.reduce() == pytest.approx(0.3 * 0.25 + 0.7) and copy.meta["counts"]["still_inappropriate"] == 1.0
    assert scorer(w_a=1, w_s=0).score([trace_of("nice film here")])[0].reduce() == pytest.approx(0.75)
    for text in ("", "  \n"):
        empty = scorer(w_a=0.6, w_s=0.4).score([trace_of(text)])[0]
        assert empty.reduce() == pytest.approx(-0.4) and empty.meta["counts"]["empty"] == 1.0
        assert scorer(mixture="harmonic").score([trace_of(text)])[0].reduce() == 0.0


def test_plugged_in_scorers_are_not_asked_about_nothing():
    """Of a batch whose rewrites are all empty, BERTScore would have no sentence to score."""

    def similarity(rewrites, originals):
        assert rewrites and originals
        return [0.5] * len(rewrites)

    one = scorer(similarity=similarity, w_a=0.6, w_s=0.4)
    assert [c.reduce() for c in one.score([trace_of(""), trace_of(" ")])] == pytest.approx([-0.4, -0.4])
    assert one.score([]) == []


def test_the_alpaca_template_in_prompt_or_completion():
    plain = scorer(alpaca=True)
    wanted = scorer().score([trace_of("nice film here")])[0]
    trace = tiny.lm(0).trace("x", "nice film here\n### Response:\nmore words", original=None)
    lm = tiny.lm(0, chat=False)
    asked = lm.trace(alpaca_prompt("a film"), "nice film here</s>\n### Response:\nmore words")
    one = plain.score([asked])[0]
    assert one.reduce() == pytest.approx(wanted.reduce()) and one.meta["counts"]["length_ratio"] == 1.5
    assert one.spans([(5, 9)])[0] == pytest.approx(wanted.spans([(5, 9)])[0])
    quoting = lm.trace(alpaca_prompt("a film\n### Response:\nb"), "nice film here", original="a film")
    assert plain.score([quoting])[0].reduce() == pytest.approx(wanted.reduce())
    missing = plain.score([lm.trace("?", "nice film here", original="a film")])[0]
    assert missing.reduce() == pytest.approx(-0.5) and missing.meta["counts"]["empty"] == 1.0
    with pytest.raises(ValueError, match="no column original"):
        scorer().score([trace])


GOOD = ["what a great day it was", "the film was great fun", "a great and good idea", "it was good, so good"]
BAD = ["what a dull day it was", "the film was dull", "a dull and bad idea", "it was bad, so dull"]


@pytest.fixture(scope="module")
def fitted():
    return fit_classifier(GOOD + BAD, [False] * 4 + [True] * 4)


def test_the_classifier_is_scikit_learns(fitted):
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    blocks = [TfidfVectorizer(analyzer=k, ngram_range=r, min_df=2) for k, r in (("word", (1, 2)), ("char", (2, 5)))]
    labels = [1] * 4 + [0] * 4
    table = hstack([b.fit_transform(GOOD + BAD) for b in blocks]).tocsr()
    model = LogisticRegression(C=3.0, class_weight="balanced", solver="liblinear", random_state=0).fit(table, labels)
    new = ["A GREAT  day,\n was it not?", "so dull", "zzz", ""]
    wanted = model.predict_proba(hstack([b.transform(new) for b in blocks]).tocsr())[:, 1]
    np.testing.assert_allclose(fitted(new), wanted, atol=1e-6)
    assert fitted(["great"])[0] > 0.5 > fitted(["dull"])[0]


def test_what_characters_earned(fitted):
    text = "it was great, not dull 😀"
    a, earned = fitted.split(text)
    nothing = 1 / (1 + math.exp(-fitted.bias))
    assert a == pytest.approx(fitted([text])[0]) and len(earned) == len(text)
    assert earned.sum() == pytest.approx(a - nothing)
    great, dull = text.index("great"), text.index("dull")
    assert earned[great : great + 5].sum() > 0 > earned[dull : dull + 4].sum() and abs(earned[-1]) < 1e-12
    # along the path each has its evidence times the sigmoid's slope, integrated
    z = fitted.evidence(text)
    steps = (np.arange(2000) + 0.5) / 2000
    sigmoid = 1 / (1 + np.exp(-fitted.bias - steps * z.sum()))
    np.testing.assert_allclose(earned, z * (sigmoid * (1 - sigmoid)).mean(), atol=1e-7)
    np.testing.assert_allclose(NGramClassifier({"word": {}, "char": {}}, 0.3).split("x y")[1], 0.0)


def test_credit_of_appropriateness_stands_on_its_words(fitted):
    text = "it was great not dull"
    credit = scorer(classifier=fitted, w_a=1, w_s=0).score([trace_of(text)])[0]
    assert credit.reduce() == pytest.approx(fitted([text])[0])
    great, dull = (credit.spans([(text.index(w), text.index(w) + len(w))])[0] for w in ("great", "dull"))
    assert great > 0 > dull


def test_a_classifier_is_saved_and_read(fitted, tmp_path):
    again = load_classifier(fitted.save(tmp_path / "a"))
    np.testing.assert_array_equal(again(BAD), fitted(BAD))
    assert again.identity() == fitted.identity()
    credit = scorer(classifier=None, folder=str(tmp_path / "a"), w_a=1, w_s=0).score([trace_of("so dull")])[0]
    assert credit.reduce() == pytest.approx(fitted(["so dull"])[0])
    encoder = lambda texts: np.array([[float("great" in t), float("dull" in t)] for t in texts])
    other = fit_classifier(GOOD + BAD, [False] * 4 + [True] * 4, "minilm", encoder=encoder)
    assert isinstance(other, SentenceClassifier) and other(["great"])[0] > 0.5 > other(["dull"])[0]
    read = load_classifier(other.save(tmp_path / "b"), encoder)
    np.testing.assert_array_equal(read(GOOD), other(GOOD))
    credit = scorer(classifier=read, w_a=1, w_s=0).score([trace_of("great")])[0]
    assert credit.values[-1] == pytest.approx(other(["great"])[0]) and not credit.values[:-1].any()


def test_macro_f1_by_hand():
    # inappropriate: 2 hits, said 3, there 2; appropriate: 1 hit, said 1, there 2
    assert macro_f1([1, 1, 0, 0], [1, 1, 1, 0]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1([1, 1], [1, 1]) == 0.5 and macro_f1([1, 0], [0, 1]) == 0.0


def write(path, names, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def test_the_corpus(tmp_path):
    names = ["post_id", "issue", "post_text", "Appropriateness", "fold0.0"]
    rows = [["7", "i", "one,\ntwo", "1", "TRAIN"], ["8", "i", "three", "0", "TEST"], ["9", "i", "four", "1", "VALID"]]
    read = load_corpus(write(tmp_path / "a.csv", names, *rows))
    assert [(e.text, e.inappropriate, e.row) for e in read["TRAIN"]] == [("one,\ntwo", True, "7")]
    assert not read["TEST"][0].inappropriate and read["VALID"][0].inappropriate
    both = write(tmp_path / "b.csv", [*names, "Inappropriateness"], [*rows[0], "1"], [*rows[1], "1"])
    with pytest.raises(ValueError, match="row 8: Inappropriateness and Appropriateness differ"):
        load_corpus(both)
    later = write(tmp_path / "c.csv", ["post_text", "Inappropriateness", "fold0.0"], ["x", "1", "TEST"])
    assert load_corpus(later)["TEST"][0].inappropriate
    with pytest.raises(ValueError, match="no column post_text, fold1"):
        load_corpus(write(tmp_path / "d.csv", ["text", "Appropriateness"]), "fold1.0")
    for bad in (["x", "2", "TEST"], ["x", "1", "DEV"], ["x"]):
        with pytest.raises(ValueError, match="row 0: label"):
            load_corpus(write(tmp_path / "e.csv", ["post_text", "Appropriateness", "fold0.0"], bad))


def test_best_of_n_and_perplexity():
    pools = [[trace_of(t) for t in ("here", "a film", "nice film here")], [trace_of(t) for t in ("", "a film")]]
    assert best_of(scorer(), pools) == [1, 1] and best_of(scorer(w_a=1, w_s=0), pools) == [2, 1]
    lm = tiny.lm(0)
    values = perplexities(lm, ["a film", "", "half \udcff"])
    ids = lm.encode_completion("a film", ended=False)[0]
    import torch

    with torch.no_grad():
        logits = lm.causal(torch.tensor([[lm.tokenizer.bos_token_id, *ids]])).logits[0]
    nll = [-float(logits[t].log_softmax(-1)[i]) for t, i in enumerate(ids)]
    assert values[0] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4) and values[1] == 0.0 and values[2] > 1
    told = scorer(perplexity=True, lm=lm).score([pools[0][1]])[0].meta["counts"]
    assert told["perplexity"] == pytest.approx(values[0], rel=1e-6)
    with pytest.raises(ValueError, match="needs the model"):
        scorer(perplexity=True).score([pools[0][1]])


def test_sums_hold_for_odd_text(fitted):
    lm = tiny.lm(0)
    whole = lm.trace("?", " nice film 😀 naïve\n film</s> here", original="a film")
    cut = lm.trace_of_ids(whole.prompt_ids, whole.completion_ids[:13], whole.completion_pieces[:13], meta=whole.meta)
    tool = dataclasses.replace(whole, emitted=tuple(t % 3 > 0 for t in range(len(whole))))
    for trace in (whole, cut, tool):
        for mixture in ("sum", "harmonic", "weighted_harmonic"):
            credit = scorer(classifier=fitted, mixture=mixture).score([trace])[0]
            assert credit.reduce() == pytest.approx(sum(credit.meta["parts"].values())) and credit.reduce() != 0
            assert not credit.values[~trace.mask].any()


def test_what_is_refused_or_told():
    with pytest.warns(UserWarning, match="1 texts are longer"):
        scorer().score([trace_of("film " * 20)])
    for options in ({"w_a": -1.0}, {"w_a": 0.0, "w_s": 0.0}, {"mixture": "geometric"}, {"level": "span"}):
        with pytest.raises(ValueError, match="must"):
            ArgumentRewriting(**options)
    with pytest.raises(ValueError, match="sum to 1"):
        ArgumentRewriting(w_a=0.5, w_s=0.6, mixture="weighted_harmonic")
    with pytest.raises(ValueError, match="row 4 has no column original"):
        scorer().score([trace_of("x", original=" ")])
    with pytest.raises(ValueError, match="name it: folder"):
        scorer(classifier=None).score([trace_of("x")])
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier("nowhere")
    with pytest.raises(ValueError, match="2 numbers for 1 texts"):
        scorer(classifier=lambda texts: [0.5, 0.5]).score([trace_of("x")])
    with pytest.raises(ValueError, match="both classes"):
        fit_classifier(["a", "b"], [True, True])
    with pytest.raises(ValueError, match="ngrams, minilm"):
        fit_classifier(["a", "b"], [True, False], "bert")
