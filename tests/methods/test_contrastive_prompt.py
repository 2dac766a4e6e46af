"""The contrastive token reward: against plain forwards, its identities, its prompts and how they are cut, bad input."""

from typing import Any

import numpy as np
import pytest
import torch

from pertoken.core.trace import Trace
from pertoken.score.contrastive_prompt import PROMPTS, ContrastivePrompt, fill, question_text, token_reward
from tests import tiny
from tests.methods.one_pass import exact_lm
from tests.methods.test_logratio import flat_logps

LM = exact_lm(0)
SHORT: dict[str, Any] = {"better": "{question} Better than {draft}?", "worse": "{question} Worse than {draft}, much?"}
TRACES = [LM.trace("how was the film", "great"), LM.trace("how was the film", "dull"), LM.trace("and now", "not great")]


def score(traces=TRACES, questions=None, **options):
    given: dict[str, Any] = {"lm": LM} | (options if "axis" in options else SHORT | options)
    return ContrastivePrompt(**given).score(traces, questions)


def values(*args, **options):
    return [c.values for c in score(*args, **options)]


def asked(question, draft, template):
    return LM.encode_prompt(template.replace("{question}", question).replace("{draft}", draft))


def test_questions_in_every_form_of_a_message():
    said = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "was it"}]}
    assert question_text([parts]) == "how was it"
    assert question_text([parts, said, {"role": "tool"}]) == "User: how was it\n\nAssistant: \n\nTool: "
    with pytest.raises(ValueError, match="the user turn holds more than text"):
        question_text([{"role": "user", "content": [{"type": "image", "url": "x"}]}])
    for length in (0, -5):
        with pytest.raises(ValueError, match=f"max_length={length} leaves no token"):
            ContrastivePrompt(max_length=length)


def test_against_plain_forwards():
    questions = ["how was it", "so?", [{"role": "user", "content": "and"}]]
    for trace, question, credit in zip(TRACES, ("how was it", "so?", "and"), score(questions=questions)):
        better, worse = (
            flat_logps(LM, trace.with_prompt(asked(question, trace.text, SHORT[side]), LM.view)) for side in SHORT
        )
        expected = 1 / (1 + np.exp(worse - better)) - 0.5
        np.testing.assert_allclose(credit.values, expected, atol=1e-10)
        assert (credit.kind, credit.level, credit.method) == ("reward", "token", "contrastive-prompt")
        assert credit.trace is trace
        assert credit.meta["mean_abs"] == pytest.approx(np.abs(expected).mean())
        assert (credit.meta["better"], credit.meta["worse"]) == tuple(SHORT.values())


def test_swapping_the_prompts_negates():
    swapped = values(better=SHORT["worse"], worse=SHORT["better"])
    for a, b in zip(values(), swapped):
        np.testing.assert_allclose(a, -b, atol=1e-10)
        assert 0 < np.abs(a).max() < 0.5


def test_a_constant_added_to_the_logits_changes_nothing():
    other = exact_lm(0)
    head = other.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() + torch.linspace(-1, 1, 32, dtype=torch.float64))
    for a, b in zip(values(), values(lm=other)):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_token_reward_saturates_without_overflow():
    got = token_reward(np.array([0.0, 0.0, -40.0, -1e5, 0.3]), np.array([0.0, -40.0, 0.0, 0.0, 0.1]))
    assert got[0] == 0 and np.isfinite(got).all() and (np.abs(got) <= 0.5).all()
    np.testing.assert_allclose(got, [0, 0.5, -0.5, -0.5, 1 / (1 + np.exp(-0.2)) - 0.5], atol=1e-12)
    x = np.linspace(-5, 5, 11)
    assert np.array_equal(token_reward(x, 0 * x), -token_reward(0 * x, x))


def test_the_ids_of_the_response_are_never_made_again():
    letters = [LM.view.pieces_of_text(c)[0][0] for c in "great"]
    odd = LM.trace_of_ids(TRACES[0].prompt_ids, letters)  # says "great" in five tokens, not one
    assert odd.text == "great" and len(LM.view.pieces_of_text("great")[0]) < 5
    (credit,) = score([odd], ["how"])
    better, worse = (flat_logps(LM, odd.with_prompt(asked("how", "great", SHORT[s]), LM.view)) for s in SHORT)
    np.testing.assert_allclose(credit.values, token_reward(better, worse), atol=1e-10)


def test_batched_is_one_by_one_in_order():
    traces = [t for group in tiny.groups(LM, n=3) for t in group]
    whole = values(traces)
    for trace, v in zip(traces, whole):
        np.testing.assert_allclose(values([trace])[0], v, atol=1e-10)
    for v, back in zip(whole, reversed(values(traces[::-1]))):
        np.testing.assert_allclose(v, back, atol=1e-10)


def test_empty_unemitted_and_terminator():
    empty = LM.trace_of_ids([5, 6], [])
    tool = LM.trace_of_ids([5, 6], [7, 8, 9], emitted=(True, False, True))
    one, two, three = score([empty, tool, TRACES[0]])
    assert one.values.shape == (0,) and one.meta["mean_abs"] == 0
    assert two.values[1] == 0 and two.meta["mean_abs"] == pytest.approx(np.abs(two.values[[0, 2]]).mean())
    assert TRACES[0].ended and three.values[-1] != 0
    assert score([]) == [] and score([empty, empty])[1].values.shape == (0,)


def test_where_the_question_comes_from():
    plain = TRACES[0]
    carried = Trace(**{**vars(plain), "meta": {"prompt": "why"}})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (a,), (b,) = values([carried]), values([plain], ["why"])
    assert np.array_equal(a, b)
    (a,), (b,) = values([plain]), values([plain], [plain.prompt_text])
    assert np.array_equal(a, b)
    assert question_text(turns) == "User: a\n\nAssistant: b\n\nUser: c"
    with pytest.raises(ValueError, match="2 questions for 1 traces"):
        score([plain], ["a", "b"])


def test_templates():
    assert fill("{question} {x} {draft} {}", "{draft}", "{question}") == "{draft} {x} {question} {}"
    for (_, draft), pair in PROMPTS.items():
        assert all("{question}" in p and ("{draft}" in p) == draft for p in pair) and len(set(pair)) == 2
    better, worse = ContrastivePrompt().prompts
    assert all(word in better for word in ("helpful", "correct", "coherent", "concise"))
    assert all(word in worse for word in ("less helpful", "less correct", "less coherent", "verbose"))
    assert (ContrastivePrompt(axis="tone", draft=False).prompts) == PROMPTS["tone", False]
    (a,), (b,) = values(TRACES[:1], axis="tone", draft=False), values(TRACES[:1], axis="tone", draft=True)
    assert a.shape == b.shape and np.abs(a).max() > 0


# ---- what does not fit


@pytest.mark.parametrize(
    ("question", "draft"),
    [("START" + "so what now " * 30 + "END", "x"), ("?", "FIRST" + "dull and lifeless " * 20 + "LAST")],
)
def test_the_prompt_is_cut_and_never_the_response(question, draft):
    trace = LM.trace("how", draft)
    limit = len(trace) + 60
    scorer = ContrastivePrompt(lm=LM, max_length=limit, **SHORT)
    ids, cut = scorer._fit(LM, trace, question, "item 0")
    assert cut and all(len(i) + len(trace) <= limit for i in ids) and max(map(len, ids)) > 50
    texts = [b"".join(LM.view.pieces(i)).decode() for i in ids]
    assert "Better than" in texts[0] and "Worse than" in texts[1] and "much?" in texts[1]
    if len(question) > 5:  # its end stays, and is the same in both
        assert "what now END Better" in texts[0] and "what now END Worse" in texts[1] and "START" not in texts[0]
    else:  # its beginning stays
        assert "FIRSTdull and" in texts[0] and "LAST" not in texts[0]
    (credit,) = scorer.score([trace], [question])
    assert len(credit.values) == len(trace) and credit.meta["prompt_cut"] is True
    assert "prompt_cut" not in ContrastivePrompt(lm=LM, **SHORT).score([TRACES[0]], ["a"])[0].meta


def test_a_long_question_and_a_long_draft_are_cut_in_proportion():
    question, draft = ("".join(str(i * i % 10) for i in range(n)) for n in (90, 30))  # a token a digit, also in parts
    assert [len(LM.view.pieces_of_text(text)[0]) for text in (question, draft)] == [90, 30]
    trace = LM.trace("how", draft)
    whole = max(len(asked(question, draft, template)) for template in SHORT.values())
    scorer = ContrastivePrompt(lm=LM, max_length=len(trace) + whole - 41, **SHORT)
    ids, cut = scorer._fit(LM, trace, question, "item 0")
    # 41 tokens too many: ceil(41 * 90 / 120) = 31 go from the question's left, the other 10 from the draft's right.
    kept = {"question": question[31:], "draft": draft[:20]}
    assert cut and ids == [asked(template=template, **kept) for template in SHORT.values()]
    (credit,) = scorer.score([trace], [question])
    better, worse = (flat_logps(LM, trace.with_prompt(i, LM.view)) for i in ids)
    np.testing.assert_allclose(credit.values, token_reward(better, worse), atol=1e-10)


def test_a_response_that_does_not_fit_raises_with_its_row():
    long = LM.trace_of_ids([5], [7] * 300, meta={"row": 41})
    for limit in (None, 1000):  # nothing fits beyond the model's context
        with pytest.raises(ValueError, match=r"the response of row 41 takes 300 of 256 tokens"):
            score([long], ["a"], max_length=limit)
    with pytest.raises(ValueError, match=r"the response of item 1 takes .* prompt's own words"):
        score([TRACES[0], LM.trace_of_ids([5], [7] * 230)], ["a", "b"])


# ---- two models in place of two prompts


def test_two_class_conditional_models():
    other = exact_lm(1)
    both = ContrastivePrompt(policies=(LM, other)).score(TRACES)
    back = ContrastivePrompt(policies=(other, LM)).score(TRACES)
    for trace, credit, negated in zip(TRACES, both, back):
        np.testing.assert_allclose(
            credit.values, token_reward(flat_logps(LM, trace), flat_logps(other, trace)), atol=1e-10
        )
        assert np.array_equal(credit.values, -negated.values)
        assert (credit.meta["better"], credit.meta["worse"]) == ("exact-0", "exact-1")


# ---- bad input


def test_bad_options():
    with pytest.raises(ValueError, match=r"ContrastivePrompt\(lm="):
        ContrastivePrompt().score(TRACES)
    with pytest.raises(ValueError, match="axis='colour' is not one of helpfulness, tone"):
        ContrastivePrompt(axis="colour")
    with pytest.raises(ValueError, match="both better and worse"):
        ContrastivePrompt(better="{question}")
    with pytest.raises(ValueError, match="one prompt"):
        ContrastivePrompt(better="a", worse="a")


def test_another_tokenizer():
    foreign = Trace(**{**vars(TRACES[0]), "tokenizer": "another"})
    with pytest.raises(ValueError, match=r"item 1 is of tokenizer another, exact-0 has .*Credit\.to"):
        score([TRACES[0], foreign])
