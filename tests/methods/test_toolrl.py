# pyright: reportArgumentType=false
"""ToolRL's reward by hand, its identities, every variant, and where its parts stand."""

import json

import numpy as np
import pytest

from pertoken.core.trace import Trace
from pertoken.score.toolrl import ToolRL, correctness, format_ok, match, pairs_of, thinking
from tests import tiny

THINK = "<think> look it up </think>"


def answer(*calls, think=THINK, response=None):
    lines = "\n".join(json.dumps(c, ensure_ascii=False) for c in calls)
    text = f"{think}\n<tool_call>\n{lines}\n</tool_call>" if calls else think
    return text + (f"\n<response> {response} </response>" if response is not None else "")


def call(name, **parameters):
    return {"name": name, "parameters": parameters}


A, B = call("weather", city="Oslo", days=3), call("news", page=1)
GOLD = answer(A, B)


def trace_of(text, gold=GOLD, row=4) -> Trace:
    return tiny.lm(0).trace("What now?", text, ground_truth=gold, row=row)


def parts(text, gold=GOLD, **options):
    return ToolRL(**options).score([trace_of(text, gold)])[0].meta["parts"]


def test_gold_has_four_and_a_response_row_one():
    assert parts(GOLD) == {"format": 1.0, "correctness": 3.0}
    said = answer(response="Hello.", think=THINK)
    assert parts(said, said) == {"format": 1.0, "correctness": 0.0}
    assert parts(answer(A), answer(think="<think>x</think>")) == {"format": 0.0, "correctness": 0.0}


def test_by_hand():
    """S_max = 1 + (1 + 2) + (1 + 1) = 6; one wrong value costs 6 / 6, a missing parameter 1 + 1/2."""
    wrong = call("weather", city="ZZZ", days=3)
    assert parts(answer(wrong, B))["correctness"] == pytest.approx(6 * 5 / 6 - 3)
    dropped = call("weather", days=3)
    assert parts(answer(dropped, B))["correctness"] == pytest.approx(6 * (1 + 0.5 + 1 + 2) / 6 - 3)
    renamed = call("weatherx", city="Oslo", days=3)
    assert parts(answer(renamed, B))["correctness"] == pytest.approx(6 * (1 / 3 + 2) / 6 - 3)
    twice = answer(A, A, B)  # names: 2 shared of 3; the second cannot be matched again
    assert parts(twice)["correctness"] == pytest.approx(6 * (2 / 3 + 3 + 2) / 6 - 3)


def test_order_of_calls_and_of_parameters_does_not_matter():
    assert parts(answer(B, A))["correctness"] == 3.0
    turned = {"name": "weather", "parameters": {"days": 3, "city": "Oslo"}}
    assert parts(answer(turned, B))["correctness"] == 3.0


def test_match_is_a_multiset_jaccard():
    assert match([], []) == 1.0 and match(["a"], []) == match([], ["a"]) == 0.0
    assert match(["a", "b"], ["b", "a"]) == 1.0 and match(["a", "b"], ["b", "a"], strict=True) == 0.0
    assert match(["a", "a", "b"], ["a", "c"]) == pytest.approx(1 / 4)


def test_values_are_equal_as_python_says():
    assert correctness([call("f", a=1)], [call("f", a=True)], -3, 3) == 3.0
    assert correctness([call("f", a=1)], [call("f", a=1.0)], -3, 3) == 3.0
    assert correctness([call("f", a=1)], [call("f", a="1")], -3, 3) == pytest.approx(6 * 2 / 3 - 3)
    nested = call("f", a={"b": [1, 2]})
    assert correctness([nested], [call("f", a={"b": [1, 2]})], -3, 3) == 3.0


def test_a_gold_call_takes_the_best_of_its_name_and_the_first_of_equals():
    gold = [call("f", a=1), call("f", a=2)]
    assert pairs_of(gold, [call("f", a=2), call("f", a=1)]) == [(1, 2.0), (0, 2.0)]
    assert pairs_of(gold, [call("f", a=3), call("f", a=3)]) == [(0, 1.0), (1, 1.0)]
    assert pairs_of([call("f", a=1)], [call("f", b=1)]) == [(None, 0.0)]  # nothing shared: never taken


@pytest.mark.parametrize(
    "bad",
    [
        "no call at all",
        f"{THINK}\n<tool_call>\n\n</tool_call>",
        f"{THINK}\n<tool_call>\n{{name: 1}}\n</tool_call>",
        f"{THINK}\n<tool_call>\n{json.dumps(A, indent=1)}\n</tool_call>",
        f'{THINK}\n<tool_call>\n{{"name": "weather"}}\n</tool_call>',
        f'{THINK}\n<tool_call>\n{{"parameters": {{}}}}\n</tool_call>',
        f'{THINK}\n<tool_call>\n["weather"]\n</tool_call>',
        f'{THINK}\n<tool_call>\n{{"name": "weather", "parameters": ["Oslo"]}}\n</tool_call>',
        f'{THINK}\n<tool_call>\n{{"name": ["x"], "parameters": {{}}}}\n</tool_call>',
        f"{THINK}\n<tool_call>\n{'[' * 5000}\n</tool_call>",
        f"{THINK}\n<tool_call>\n__import__('os').getcwd()\n</tool_call>",
        "</tool_call> <tool_call>",
    ],
)
def test_what_does_not_parse_has_the_minimum(bad):
    credit = ToolRL().score([trace_of(bad)])[0]
    assert credit.meta["parts"]["correctness"] == -3.0
    assert credit.reduce() == pytest.approx(sum(credit.meta["parts"].values()))


def test_a_block_ends_at_the_next_tag_of_either_kind():
    """As the release's splits: text.split(open)[1].split(close)[0], if both tags are anywhere."""
    one, two = json.dumps(A), json.dumps(B)
    for text in (
        f"{THINK}\n<tool_call>\n{one}\n{two}\n<tool_call>\nand so on\n</tool_call>",
        f"</tool_call>{THINK}\n<tool_call>\n{one}\n{two}\n",
        f"{GOLD}\n<tool_call>\n{one}\n</tool_call>",
    ):
        credit = ToolRL().score([trace_of(text)])[0]
        assert credit.meta["parts"] == {"format": 0.0, "correctness": 3.0}
        assert credit.reduce() == pytest.approx(3.0)
    assert parts(f"</tool_call>\n<tool_call>\n{one}")["correctness"] == pytest.approx(6 * (1 / 2 + 3) / 6 - 3)
    assert parts(f"<tool_call>\n{one}\n{two}")["correctness"] == -3.0


def test_format():
    assert format_ok(GOLD, GOLD) and format_ok(GOLD + "\n", GOLD)
    assert not format_ok("Well. " + GOLD, GOLD) and not format_ok(GOLD + " more", GOLD)
    assert not format_ok(GOLD + "\n<tool_call>\n", GOLD) and not format_ok(answer(response="x"), GOLD)
    both = answer(A, response="done")
    assert format_ok(both, both) and not format_ok(answer(A), both)
    said = answer(response="x")
    assert format_ok(said, said) and format_ok(f"{THINK}\n<response>a\nb</response>", said)
    assert not format_ok(said + "<response>", said)
    assert format_ok(THINK, "none of them") and not format_ok(THINK + "x", "none of them")


def test_granularity():
    wrong = answer(call("weather", city="ZZZ", days=3), B)
    assert parts(wrong, granularity="coarse")["correctness"] == -3.0
    assert parts(GOLD, granularity="coarse")["correctness"] == 3.0
    # whole calls: S_max = 1 + 2, names 1, one call right
    assert parts(wrong, granularity="intermediate")["correctness"] == pytest.approx(6 * 2 / 3 - 3)
    # lists must be equal: the order of calls costs the names, the order of parameters the keys
    assert parts(answer(B, A), granularity="strict")["correctness"] == pytest.approx(6 * 5 / 6 - 3)
    assert parts(wrong, granularity="strict")["correctness"] == pytest.approx(6 * 5 / 6 - 3)


@pytest.mark.parametrize("granularity", ["fine", "strict", "intermediate", "coarse"])
@pytest.mark.parametrize("line", ["5", "[1]", '"x"', "{}", '{"parameters": {}}'])
def test_json_that_is_no_call_has_the_minimum_in_every_variant(line, granularity):
    text = f"{THINK}\n<tool_call>\n{line}\n</tool_call>"
    assert parts(text, granularity=granularity) == {"format": 1.0, "correctness": -3.0}


def test_scales_and_schedules():
    low = {s: ToolRL(schedule="two_stage", step=s).bounds() for s in (0, 29, 30)}
    assert low[0] == low[29] == ((0.0, 1.0), (-1.0, 1.0)) and low[30] == ((0.0, 0.5), (-3.0, 3.0))
    assert ToolRL(scale="one").bounds() == ((0.0, 1.0), (-1.0, 1.0))
    smooth = lambda t, **o: ToolRL(schedule="smooth", **o).at(t).bounds()
    assert smooth(0) == ((-2.0, 2.0), (-2.0, 2.0))
    assert smooth(75) == ((-1.0, 1.5), (-2.5, 2.5))
    assert smooth(150) == smooth(400) == ((0.0, 1.0), (-3.0, 3.0))
    assert smooth(150, compat=True) == ((-1.0, 1.0), (-3.0, 3.0))
    assert parts("no", schedule="smooth") == {"format": -2.0, "correctness": -2.0}


def test_length():
    words = f"<think> {'a ' * 256}</think>"
    assert parts(words, length="fixed")["length"] == 0.5
    assert parts(f"<think> {'a ' * 600}</think>", length="fixed")["length"] == 1.0
    assert parts("no tags", length="fixed")["length"] == 0.0 and "length" not in parts(words)
    assert parts(words, length="scheduled", step=105)["length"] == 0.4
    assert thinking("<think>a</think><think>b c</think>") == (23, 26)
    open_end = f"<think>a</think><think>{'b ' * 256}"  # both tags occur: the release reads on to the end
    assert parts(open_end, length="fixed")["length"] == 0.5
    assert thinking("<think>a") is None and thinking("a</think>") is None


def test_parts_stand_on_what_they_speak_of():
    """The wrong value's tokens are the lowest, the right ones' are up, and all sum to R."""
    text = answer(call("weather", city="Bergen", days=3), B)
    credit = ToolRL().score([trace_of(text)])[0]
    assert credit.reduce() == pytest.approx(1 + 6 * 5 / 6 - 3)
    at = {word: text.encode().index(word.encode()) for word in ("Bergen", "3}", '"news"', "page", "1}")}
    value = {w: credit.spans([(i, i + 1)])[0] for w, i in at.items()}
    assert value["Bergen"] < 0 and all(v > 0 for w, v in value.items() if w != "Bergen")
    whole = credit.spans([(text.index('"Bergen"'), text.index('"Bergen"') + 8)])[0]
    assert whole == pytest.approx(-3 / 6, abs=0.12)  # a token may reach over the quotes
    assert credit.level == "token" and ToolRL(level="sequence").score([trace_of(text)])[0].level == "sequence"


def test_what_is_missing_stands_at_the_end_of_its_call_or_of_the_block():
    text = answer(call("weather", days=3))
    credit = ToolRL().score([trace_of(text)])[0]
    tail = text.index("</tool_call>")
    assert credit.spans([(tail, tail + 12)])[0] < -0.5  # the news call: two of six parts
    assert credit.reduce() == pytest.approx(sum(credit.meta["parts"].values()))


def test_sums_hold_for_odd_text():
    """Non-ASCII, cut characters, duplicate keys, tokens that the policy did not emit."""
    lm = tiny.lm(0)
    text = answer(call("weather", city="Tromsø 😀", days=3), B)
    whole = lm.trace("What now?", text, ground_truth=GOLD)
    cut = lm.trace_of_ids(whole.prompt_ids, whole.completion_ids[:60], whole.completion_pieces[:60], meta=whole.meta)
    emitted = tuple(t % 3 > 0 for t in range(len(whole)))
    tool = lm.trace_of_ids(whole.prompt_ids, whole.completion_ids, emitted=emitted, meta=whole.meta)
    line = '{"name": "news", "name": "news", "parameters": {"page": 2, "page": 1}}'
    twice = f"{THINK}\n<tool_call>\n{line}\n</tool_call>"
    for trace in (whole, cut, tool, lm.trace("?", twice, ground_truth=GOLD)):
        credit = ToolRL().score([trace])[0]
        assert credit.reduce() == pytest.approx(sum(credit.meta["parts"].values()))
        assert not credit.values[~trace.mask].any()


def test_range_over_random_answers():
    rng = np.random.default_rng(0)
    for _ in range(200):
        some = [[str(rng.choice(x)) for x in (["weather", "news", "other"], ["city", "days", "page"])] for _ in "abc"]
        predicted = [call(name, **{key: int(rng.integers(4))}) for name, key in some[: rng.integers(1, 4)]]
        found = parts(answer(*predicted))
        assert -3 <= found["correctness"] <= 3 and found["format"] == 1.0


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="row 4 has no column ground_truth"):
        ToolRL().score([tiny.lm(0).trace("?", "x", row=4)])
    for gold in ("<tool_call>\n{\n</tool_call>", "<tool_call>", '<tool_call>\n{"name": "f"}\n</tool_call>'):
        with pytest.raises(ValueError, match="row 4: its gold calls do not parse"):
            ToolRL().score([trace_of(GOLD, gold)])
    nested = tiny.lm(0).trace("?", GOLD, reward_model={"ground_truth": GOLD, "style": "rule"})
    assert ToolRL().score([nested])[0].reduce() == pytest.approx(4.0)
    with pytest.raises(ValueError, match="step"):
        ToolRL(step=-1)
    for option in ({"granularity": "medium"}, {"scale": "two"}, {"schedule": "x"}, {"length": "x"}, {"level": "x"}):
        with pytest.raises(ValueError, match="is not one of"):
            ToolRL(**option)
