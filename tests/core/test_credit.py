"""Credit: arithmetic, reduction, spans, and the move to another tokenizer, which keeps sums and constants."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pertoken.core.bytes import byte_view
from pertoken.core.credit import EXTENSIVE, INTENSIVE, Credit, Critique, combine, load_credits, save_credits
from pertoken.core.trace import Trace
from tests import tiny

TOKENIZERS = {
    "byte_level": tiny.tokenizer,
    "sentencepiece": tiny.sentencepiece,
    "unigram": lambda: tiny.sentencepiece("unigram"),
    "wordpiece": tiny.wordpiece,
}
WAYS = [(a, b) for a in TOKENIZERS for b in TOKENIZERS if a != b]


def trace_of(text: str, name: str = "byte_level", ended: bool = True, prompt: str = "How was it?") -> Trace:
    """A trace of a text, in one of the tokenizers."""
    view = byte_view(TOKENIZERS[name]())
    prompt_ids, prompt_pieces = view.pieces_of_text(prompt)
    ids, pieces = view.pieces_of_text(text)
    if ended and view.eos_id is not None:
        ids, pieces = (*ids, view.eos_id), (*pieces, b"")
    return Trace(
        prompt_ids=prompt_ids,
        prompt_pieces=prompt_pieces,
        completion_ids=ids,
        completion_pieces=pieces,
        tokenizer=view.fingerprint,
        ended=ended and view.eos_id is not None,
        meta={"row": 3},
    )


def cut(*pieces: bytes, tokenizer: str = "t", ended: bool = False, emitted=None) -> Trace:
    """A trace of given pieces; ids are numbers."""
    return Trace(
        prompt_ids=(1, 2),
        prompt_pieces=(b"", b"Q"),
        completion_ids=tuple(range(len(pieces))),
        completion_pieces=pieces,
        tokenizer=tokenizer,
        ended=ended,
        emitted=emitted,
    )


def on(trace: Trace, values: list[float], **fields) -> Credit:
    return Credit(trace=trace, values=np.array(values), **fields)


ABC = cut(b"ab", b"c", b"")


# ---- arithmetic


def test_arithmetic():
    a = on(ABC, [1.0, 2.0, 3.0], method="a")
    b = on(ABC, [10.0, 0.0, -1.0], method="b")
    assert (a + b).values.tolist() == [11, 2, 2] and (a + b).method == "a+b"
    assert (a - b).values.tolist() == [-9, 2, 4]
    assert (2 * a).values.tolist() == (a * 2).values.tolist() == [2, 4, 6]
    assert (-a).values.tolist() == [-1, -2, -3]
    assert sum([a, b, a]).values.tolist() == [12, 4, 5]  # type: ignore[union-attr]
    assert (a + 1).values.tolist() == (1 + a).values.tolist() == [2, 3, 4] and (a - 1).values.tolist() == [0, 1, 2]
    assert a.map(np.exp, kind="weight").kind == "weight"
    assert a.values.tolist() == [1, 2, 3]  # nothing in place
    assert a.extensive and not a.map(lambda v: v, kind="entropy").extensive


def test_a_number_is_added_where_credit_may_stand():
    seen = cut(b"ab", b"c", b"d", emitted=(True, False, True))
    assert (on(seen, [1, 0, 3]) + 1).values.tolist() == [2, 0, 4]
    total = Credit.of_sequence(seen, 0.5) + 1
    assert total.values.tolist() == [0, 0, 1.5] and total.level == "sequence"


def test_values_are_copied():
    mine = np.array([1.0, 2.0, 3.0])
    credit = Credit(trace=ABC, values=mine)
    mine[:] = 0
    assert credit.values.tolist() == [1, 2, 3]


def test_levels_of_sums():
    token, sequence = Credit(trace=ABC, values=np.ones(3)), Credit.of_sequence(ABC, 1.0)
    assert (token + sequence).level == "token" and (sequence + sequence).level == "sequence"


def test_mixing_is_refused():
    a = Credit(trace=ABC, values=np.ones(3))
    with pytest.raises(ValueError, match=r"two tokenizers \(t, u\).*a \+ b.to"):
        _ = a + Credit(trace=cut(b"ab", b"c", b"", tokenizer="u"), values=np.ones(3))
    with pytest.raises(ValueError, match="adding entropy to reward: say what the sum is"):
        _ = a + Credit(trace=ABC, values=np.ones(3), kind="entropy")
    with pytest.raises(ValueError, match="different tokens"):
        _ = a + Credit(trace=cut(b"ab", b"c"), values=np.ones(2))
    with pytest.raises(ValueError, match="different tokens"):
        _ = a + Credit(trace=ABC, values=np.ones(2), over="prompt")
    with pytest.raises(ValueError, match="different tokens"):  # other ids of the same text
        _ = a + Credit(trace=dataclasses.replace(ABC, completion_ids=(0, 1, 9)), values=np.ones(3))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "points"}, "kind='points' is not one of advantage, attribution"),
        ({"level": "word"}, "level='word' is not one of token, span, sequence"),
        ({"over": "answer"}, "over='answer' is not one of"),
        ({"values": np.ones(2)}, r"shape \(2,\) on 3 completion tokens"),
        ({"values": np.ones((3, 1))}, r"shape \(3, 1\)"),
        ({"over": "all"}, "on 5 all tokens"),
        ({"values": [0, np.nan, 0]}, "nan at completion token 1"),
        ({"values": [0, 0, -np.inf]}, "-inf at completion token 2"),
    ],
)
def test_what_is_no_credit(fields, message):
    with pytest.raises(ValueError, match=message):
        Credit(**({"trace": ABC, "values": np.ones(3)} | fields))


# ---- reduction and spans


def test_reduce():
    credit = on(ABC, [1.0, -2.0, 4.0])
    found = {how: credit.reduce(how) for how in ("sum", "mean", "max", "min", "last")}
    assert found == {"sum": 3, "mean": 1, "max": 4, "min": -2, "last": 4}
    assert credit.reduce() == 3
    with pytest.raises(ValueError, match="reduce='median' is not one of sum"):
        credit.reduce("median")


def test_reduce_sees_emitted_tokens_only():
    trace = cut(b"a", b"b", b"c", b"d", emitted=(True, False, True, False))
    credit = on(trace, [1.0, 100.0, 3.0, 100.0])
    assert [credit.reduce(how) for how in ("sum", "mean", "max", "min", "last")] == [4, 2, 3, 1, 3]
    over_all = on(trace, [10.0, 20.0, 1.0, 100.0, 3.0, 100.0], over="all")
    assert over_all.reduce("sum") == 34 and over_all.reduce("last") == 3
    assert on(trace, [5.0, 7.0], over="prompt").reduce("mean") == 6


def test_empty_completion():
    empty = on(cut(), [])
    assert {empty.reduce(how) for how in ("sum", "mean", "max", "min", "last")} == {0.0}
    assert Credit.of_sequence(cut(), 3.0).values.shape == (0,)
    unseen = cut(b"a", emitted=(False,))
    assert Credit.of_sequence(unseen, 3.0).values.tolist() == [0] and on(unseen, [0]).reduce("max") == 0


def test_of_sequence_stands_on_the_last_emitted_token():
    assert Credit.of_sequence(ABC, 2.5, kind="probability", method="m").values.tolist() == [0, 0, 2.5]
    seen = Credit.of_sequence(cut(b"a", b"b", b"c", emitted=(True, True, False)), 2.5)
    assert seen.values.tolist() == [0, 2.5, 0] and seen.reduce("sum") == 2.5 and seen.level == "sequence"


def test_spans():
    credit = on(cut(b"good", b" fi", b"lm", b"!"), [1.0, 2.0, 3.0, 4.0])
    assert credit.spans([(0, 4), (5, 9), (3, 5), (9, 10)]) == [1, 5, 3, 4]
    assert credit.spans([(5, 9)], how="mean") == [2.5]
    with pytest.raises(ValueError, match="does not lie in the 10 bytes"):
        credit.spans([(0, 11)])
    with pytest.raises(ValueError, match="reduce='median'"):
        credit.spans([(0, 4)], how="median")
    seen = on(cut(b"good", b" film", emitted=(True, False)), [1.0, 0.0])
    assert seen.spans([(0, 9), (5, 9)], how="mean") == [1, 0]
    assert on(ABC, [5.0, 7.0], over="prompt").spans([(0, 1)]) == [7]


def test_critique():
    trace = cut(b"good", b" fi", b"lm", b"!", b"", emitted=(True, True, True, False, True))
    credit = Critique("nice", ((0, 4, 1.0), (3, 7, -0.5), (7, 10, 2.0))).credit(trace, method="judge", meta={"x": 1})
    assert credit.values.tolist() == [0.5, -0.5, 2.0, 0.0, 0.0]  # the third token was not emitted
    assert (credit.level, credit.kind, credit.method, credit.meta) == (
        "span", "reward", "judge", {"critique": "nice", "x": 1},
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not lie"):
        Critique("odd", ((0, 99, 1.0),)).credit(trace)


def test_combine():
    a = on(ABC, [1.0, 2.0, 3.0], method="a", meta={"keep": 1})
    b = on(ABC, [0.0, 1.0, 0.0], method="b", kind="logratio")
    total = combine([a, b], [0.5, -2.0], kind="advantage")
    assert total.values.tolist() == [0.5, -1, 1.5] and total.kind == "advantage"
    assert total.meta == {"keep": 1, "parts": {"a": 3.0, "b": -2.0}}
    assert sum(total.meta["parts"].values()) == total.reduce()
    assert combine([a]).kind == "reward" and combine([a]).values.tolist() == a.values.tolist()
    assert combine([a, a, b * 0]).meta["parts"] == {"a": 12.0, "b": 0.0}  # none is lost
    bare = Credit(trace=ABC, values=np.ones(3))
    assert combine([bare, bare]).meta["parts"] == {"part0": 3.0, "part1": 3.0}
    with pytest.raises(ValueError, match="nothing to combine"):
        combine([])
    with pytest.raises(ValueError, match="1 weights for 2"):
        combine([a, b], [1.0])


# ---- files


def test_save_and_load(tmp_path):
    rng = np.random.default_rng(0)
    credits = [_random(rng, trace_of(tiny.random_text(rng)), kind) for kind in sorted(EXTENSIVE | INTENSIVE)]
    credits.append(dataclasses.replace(credits[0], meta={"ünï": [1, 2]}, version=3, method="x"))
    path = save_credits(credits, tmp_path / "deep" / "c.jsonl")
    again = load_credits(path)
    assert [p.name for p in path.parent.iterdir()] == ["c.jsonl"]
    assert len(again) == len(credits)
    for one, two in zip(credits, again, strict=True):
        assert np.array_equal(one.values, two.values) and one.trace.completion_ids == two.trace.completion_ids
        for name in ("kind", "over", "level", "method", "version", "meta"):
            assert getattr(one, name) == getattr(two, name)
        assert (one + two).values.tolist() == (one * 2).values.tolist()
    empty = on(cut(), [])
    assert Credit.from_json(json.loads(json.dumps(empty.to_json()))).values.shape == (0,)


def _random(rng: np.random.Generator, trace: Trace, kind: str, over: str = "completion") -> Credit:
    values = rng.normal(size=len(trace.ids(over)))
    return Credit(trace=trace, values=values if kind in EXTENSIVE else np.abs(values), kind=kind, over=over)


# ---- to another tokenizer


@pytest.mark.parametrize("a, b", WAYS)
def test_the_sum_of_an_amount_is_kept(a, b):
    rng = np.random.default_rng(1)
    for _ in range(25):
        text = tiny.random_text(rng)
        for over in ("completion", "all"):
            credit = _random(rng, trace_of(text, a), "reward", over)
            moved = credit.to(TOKENIZERS[b]())
            assert moved.trace.text == text and moved.over == over and moved.trace.meta == {"row": 3}
            assert abs(moved.reduce() - credit.reduce()) < 1e-9
            back = moved.to(credit.trace)  # a trace is a target, too
            assert back.trace is credit.trace and abs(back.reduce() - credit.reduce()) < 1e-9


@pytest.mark.parametrize("a, b", WAYS)
def test_a_constant_level_stays_constant(a, b):
    rng = np.random.default_rng(2)
    for _ in range(25):
        trace = trace_of(tiny.random_text(rng), a)
        moved = Credit(trace=trace, values=np.full(len(trace), 0.7), kind="weight").to(TOKENIZERS[b]())
        np.testing.assert_allclose(moved.values, 0.7, rtol=1e-12)


@pytest.mark.parametrize("a, b", WAYS)
def test_values_move_by_shared_bytes(a, b):
    """Against a sum over bytes, written out."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        trace = trace_of(tiny.random_text(rng), a, ended=False)
        amounts, levels = _random(rng, trace, "kl"), _random(rng, trace, "entropy")
        amounts.values[[not p for p in trace.completion_pieces]] = 0  # zero-byte tokens have their own tests
        new = amounts.to(TOKENIZERS[b]()).trace
        sizes = [len(p) for p in trace.completion_pieces]
        per_byte = np.array([v / n for v, n in zip(amounts.values, sizes) for _ in range(n)])
        level_of_byte = np.repeat(levels.values, sizes)
        amount_now, level_now = amounts.to(new).values, levels.to(new).values
        for k, (start, end) in enumerate(new.spans()):
            if start < end:
                assert amount_now[k] == pytest.approx(per_byte[start:end].sum(), abs=1e-12)
                assert level_now[k] == pytest.approx(level_of_byte[start:end].mean(), abs=1e-12)


def test_by_hand():
    old, new = cut(b"ab", b"cdef"), cut(b"a", b"bcd", b"ef", tokenizer="u")
    amount = on(old, [2.0, 8.0], kind="surprisal").to(new)
    assert amount.values.tolist() == [1, 1 + 4, 4] and amount.meta == {}
    level = on(old, [2.0, 8.0], kind="probability").to(new)
    assert level.values.tolist() == [2, (2 + 8 + 8) / 3, 8]
    assert (amount.kind, level.kind, level.trace) == ("surprisal", "probability", new)


def test_the_same_tokens_stay_as_they_are():
    trace = trace_of("naïve 😀")
    credit = Credit(trace=trace, values=np.arange(len(trace)), method="m", meta={"a": 1}, level="span")
    again = credit.to(tiny.tokenizer())
    assert again.values.tolist() == credit.values.tolist()
    assert (again.method, again.meta, again.level) == ("m", {"a": 1}, "span")
    other_prompt = trace.with_prompt((5, 6), byte_view(tiny.tokenizer()))
    assert credit.to(other_prompt).trace is other_prompt


def test_terminator_to_terminator():
    trace = trace_of("a film")
    values = np.zeros(len(trace))
    values[-1] = 5.0
    for kind in ("reward", "weight"):
        moved = Credit(trace=trace, values=values, kind=kind).to(tiny.sentencepiece())
        assert moved.values[-1] == 5 and not moved.values[:-1].any() and moved.meta.get("moved_zero_byte", 0) == 0
        assert moved.trace.completion_ids[-1] == tiny.sentencepiece().eos_token_id and moved.trace.ended


def test_a_tokenizer_without_eos_has_the_amount_on_the_last_word():
    trace = trace_of("a film")
    values = np.zeros(len(trace))
    values[-1] = 5.0
    moved = Credit(trace=trace, values=values).to(tiny.wordpiece())
    assert moved.values[-1] == 5 and moved.meta["moved_zero_byte"] == 1 and not moved.trace.ended
    back = moved.to(tiny.tokenizer())
    assert not back.trace.ended and back.reduce() == pytest.approx(5)


@pytest.mark.parametrize("kind", ["reward", "weight"])
def test_other_zero_byte_tokens_go_to_their_neighbour_and_are_counted(kind):
    old = cut(b"", b"ab", b"", b"cd", b"", b"", ended=True)
    new = cut(b"a", b"bc", b"d", b"", tokenizer="u", ended=True)
    moved = on(old, [1.0, 4.0, 10.0, 6.0, 100.0, 7.0], kind=kind).to(new)
    assert moved.meta["moved_zero_byte"] == 3
    expected = [2 + 1, 2 + 3 + 10, 3 + 100, 7] if kind == "reward" else [4, 5, 6, 7]
    assert moved.values.tolist() == expected
    assert moved.to(old).meta.get("moved_zero_byte") == 3  # nothing more was moved on the way back


def test_a_new_zero_byte_token_has_the_level_of_its_neighbour_and_no_amount():
    old, new = cut(b"abcd"), cut(b"", b"ab", b"", b"cd", b"", tokenizer="u")
    assert on(old, [3.0], kind="entropy").to(new).values.tolist() == [3] * 5
    assert on(old, [3.0]).to(new).values.tolist() == [0, 1.5, 0, 1.5, 0]


@pytest.mark.parametrize("target", ["sentencepiece", "unigram", "wordpiece", "byte_level"])
@pytest.mark.parametrize("kind", ["reward", "entropy"])
def test_a_completion_cut_off_inside_a_character(target, kind):
    """Sampling stopped in the middle of an emoji: those bytes are no text, but their credit is not lost."""
    view = byte_view(tiny.tokenizer())
    ids, pieces = view.pieces_of_text("the film 😀")
    assert len(pieces[-1]) < 4
    trace = dataclasses.replace(trace_of("x", ended=False), completion_ids=ids[:-1], completion_pieces=pieces[:-1])
    assert trace.text.endswith("\ufffd")
    lost = [p for p in pieces[:-1] if set(p) <= set("😀".encode())]
    rng = np.random.default_rng(0)
    credit = _random(rng, trace, kind)
    moved = credit.to(tiny.tokenizer(vocab=300) if target == "byte_level" else TOKENIZERS[target]())
    assert moved.trace.text == "the film " and not moved.trace.ended
    assert moved.meta["moved_zero_byte"] == len(lost) >= 1
    if kind == "reward":
        assert moved.reduce() == pytest.approx(credit.reduce(), abs=1e-9)
    else:
        constant = credit.map(lambda v: np.full_like(v, 0.4)).to(moved.trace)
        np.testing.assert_allclose(constant.values, 0.4)


def test_bytes_that_form_no_character_inside_a_completion():
    old = cut(b"a\xff", b"\xc3", b"b\xe2\x82", b"\xac", b"\x80")  # only ab€ can be read
    new = cut(b"ab", "€".encode(), tokenizer="u")
    moved = on(old, [1.0, 10.0, 3.0, 5.0, 100.0]).to(new)
    # b shares its token with two bytes of the euro sign; \xc3 goes to the next token with bytes, \x80 to the last
    assert moved.values.tolist() == [1 + 10 + 1, 2 + 5 + 100] and moved.meta["moved_zero_byte"] == 2


def test_a_sequence_level_number_stays_one_number():
    for name in TOKENIZERS:
        for kind, ended in (("reward", True), ("reward", False), ("probability", True), ("probability", False)):
            for target in TOKENIZERS:
                credit = Credit.of_sequence(trace_of("the naïve 😀 film", name, ended), 0.7, kind=kind)
                moved = credit.to(TOKENIZERS[target]())
                assert moved.values[-1] == pytest.approx(0.7) and not moved.values[:-1].any()
                assert moved.level == "sequence" and "moved_zero_byte" not in moved.meta
    negative = Credit.of_sequence(cut(b"ab", b"c"), -2.0).to(cut(b"abc", tokenizer="u"))
    assert negative.values.tolist() == [-2]


def test_empty_completions_move():
    for name, target in WAYS:
        if "wordpiece" not in (name, target):
            assert on(trace_of("", name), [2.0]).to(TOKENIZERS[target]()).values.tolist() == [2.0]
        nothing = on(trace_of("", name, ended=False), []).to(TOKENIZERS[target]())
        assert len(nothing.trace) == 0 and nothing.reduce() == 0
    with pytest.raises(ValueError, match="no token in its completion, so credit has nothing to stand on"):
        on(trace_of(""), [2.0]).to(tiny.wordpiece())
    assert len(on(trace_of(""), [0.0]).to(tiny.wordpiece()).trace) == 0


def test_another_text_is_refused():
    credit = on(cut(b"ab"), [1.0])
    with pytest.raises(ValueError, match=r"says b'ac', this trace b'ab'"):
        credit.to(cut(b"ac", tokenizer="u"))
    white = trace_of("  \n", ended=False)
    with pytest.raises(ValueError, match="tokenizations of one text"):
        Credit(trace=white, values=np.ones(len(white))).to(tiny.wordpiece())


def test_over_the_prompt():
    rng = np.random.default_rng(4)
    credit = _random(rng, trace_of("fine", prompt="naïve 😀 question"), "attribution", "prompt")
    moved = credit.to(tiny.sentencepiece())
    assert moved.over == "prompt" and moved.reduce() == pytest.approx(credit.reduce())
    assert moved.trace.prompt_text == "naïve 😀 question"


def test_template_markers_of_a_prompt_are_counted():
    lm = tiny.lm()
    trace = lm.trace("How was it?", "fine")
    markers = sum(not p for p in trace.prompt_pieces)
    credit = Credit(trace=trace, values=np.ones(len(trace.prompt_ids)), over="prompt")
    moved = credit.to(tiny.sentencepiece())
    assert moved.meta["moved_zero_byte"] == markers >= 2 and moved.reduce() == pytest.approx(credit.reduce())


def test_tokens_that_were_not_emitted():
    """A tool's output between two assistant turns: it gets no credit in the new tokenization either."""
    old = cut(b"so ", b"", b"TOOL", b"ok", b"", emitted=(True, True, False, True, True), ended=True)
    emitted = (True, True, False, True, True, True)
    new = cut(b"s", b"o T", b"OOL", b"o", b"k", b"", tokenizer="u", ended=True, emitted=emitted)
    amount = on(old, [3.0, 10.0, 0.0, 4.0, 7.0])
    moved = amount.to(new)
    assert moved.values.tolist() == [1, 2 + 10, 0, 2, 2, 7] and moved.reduce() == amount.reduce()
    apart = cut(b"so ", b"TOOL", b"ok", b"", tokenizer="u", ended=True, emitted=(True, False, True, True))
    # the first turn's terminator goes to the next token that was emitted, not into the tool's output
    assert amount.to(apart).values.tolist() == [3, 0, 4 + 10, 7]
    level = on(old, [0.5, 0.5, 0.0, 0.5, 0.5], kind="weight").to(new)
    assert level.values.tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.5]
    retokenized = amount.to(tiny.tokenizer())
    assert retokenized.trace.emitted is not None and retokenized.reduce() == pytest.approx(amount.reduce())
    spans, mask = retokenized.trace.spans(), retokenized.trace.mask
    of_tool = (spans[:, 0] < spans[:, 1]) & (spans[:, 0] >= 3) & (spans[:, 1] <= 7)
    assert of_tool.any() and not mask[of_tool].any() and mask[~of_tool].all()


def test_moved_counts_add_up():
    credit = on(cut(b"ab", b""), [1.0, 1.0]).to(cut(b"a", b"b", b"", tokenizer="u"))
    assert credit.meta["moved_zero_byte"] == 1
    assert credit.to(cut(b"ab", tokenizer="v")).meta["moved_zero_byte"] == 2
