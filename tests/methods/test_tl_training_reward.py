"""TL-Training's reward by hand: every category, both parsers, and where its parts stand."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false

import json
import time

import pytest

from pertoken.core.trace import Trace
from pertoken.score.tl_training_reward import TLTrainingReward, tools_of

TOOLS = {"weather": ["city", "days", "unit"], "news": ["page"]}
GOLD = "weather(city='Oslo', days='3')"


def cut(*turns, size=3, **meta):
    """A trace whose tokens have `size` bytes; turns by turns, the policy and a tool speak."""
    cuts = [[t.encode()[i : i + size] for i in range(0, len(t.encode()), size)] for t in turns]
    pieces = [piece for turn in cuts for piece in turn]
    emitted = tuple(k % 2 == 0 for k, turn in enumerate(cuts) for _ in turn)
    return Trace(
        prompt_ids=(),
        prompt_pieces=(),
        completion_ids=tuple(range(len(pieces))),
        completion_pieces=tuple(pieces),
        tokenizer="toy",
        emitted=emitted,
        meta=meta,
    )


def credit_of(text, gold=GOLD, tools=TOOLS, **options):
    trace = cut(text, size=1, gold_call=gold, tools=tools, row=4)
    return TLTrainingReward(**options).score([trace])[0]


def on(credit, text, words):
    at = text.encode().index(words.encode())
    return credit.spans([(at, at + len(words.encode()))])[0]


@pytest.mark.parametrize(
    ("text", "value", "parts"),
    [
        ("weather(city='Oslo', days='3')", 1.0, {"right"}),
        ("weather(days='3', city='Oslo')", 1.0, {"right"}),
        ("  weather(\n city='Oslo',\r\n days='3')\n", 1.0, {"right"}),
        ("weather(city='Bergen', days='3')", -0.25, {"values"}),
        ("weather(city='Oslo')", -0.5, {"missing"}),
        ("weather(city='Oslo', days='3', unit='C')", -0.5, {"redundant"}),
        ("weather(city='Oslo', days='3', sky='x')", -0.8, {"hallucinated"}),
        ("weather(city='Oslo', unit='C')", -1.0, {"redundant", "missing"}),
        ("weather(city='Oslo', sky='x')", -1.3, {"hallucinated", "missing"}),
        ("weather(city='Oslo', days='3', unit='C', sky='x')", -1.3, {"hallucinated", "redundant"}),
        ("weather(city='Oslo', unit='C', sky='x')", -1.8, {"hallucinated", "redundant", "missing"}),
        ("weather(sky='x', sea='y')", -1.3, {"hallucinated", "missing"}),  # each kind is counted once
        ("news(page='1')", -1.5, {"wrong_tool"}),
        ("storms(city='Oslo')", -2.0, {"unknown_tool"}),
        ("no call", -2.0, {"format"}),
    ],
)
@pytest.mark.parametrize("parser", ["ast", "regex"])
def test_categories(text, value, parts, parser):
    for level in ("token", "sequence"):
        credit = credit_of(text, parser=parser, level=level)
        assert credit.reduce() == pytest.approx(value, abs=1e-12)
        assert set(credit.meta["parts"]) == parts


@pytest.mark.parametrize(
    ("text", "by_ast", "by_regex"),
    [
        ('weather(city="Oslo", days="3")', 1.0, -0.5),  # the regex sees no double quotes
        ("weather(city='Oslo', days=3)", -0.25, -0.5),  # nor numbers
        ("weather('Oslo', '3')", 1.0, -0.5),  # positional: in the signature's order
        ("weather('Oslo', '3', 'C', 'more')", -1.3, -0.5),  # a surplus one is hallucinated, beside a redundant one
        ("(city='Oslo')", -2.0, -1.5),  # no name
        ("I say weather(city='Oslo', days='3')", -2.0, -2.0),
        ("Well:\nweather(city='Oslo', days='3')", -2.0, 1.0),
        ("weather(city='Oslo', days='3') and more", -2.0, 1.0),
        ("weather(city='Oslo', city='Oslo', days='3')", -2.0, 1.0),
        ("weather(**{'city': 'Oslo'})", -2.0, -0.5),
        ("weather(city=__import__('os').getcwd(), days='3')", -2.0, -0.5),
        ("weather(city='Oslo', days='3'", -2.0, -2.0),
        ("", -2.0, -2.0),
    ],
)
def test_where_the_parsers_differ(text, by_ast, by_regex):
    assert sum(credit_of(text).meta["parts"].values()) == pytest.approx(by_ast)
    assert sum(credit_of(text, parser="regex").meta["parts"].values()) == pytest.approx(by_regex)


def test_a_parenthesis_or_quote_within_a_value():
    gold = "news(page='a (b)')"
    assert credit_of(gold, gold).reduce() == pytest.approx(1.0)
    assert credit_of("news(page='a (b) c')", gold).reduce() == pytest.approx(-0.25)
    assert credit_of('news(page="it\'s")', "news(page='it\\'s')").reduce() == pytest.approx(1.0)


def test_json_values():
    gold = 'news(page={"a": [true, null, 1.5], "b": false})'
    assert credit_of("news(page={'b': False, 'a': [True, None, 1.5]})", gold).reduce() == pytest.approx(1.0)
    assert credit_of("news(page={'b': True})", gold).reduce() == pytest.approx(-0.25)


@pytest.mark.parametrize(
    "text", ["(" * 3000, "a(" * 3000, "news(page='\x00')", "news(page=" + "-" * 5000 + "1)", "1" * 9]
)
def test_hostile_text_is_scored(text):
    assert sum(credit_of(text).meta["parts"].values()) == -2.0  # never run, never raised


def test_a_tool_without_known_parameters_has_only_missing_ones():
    assert credit_of("weather(sky='x')", tools={"weather": []}).reduce() == pytest.approx(-1.3)
    trace = cut("weather(sky='x')", gold_call=GOLD, tools=TOOLS, demo_action="unlisted")
    assert TLTrainingReward().score([trace])[0].meta["parts"] == {"missing": -0.5}
    trace = cut("weather(sky='x')", gold_call=GOLD, tools=TOOLS, demo_action="")  # a prompt without a partial call
    assert set(TLTrainingReward().score([trace])[0].meta["parts"]) == {"hallucinated", "missing"}


def test_parts_stand_on_what_they_speak_of():
    text = "weather(city='Tromsø', unit='C', sky='x')"
    credit = credit_of(text)
    parameters = {"hallucinated": ["sky"], "redundant": ["unit"], "missing": ["days"]}
    assert credit.meta["parameters"] == parameters
    assert on(credit, text, "sky") < 0 and on(credit, text, "unit") < 0 and on(credit, text, ")") == pytest.approx(-0.5)
    assert on(credit, text, "weather") == on(credit, text, "Troms") == 0
    wrong = "weather(city='Tromsø', days='3')"
    found = credit_of(wrong)
    assert on(found, wrong, "Tromsø") == pytest.approx(-0.25 * 7 / 9)  # the quotes are the value's, too
    assert on(found, wrong, "days") == on(found, wrong, "weather") == 0
    named = credit_of("news(page='1')")
    assert on(named, "news(page='1')", "news") == pytest.approx(-1.5) and on(named, "news(page='1')", "1") == 0
    right = credit_of(GOLD)
    assert on(right, GOLD, "weather") == pytest.approx(1 / 3)


def test_only_the_first_turn_is_read_and_scored():
    trace = cut(GOLD, "\n{'error': 1}\n", "Sorry.", gold_call=GOLD, tools=TOOLS)
    credit = TLTrainingReward().score([trace])[0]
    assert credit.reduce() == pytest.approx(1.0)
    assert credit.values[: len(GOLD) // 3].sum() == pytest.approx(1.0)
    assert not credit.values[~trace.mask].any()


def test_columns():
    schemas = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {}, "days": {}}}}]
    assert tools_of(schemas) == {"weather": ["city", "days"]}
    assert tools_of([{"name": "news", "parameters": {"page": {"type": "int"}}}, {"name": "now"}]) == {
        "news": ["page"],
        "now": [],
    }
    nested = [{"type": "function", "function": schema} for schema in schemas]  # OpenAI's form
    assert tools_of(nested) == tools_of(schemas)
    nothing = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    assert tools_of([*nested, nothing])["now"] == []  # an object's schema, no parameter "type"
    for form in (schemas, nested):
        assert credit_of(GOLD, tools=json.loads(json.dumps(form))).reduce() == pytest.approx(1.0)
    silent = (
        {"weather": "city"},
        {"weather": {"properties": {"city": {}}}},
        {"name": "weather", "parameters": {}},
        [],
        {},
    )
    nameless = [{"type": "function", "function": {"parameters": {}}}], [{"type": "function", "function": "weather"}]
    for bad in (None, 3, [{"parameters": {}}], ["weather"], *nameless, *silent):
        with pytest.raises(ValueError, match="row 4: column tools must be"):
            credit_of(GOLD, tools=bad)
    with pytest.raises(ValueError, match="row 4 has no text in column gold_call"):
        credit_of(GOLD, gold=None)
    with pytest.raises(ValueError, match="row 4: its gold call 'weather' is no call"):
        credit_of(GOLD, gold="weather")
    assert credit_of(GOLD, gold="weather", parser="regex").reduce() == pytest.approx(-2.0)
    with pytest.raises(ValueError, match=r"row 4: its gold call .* is no call \(there is no tool storms"):
        credit_of(GOLD, gold="storms(city='Oslo')")
    assert credit_of(GOLD, gold="storms(city='Oslo')", parser="regex").reduce() == pytest.approx(-1.5)
    with pytest.raises(ValueError, match="parser="):
        TLTrainingReward(parser="json")


def test_the_release_s_regex_ends_on_text_without_a_closing_parenthesis():
    """Each of the expression's three parts would try every length: minutes for a thousand parentheses."""
    began = time.process_time()
    for text in ("(" * 3000, ")" + "(" * 3000):
        assert credit_of(text, parser="regex").reduce() == -2.0
    assert time.process_time() - began < 5
