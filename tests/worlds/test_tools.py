# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The tools world: problems, answers in both forms, mistakes at their rates, and rewards that agree with them."""

import dataclasses
import json

import numpy as np
import pytest

from pertoken.score.tl_training_reward import TLTrainingReward
from pertoken.score.toolrl import ToolRL
from pertoken.worlds import tools
from tests import tiny


def test_problems_depend_on_the_seed_alone_and_name_a_tool_at_hand():
    some = tools.problems(200, 3)
    assert some == tools.problems(200, 3) and some != tools.problems(200, 4)
    for p in some:
        assert p.name in p.tools and len(set(p.tools)) == tools.AT_HAND
        assert list(p.values) == [name for name, _ in tools.TOOLS[p.name][1]]
        assert all(value in p.request for value in p.values.values())
    assert {p.name for p in some} == set(tools.TOOLS)


def test_right_answers_get_the_best_reward_of_both_scorers():
    lm = tiny.lm()
    for row, p in enumerate(tools.problems(20)):
        for form, scorer, best in (("toolrl", ToolRL(), 4.0), ("call", TLTrainingReward(), 1.0)):
            example = p.example(form, row)
            trace = lm.trace("q", p.answer(form), **example.extra)
            assert scorer.score([trace])[0].reduce() == pytest.approx(best)
    assert example.kind == "prompt" and example.row == row and example.prompt == p.prompt


@pytest.mark.parametrize("form", ["toolrl", "call"])
def test_mistakes_come_at_their_rates(form):
    """2,000 answers: each rate within five standard errors (false alarm below 1e-5)."""
    rng, some = np.random.default_rng(0), tools.problems(2000, 5)
    said = [tools.mistaken(p, form, rng) for p in some]
    other = np.mean([p.name not in text for p, text in zip(some, said, strict=True)])
    broken = np.mean([not text.endswith("</tool_call>" if form == "toolrl" else ")") for text in said])
    if form == "toolrl":
        broken = np.mean([_unreadable(text) for text in said])
    for rate, wanted in ((other, tools.MISTAKES["tool"]), (broken, tools.MISTAKES["broken"])):
        assert abs(rate - wanted) < 5 * (wanted * (1 - wanted) / 2000) ** 0.5


def _unreadable(text: str) -> bool:
    try:
        json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
    except ValueError:
        return True
    return False


def test_the_tokenizer_keeps_every_answer():
    words = tools.tokenizer()
    assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2) and len(words) <= 512
    for p in tools.problems(50, 9):
        text = f"{p.prompt}\n{p.answer('toolrl')}"
        assert words.decode(words.encode(text)) == text


def test_a_small_policy_is_made_and_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "CLEAN", 16)
    monkeypatch.setattr(tools, "MISTAKEN", 8)
    lm = tools.policy("call", folder=tmp_path, progress=False)
    again = tools.policy("call", folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1 and lm.identity() == again.identity()
    prompt = lm.encode_prompt("get_weather\nweather in Oslo on monday")
    assert prompt[0] == 1 and lm.tokenizer.decode(prompt[1:]) == "get_weather\nweather in Oslo on monday\n"


def test_problems_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tools.problems(1)[0].name = "x"
