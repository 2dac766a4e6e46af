# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false
"""CharBench: generation, grading, features from offsets, the analysis by hand."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from pertoken.bench.charbench import TASKS, CharBench, buckets, features, grade, parse, report
from pertoken.bench.charbench.analysis import (
    Graded,
    analyse,
    binned,
    counting_bias,
    logistic_slope,
    mixed_case,
    over_models,
    overlap,
    pearson,
)
from pertoken.core.bytes import byte_view
from tests import tiny

WORDS = [f"{a}{b}{c}{d}" * k for a in "abc" for b in "Ade" for c in "fg" for d in "hi" for k in (1, 2)]


def rule(q):
    """The answer by rule, from the question's text alone."""
    quoted = q.question.split("'")[1::2]
    if q.task == TASKS[0]:
        return len(set(quoted[0]))
    c, w = quoted
    return {TASKS[1]: w.count(c), TASKS[2]: w.find(c), TASKS[3]: len(w) - 1 - w[::-1].find(c)}[q.task]


def test_an_oracle_scores_everything():
    questions, told = CharBench().items(WORDS)
    graded = grade(questions, [str(rule(q)) for q in questions])
    assert all(g.correct for g in graded) and report(graded)["all"] == {"accuracy": 1.0, "valid_rate": 1.0, "n": 72.0}
    assert len(told) == 7 and told[0].startswith("36 words of 4 letters: 9 questions a task")
    for q in questions:
        assert q.task == TASKS[0] or int(q.answer) >= (q.task == TASKS[1])
        assert q.answer in q.candidates and len(q.candidates) == len(q.word) + (q.task in TASKS[:2])


def test_order_and_draws_are_those_of_one_generator():
    given = buckets(WORDS)
    rng = random.Random(42)
    shuffled = {n: list(some) for n, some in given.items()}
    for n in sorted(shuffled):
        rng.shuffle(shuffled[n])
    wanted = []
    for k, task in enumerate(TASKS):
        for n in sorted(shuffled):
            size = len(shuffled[n]) // 4
            for w in shuffled[n][k * size : (k + 1) * size]:
                wanted.append((task, w, None if k == 0 else rng.choice(w)))
    found, _ = CharBench().items(WORDS)
    assert [(q.task, q.word, q.character) for q in found] == wanted
    assert [q.question_idx for q in found] == list(range(len(found)))
    assert CharBench().items(sorted(WORDS, reverse=True))[0] == found  # the list's order does not matter


def test_buckets_that_are_given_are_not_shuffled():
    given = {4: ["abcd", "bcda", "cdab", "dabc"]}
    found, _ = CharBench(seed=1).items(given)
    assert [q.word for q in found] == given[4]
    assert found[1].character == random.Random(1).choice("bcda")


def test_quarters_are_disjoint_and_cells_can_be_cut():
    found, _ = CharBench().items(WORDS)
    by_task = [{q.word for q in found if q.task == t} for t in TASKS]
    assert len(set.union(*by_task)) == sum(map(len, by_task))
    few, _ = CharBench(per_cell=2, tasks=TASKS[2:]).items(WORDS)
    assert len(few) == 2 * 2 * 2 and {q.task for q in few} == set(TASKS[2:])


def test_words_of_a_text():
    found = buckets("Naïve words: four Four fourth! x2345 toolongaword and_under")
    assert found[4] == ["Four", "four"] and found[6] == ["fourth"] and found[5] == ["words"]


def test_first_is_at_most_last_with_equality_where_the_letter_is_alone():
    for word in WORDS:
        for c in set(word):
            first, last = word.index(c), word.rindex(c)
            assert first <= last and (first == last) == (word.count(c) == 1)


def test_random_digits_are_right_once_in_length():
    """4,000 guesses on index tasks of four letters: within five standard errors of 1/4."""
    rng = np.random.default_rng(0)
    questions, _ = CharBench(tasks=TASKS[2:]).items(WORDS)
    questions = [q for q in questions if len(q.word) == 4] * 250
    graded = grade(questions, [str(rng.integers(4)) for _ in questions])
    assert abs(np.mean([g.correct for g in graded]) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(questions))


def test_parsing():
    assert [parse(t) for t in ("3", " +2\n", "03", "３", "3.", "The answer is 3", "")] == [3, 2, 3, 3, None, None, None]
    assert [parse(t, "first_integer") for t in ("3.", "The answer is -3", "none")] == [3, -3, None]
    assert [parse("9" * 5000, how) for how in ("strict", "first_integer")] == [None, None]  # Python reads 4,300 digits
    with pytest.raises(ValueError, match="strict, first_integer"):
        parse("3", "x")


def test_failures_count_as_errors():
    questions, _ = CharBench().items(WORDS)
    found = report(grade(questions, [None] * 36 + ["no"] * 36))
    assert found["all"] == {"accuracy": 0.0, "valid_rate": 0.0, "n": 72.0} and found[TASKS[0]]["n"] == 18
    with pytest.raises(ValueError, match="one each"):
        grade(questions, ["1"])


# ---- features


@pytest.mark.parametrize("where", ["bare", "question"])
@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), tiny.sentencepiece("bpe"), tiny.wordpiece()])
def test_token_lengths_sum_to_the_word(tokenizer, where):
    for q in CharBench().items({4: ["plot", "Film"] * 4, 6: ["acting", "minute"] * 4, 9: ["wonderful"] * 4})[0]:
        cut = features(q, tokenizer, where)
        assert cut.word_length == len(q.word) and cut.unique_characters == len(set(q.word))
        if cut.number_of_tokens is not None:
            assert cut.compression_rate == len(q.word) / cut.number_of_tokens
            if q.task in TASKS[2:]:
                assert 1 <= cut.target_token_length <= len(q.word)
                assert cut.number_of_tokens > 1 or cut.target_token_length == len(q.word)


def test_target_token_by_hand():
    """The tiny tokenizer cuts "plotting" as plot, t, i, n, g."""
    pieces = tiny.lm().encode_completion("plotting", ended=False)[1]
    assert pieces[0] == b"plot"
    given = {8: ["filmfilm", "filmfilm", "plotting", "filmfilm"]}
    (q,) = [q for q in CharBench(tasks=(TASKS[2],)).items(given)[0]]
    cut = features(q, tiny.tokenizer())
    assert cut.number_of_tokens == len(pieces) and cut.gold_share == int(q.answer) / 8
    place, wanted = 0, None
    for p in pieces:
        wanted = len(p) if place <= int(q.answer) < place + len(p) else wanted
        place += len(p)
    assert cut.target_token_length == wanted
    with pytest.raises(ValueError, match="bare, question"):
        features(q, tiny.tokenizer(), "x")


def test_places_are_characters_and_tokens_bytes():
    """The tiny tokenizer cuts "naïve" as n, a and half of ï, its other half, ve; SentencePiece in three."""
    view = byte_view(tiny.tokenizer())
    assert view.pieces_of_text("naïve")[1] == (b"n", b"a\xc3", b"\xaf", b"ve")
    questions = CharBench(tasks=(TASKS[2],)).items({5: ["naïve"] * 4})[0] * 5
    for tokenizer, lengths in ((tiny.tokenizer(), [1, 2, 2, 2, 2]), (tiny.sentencepiece("bpe"), None)):
        ends = (
            np.cumsum([len(p.decode()) for p in byte_view(tokenizer).pieces_of_text("naïve")[1]]) if not lengths else []
        )
        for place, (q, c) in enumerate(zip(questions, "naïve", strict=True)):
            asked = replace(
                q, character=c, answer=str(place), question=q.question.replace(f"'{q.character}'", f"'{c}'")
            )
            for where in ("bare", "question"):
                cut = features(asked, tokenizer, where)
                k = int(np.searchsorted(ends, place, side="right"))
                wanted = lengths[place] if lengths else ends[k] - (ends[k - 1] if k else 0)
                assert cut.target_token_length == wanted and cut.word_length == 5, (c, where)


def test_a_word_that_is_unknown_is_not_spelled():
    (q,) = CharBench(tasks=(TASKS[2],)).items({5: ["xqzjQ"] * 4})[0]
    for where in ("bare", "question"):
        cut = features(q, tiny.wordpiece(), where)
        assert cut.number_of_tokens is cut.target_token_length is cut.compression_rate is None and cut.word_length == 5


# ---- analysis


def g(task, word, c, gold, said, i=0):
    return Graded(i, task, word, c, gold, said)


def test_pearson_and_bins_by_hand():
    x, y = [1.0, 2.0, None, 3.0], [True, True, False, False]
    assert pearson(x, y) == pytest.approx(np.corrcoef([1, 2, 3], [1, 1, 0])[0, 1])
    assert math.isnan(pearson([1.0, 1.0], [True, False])) and math.isnan(pearson([1.0, 2.0], [True, True]))
    assert binned([1, 1, 2, None], [True, False, True, False]) == {1.0: (0.5, math.sqrt(0.125), 2), 2.0: (1.0, 0.0, 1)}


def test_overlap_and_bias():
    a = [g(TASKS[0], "abcd", None, 4, said, i) for i, said in enumerate((4, 3, None))]
    b = [g(TASKS[0], "abcd", None, 4, said, i) for i, said in enumerate((1, 3, 4))]
    assert overlap(a, b) == 1 / 3 and overlap(a[:1], a[:1]) == 0
    assert counting_bias(b) == (pytest.approx(-2.0), pytest.approx(math.sqrt(2)))
    assert math.isnan(counting_bias(a[:1])[0])


def test_mixed_case():
    assert mixed_case(g(TASKS[2], "aXA", "a", 0, 0)) and not mixed_case(g(TASKS[2], "aXb", "a", 0, 0))
    assert mixed_case(g(TASKS[0], "aXb", None, 3, 3)) and not mixed_case(g(TASKS[1], "axb", "a", 1, 1))


def test_analyse_joins_them():
    questions, _ = CharBench().items(WORDS)
    graded = grade(questions, [q.answer if i % 3 else "0" for i, q in enumerate(questions)])
    cuts = [features(q, tiny.tokenizer()) for q in questions]
    found = analyse(graded, cuts)
    assert set(found) == set(TASKS) and set(found[TASKS[2]]["bins"]) == set(cuts[0].__dataclass_fields__)
    with pytest.raises(ValueError, match="one each"):
        analyse(graded, cuts[:1])


def test_correlations_are_averaged_over_models():
    nan = math.nan
    models = [{TASKS[0]: {"pearson": {"n": r, "gold": other}}} for r, other in ((0.5, nan), (nan, nan), (-0.1, nan))]
    found = over_models([*models, {TASKS[1]: {"pearson": {"n": 1.0}}}])
    assert found[TASKS[0]]["n"] == pytest.approx(0.2) and math.isnan(found[TASKS[0]]["gold"])
    assert found[TASKS[1]] == {"n": 1.0}


def test_logistic_slope_finds_a_planted_one():
    """5,000 draws at slope -0.8 beside a control: the interval covers it, and the control's absence does not matter."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=5000), rng.normal(size=5000)
    y = rng.random(5000) < 1 / (1 + np.exp(-(0.3 - 0.8 * x + 0.5 * z)))
    slope, low, high = logistic_slope(x, y, [z])
    assert low < -0.8 < high < 0 and high - low < 0.3 and low < slope < high
    for unit in (1e-4, 1e7):  # of another unit, or far from zero
        assert np.allclose(np.array(logistic_slope(x * unit, y, [z])) * unit, (slope, low, high), rtol=1e-6)
    assert np.allclose(logistic_slope(x + 1e4, y, [z]), (slope, low, high), rtol=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        logistic_slope([1.0, float("nan"), 2.0], [True, False, True])
    with pytest.raises(ValueError, match="constant"):
        logistic_slope(np.ones(5), [True, False, True, False, True])
    with pytest.raises(ValueError, match="separate"):
        logistic_slope([1, 2, 3, 4], [False, False, True, True])


# ---- models


def test_choosing_compares_whole_numbers():
    """The likeliest of the candidates, each with its newline, against the sums of a plain forward."""
    import torch

    lm = tiny.lm()
    lm.context = 256
    questions = CharBench(tasks=TASKS[2:3]).items({4: ["plot", "film", "acts", "loud"]})[0]
    prompts = ["how many"] * len(questions)
    (chosen,) = CharBench().choose(lm, questions[:1], prompts[:1])
    sums = []
    for c in questions[0].candidates:
        t = lm.trace("how many", f"{c}\n", ended=False)
        ids = torch.tensor([t.prompt_ids + t.completion_ids])
        with torch.no_grad():
            logp = lm.causal(ids).logits[0].log_softmax(-1)
        p = len(t.prompt_ids)
        sums.append(sum(logp[p + k - 1, i].item() for k, i in enumerate(t.completion_ids)))
    assert chosen == questions[0].candidates[int(np.argmax(sums))]


def test_bad_options():
    for bad in ({"tasks": ()}, {"tasks": ("x",)}, {"per_cell": 0}):
        with pytest.raises(ValueError):
            CharBench(**bad)
    with pytest.raises(ValueError, match="four words"):
        CharBench().items(["abcd"])
