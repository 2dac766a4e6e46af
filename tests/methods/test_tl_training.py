# pyright: reportArgumentType=false
"""TL-Training: which turns are imitated, which tokens are key, the weighted mean, and PPO's settings."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.data import encode
from pertoken.core.examples import Example
from pertoken.core.protocols import Batch
from pertoken.train._tool_dialogues import (
    ERRORS,
    kept_turns,
    last_replies,
    looks_like_error,
    names_called,
    normalised,
    signatures,
    spoken_call,
    tool_names,
)
from pertoken.train.tl_training import (
    KEY,
    NEUTRAL,
    TLTraining,
    irm_ppo,
    key_places,
    key_tokens,
    parameter_ends,
    pkt_loss,
    pkt_weights,
)
from tests import tiny
from tests.methods.by_hand import gradient, mean, stats

rng = np.random.default_rng(0)


def masks(*rows: str) -> list[torch.Tensor]:
    """k, n and r of a text are key, neutral and other tokens; a dot is padding."""
    return [torch.tensor([[c == kind for c in row] for row in rows]) for kind in "knr"]


def loss_of(logps, rows, **options):
    key, neutral, rest = masks(*rows)
    return pkt_loss(torch.tensor(logps, dtype=torch.float64), pkt_weights(key, neutral, rest, **options))


# ---- the weighted mean


def test_by_hand():
    """One key token of five: w = 4, so (4 * 1 + 2 + 3 + 4 + 5) / (4 + 4)."""
    assert loss_of([[-1.0, -2, -3, -4, -5]], ["krrrr"]).tolist() == [18 / 8]


def test_neutral_tokens_weigh_one_and_do_not_count():
    """|NK| = 3 of five, as one is neutral: w = 3, (3 * 1 + 2 + 3 + 4 + 5) / (3 + 4)."""
    assert loss_of([[-1.0, -2, -3, -4, -5]], ["krrrn"]).tolist() == [17 / 7]


def test_weight_is_capped_at_both_ends():
    key, neutral, rest = masks("kkkrr", "krrrr", "krrrr")
    assert pkt_weights(key, neutral, rest, 9.0)[:, 0].tolist() == [1, 4, 4]
    assert pkt_weights(key, neutral, rest, 2.5)[:, 0].tolist() == [1, 2.5, 2.5]
    many = masks("k" + "r" * 40)
    assert pkt_weights(*many).tolist() == [[9.0] + [1.0] * 40]


@pytest.mark.parametrize("rows,options", [(["krrrr"], {"max_weight": 1.0}), (["kkkkk"], {}), (["rrrrr"], {})])
def test_is_mean_cross_entropy(rows, options):
    """At w_max = 1, where all tokens are key, and where none is."""
    logps = rng.normal(size=(1, 5)) - 2
    assert loss_of(logps, rows, **options).item() == pytest.approx(-logps.mean(), rel=1e-12)


def test_padding_and_empty_answers():
    logps = [[-1.0, -2, math.nan], [math.nan] * 3]
    assert loss_of(logps, ["kr.", "..."]).tolist() == [1.5, 0.0]


def test_masks_must_be_disjoint_and_the_cap_at_least_one():
    key, neutral, rest = masks("krr")
    with pytest.raises(ValueError, match="disjoint"):
        pkt_weights(key, key, rest)
    with pytest.raises(ValueError, match="max_weight"):
        pkt_weights(key, neutral, rest, 0.5)


def test_objective_is_the_mean_over_answers():
    s = {"policy": stats([-1.0, -2, -3], [-4.0, -2], rank=[[0, 0, 5], [3, 0]])}
    columns = {KEY: torch.tensor([[1.0, 0, 0], [1, 0, 0]]), NEUTRAL: torch.zeros(2, 3)}
    loss = TLTraining().loss(s, Batch(None, columns))
    assert mean(loss) == pytest.approx(((2 * 1 + 2 + 3) / 4 + (4 + 2) / 2) / 2)
    assert gradient(loss, s["policy"]).tolist() == [[-0.5, -0.25, -0.25], [-0.5, -0.5, 0.0]]
    assert mean(loss, "key_token_accuracy") == 0.5 and mean(loss, "mean_token_accuracy") == 3 / 5
    assert mean(loss, "cross_entropy") == 12 / 5 and mean(loss, "key_weight") == 1.5
    with pytest.raises(ValueError, match="key_tokens"):
        TLTraining().loss(s, Batch(None))


# ---- key tokens


def test_the_specifications_example():
    called = ["get", "P", "apers", "By", "Author", "("]
    other = ["get", "P", "aper", "Details", "("]
    assert key_places(called, [other]) == [0, 2]
    assert key_places(called, [other, ["search", "("], called]) == [0, 2]
    assert key_places(called, []) == [0]


def test_one_name_begins_with_the_other():
    """The token that tells them apart lies behind the shorter name, the parenthesis included."""
    assert key_places(["get", "("], [["get", "Papers", "("]]) == [0, 1]
    assert key_places(["get", "Papers", "("], [["get", "("]]) == [0, 1]
    assert key_places(["get"], [["get", "Papers"]]) == [0, 1]


def key_texts(answer: str, tools: list[str]) -> list[str]:
    lm = tiny.lm()
    trace = lm.trace("q", answer)
    keys = key_tokens(trace, tools, lambda text: lm.encode_completion(text)[0])
    return [piece.decode() for piece, key in zip(trace.completion_pieces, keys, strict=True) if key]


def test_key_tokens_where_the_names_stand():
    """The tiny tokenizer knows "il" and "plot" as one token each."""
    assert key_texts('filmography(x="the film")', ["filmography", "filmable", "zoo"]) == ["f", "o"]
    assert key_texts("plot_it(x=1)", ["plot_it", "plot", "plot_out"]) == ["plot", "_", "it"]
    assert key_texts("zoo()", ["filmography", "zoo"]) == ["z"]
    assert key_texts("zoo()", ["zoom", "zoo"]) == ["z", "("]
    assert key_texts("no call", ["zoo"]) == []


def test_key_tokens_in_json():
    answer = '{"name": "zoo", "parameters": {"name": "zap"}}\n{"name": "zap", "parameters": {}}'
    assert key_texts(answer, ["zoo", "zap"]) == ["z", "o", "z", "a"]
    assert key_texts('{"name": "z\\"o", "parameters": {}}', ['z"o', "zo"])[0] == "z"


def test_a_called_tool_that_is_not_there():
    for answer in ("zap(x=1)", '{"name": "zap", "parameters": {}}'):
        with pytest.raises(ValueError, match="'zap' is not among the tools at hand"):
            names_called(answer, ["zoo"])
    assert names_called("f(x) = 2 is a function", ["zoo"]) == []
    assert names_called('{"name": "Ann"}', ["zoo"]) == []
    assert names_called("my tool(a=1)", ["my tool"]) == [(0, 7, "my tool")]


def test_parameter_ends_of_the_release():
    """The targets that close a value or the call: the release takes the place before such a token, and its targets lie
    one further. Where there is none: the last but one."""

    def ends(answer: str) -> list[int]:
        trace = tiny.lm().trace("q", answer)
        assert [p for p in trace.completion_pieces[:-1]] == [c.encode() for c in answer]  # tokens are letters here
        return np.flatnonzero(parameter_ends(trace)).tolist()

    assert ends("zoo(x='b', y='c')") == [8, 15]  # the quotes before , and )
    assert ends('zoo(x="b", y="c")') == [15]  # the release's list has no ",
    assert ends("zoo(x=1)") == [7] and ends("zoo()") == [4]
    assert ends("zoo zoo") == [6]
    key, neutral, rest = masks("krrn")
    assert pkt_weights(key, neutral, rest)[0, 0] == 2 < pkt_weights(key, neutral & False, rest | neutral)[0, 0]


# ---- dialogues


def dialogue(*turns: str) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant", "f": "function"}
    return [{"role": roles[t[0]], "content": t[2:]} for t in turns]


FAILED = dialogue("s tools", "u hi", "a one()", "f {'error': 'x'}", "a two()", "f fine", "a so it is")


def test_failed_calls_are_not_imitated_but_stay_in_the_context():
    assert kept_turns(FAILED) == ([4, 6], {"its call failed": 1, "no tool output follows": 0})
    example = Example(prompt=tuple(FAILED[:2]), responses=(tuple(FAILED[2:]),), kind="sft", row=7)
    rows, report = last_replies([example])
    assert [r.responses for r in rows] == [("two()",), ("so it is",)]
    assert [m["content"] for m in rows[0].prompt] == ["tools", "hi", "one()", "{'error': 'x'}"]
    assert report.noted == {"turns not imitated: its call failed": [7]}


def test_without_error_texts_every_turn_with_an_output_is_kept():
    assert kept_turns(FAILED, ())[0] == [2, 4, 6] == kept_turns(FAILED, None)[0]
    chat = dialogue("u hi", "a hello", "u more", "a yes", "u end")
    assert kept_turns(chat, ())[0] == [] and kept_turns(chat, None)[0] == [1, 3]
    assert kept_turns(dialogue("u hi", "a hello", "u more", "a yes")) == (
        [3],
        {"its call failed": 0, "no tool output follows": 1},
    )


def test_errors_are_compared_without_punctuation_and_case():
    assert normalised("A-b_c^1 é 中!") == "abc^1中"
    assert all(looks_like_error(f"so: {e}") for e in ERRORS)
    assert looks_like_error("there was no Error at all")  # the release's, known
    assert looks_like_error("NAME IS NOT DEFINED") and not looks_like_error("fine")
    with pytest.raises(ValueError, match="no letter or digit"):
        looks_like_error("x", ["!?"])


def test_rendering():
    tool = {
        "name": "find",
        "description": "Finds.",
        "parameters": {
            "properties": {"n": {"type": "int", "description": "how many"}, "q": {"type": "str"}},
            "required": ["q"],
        },
    }
    said = (
        'Function:\ndef find(q: str, n: int = None):\n    """\n    Finds.\n\n    Args:\n    q (str): \n'
        '    n (int): how many\n    """'
    )
    now = 'Function:\ndef now():\n    """\n    Tells the time.\n\n    Args:\n    """'
    assert signatures([tool]) == said
    assert signatures([{"type": "function", "function": tool}]) == said  # OpenAI's form
    bare = {"name": "now", "parameters": {"type": "object", "properties": None, "required": None}}
    assert signatures([bare]).startswith("Function:\ndef now():")
    with pytest.raises(ValueError, match="describe no parameters"):
        signatures([{"name": "f", "parameters": {"properties": ["a"]}}])
    assert signatures([tool, {"name": "now", "description": "Tells the time."}]) == f"{said}\n\n{now}"
    assert spoken_call("find", {"q": "é", "n": [1, True]}) == 'find(q="é", n=[1, true])'


def test_tool_names():
    assert tool_names(["a", {"name": "b"}]) == ["a", "b"] and tool_names({"a": ["x"]}) == ["a"]
    assert tool_names([{"type": "function", "function": {"name": "b", "parameters": {}}}]) == ["b"]  # OpenAI's form
    for bad in (None, [], [1], "a", [""], [{"title": "x"}], [{"type": "function", "function": {}}]):
        with pytest.raises(ValueError, match="row 3: column tools"):
            tool_names(bad, 3)


# ---- preparation and training


class Preparing(SimpleNamespace):
    """A run as `prepare` sees it."""

    @property
    def every(self):
        return self.groups + self.held_out


def prepared(examples, max_length=None, **options):
    lm = tiny.lm()
    lm.context = 256
    groups = encode(examples, lm)[0]
    told: list[str] = []
    run = Preparing(groups=groups, held_out=[], policy=lm, report=told.append, max_length=max_length)
    TLTraining(**options).prepare(run)
    return run.groups, told


def test_prepare_cuts_dialogues_and_marks_names():
    tools = {"tools": {"one": [], "two": [], "twin": []}}
    talk = Example(prompt=tuple(FAILED[:2]), responses=(tuple(FAILED[2:]),), kind="sft", extra=tools)
    groups, told = prepared([talk])
    assert [g.traces[0].text for g in groups] == ["two()", "so it is"]
    keys = [np.flatnonzero(g.columns[KEY][0]).tolist() for g in groups]
    assert keys == [[0, 2], []] and not any(g.columns[NEUTRAL][0].any() for g in groups)
    assert any("its call failed" in line for line in told)
    assert "2 answers, 1 with more than one key token, 1 without a call" in told[-1]
    assert len(prepared([talk], mae=False)[0]) == 3
    short, told = prepared([talk], max_length=24)
    assert (
        max(len(g.prompt_ids) + len(g.traces[0]) for g in short)
        <= 24
        < max(len(g.prompt_ids) + len(g.traces[0]) for g in groups)
    )
    (one, _), _ = prepared([talk], compat="reference")
    assert one.columns[NEUTRAL][0].sum() == 1


def test_prepare_names_the_row():
    bad = Example(prompt="q", responses=("zap(x=1)",), kind="sft", row=5, extra={"tools": ["zoo"]})
    with pytest.raises(ValueError, match="row 5: the called tool 'zap'"):
        prepared([bad])
    with pytest.raises(ValueError, match="row 0: column tools"):
        prepared([Example(prompt="q", responses=("zap",), kind="sft")])


def test_options():
    for bad in ({"max_weight": 0.5}, {"max_weight": math.inf}, {"compat": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TLTraining(**bad)


def test_ppo_of_irm():
    ppo = irm_ppo()
    assert ppo.reward == "tl-training-reward" and ppo.kl.kl_coef == 0.3 and ppo.gae.lam == 0.95
    assert ppo.gae.whitening == "none" and ppo.policy_loss.clip == 0.2 and ppo.value.value_clip == 0.2
    assert ppo.rollouts.generations == 1 and ppo.rollouts.sampling.temperature == 0
    assert irm_ppo(scorer=len).reward == ""
