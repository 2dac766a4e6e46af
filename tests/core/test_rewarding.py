"""Rewards of rollouts: sums with weights and parts; rows that fail; scorers in a process of their own."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false
# pyright: reportOptionalMemberAccess=false

import dataclasses

import numpy as np
import pytest

from pertoken.core.credit import Credit
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.isolated import Isolated, WorkerDied
from pertoken.core.rewarding import Rewarder, make_rewarder, with_row
from pertoken.score.vader import Vader
from tests import tiny
from tests.core.scorers import Length, Scheduled


def traces():
    lm = tiny.lm(0)
    return [lm.trace("How was it?", text, row=row) for row, text in enumerate(("good", "bad", "a great film", "so so"))]


def test_a_weighted_sum_keeps_where_each_part_stands():
    items = traces()
    found = Rewarder({"vader": Vader(), "length": Length()}, {"length": 0.5})(items)
    for trace, credit in zip(items, found.credits, strict=True):
        alone = Vader().score([trace])[0].values
        wanted = alone.copy()
        wanted[-1] += 0.5 * len(trace.text)
        np.testing.assert_allclose(credit.values, wanted)
    assert found.parts["length"] == [float(len(t.text)) for t in items]
    assert found.parts["vader.words"] == [c.meta["parts"]["words"] for c in Vader().score(items)]
    assert not found.failures


def test_a_row_that_fails_stops_or_is_left_out():
    items = traces()
    with pytest.raises(ValueError, match=r"length failed on row 1 .*no such thing.*'bad'.*on_error=skip"):
        Rewarder({"length": Length("bad")})(items)
    found = Rewarder({"vader": Vader(), "length": Length("bad")}, on_error="skip")(items)
    assert [c is None for c in found.credits] == [False, True, False, False]
    assert [f[:2] for f in found.failures] == [(1, "length")] and "no such thing" in found.failures[0][2]
    assert found.parts["length"][1] is None and found.parts["vader"][1] is not None


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_is_not_finite_always_stops(on_error):
    with pytest.raises(ValueError, match=r"row 2 .*nan.*'a great film'"):
        Rewarder({"length": Length("film", "nan")}, on_error=on_error)(traces())
    with pytest.raises(ValueError, match=r"row 0 .*inf"):
        make_rewarder("", lambda text: float("inf"), None, on_error)(traces())


@pytest.mark.parametrize("how, said", [("die", "ended with code -9"), ("hang", "more than 1 seconds")])
def test_a_scorer_whose_process_is_killed_or_hangs(how, said):
    scorer = Isolated(Length("bad", how), timeout=1.0)
    try:
        with pytest.raises(WorkerDied, match=said):
            scorer.score(traces()[1:2])
        assert [c.reduce() for c in scorer.score(traces()[:1])] == [4.0]  # started again
        if how == "die":
            found = Rewarder({"length": scorer}, on_error="skip")(traces())
            assert [c is None for c in found.credits] == [False, True, False, False]
    finally:
        scorer.close()


def test_an_isolated_scorer_says_what_the_scorer_says():
    scorer = Isolated(Length("bad"))
    try:
        with pytest.raises(RuntimeError, match=r"KeyError.*no such thing"):
            scorer.score(traces())
        with pytest.raises(ValueError, match=r"row 2 .*nan"):
            Rewarder({"length": Isolated(Length("film", "nan"))}, on_error="skip")(traces())
    finally:
        scorer.close()


def test_an_isolated_scorer_moves_on_and_says_why_it_cannot_start():
    scorer = Isolated(Scheduled())
    try:
        rewarder = Rewarder({"s": scorer})
        found = [r(traces()[:1]).credits[0].reduce() for r in (rewarder.at(5), rewarder, rewarder.at(7))]
        assert found == [5.0, 0.0, 7.0]
    finally:
        scorer.close()
    local = Isolated(lambda text: 1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot go to another process .*defined in a module"):
            local.score(traces())


def test_an_answer_that_was_not_waited_for_is_not_the_next_ones(monkeypatch):
    scorer = Isolated(Length())
    try:
        assert [c.reduce() for c in scorer.score(traces()[:1])] == [4.0]
        with monkeypatch.context() as patched:

            def interrupted(timeout):
                raise KeyboardInterrupt

            patched.setattr(scorer._pipe, "poll", interrupted)
            with pytest.raises(KeyboardInterrupt):
                scorer.score(traces()[1:2])
        assert [c.reduce() for c in scorer.score(traces()[2:3])] == [12.0]
    finally:
        scorer.close()


def test_rewards_by_name():
    made = make_rewarder("vader + 0.5*vader2", {"mine": lambda text: 1.0}, lambda slug: Vader())
    assert list(made.scorers) == ["vader", "vader2", "mine"] and made.weights == {"vader": 1.0, "vader2": 0.5}
    for reward, said in (("", "no reward"), ("x*vader", "no number"), ("vader+vader", "twice")):
        with pytest.raises(ValueError, match=said):
            make_rewarder(reward, None, lambda slug: Vader())
    for weight in ("nan", "inf"):
        with pytest.raises(ValueError, match="give a finite one"):
            make_rewarder(f"{weight}*vader", None, lambda slug: Vader())
    with pytest.raises(ValueError, match="both name vader; give scorer="):
        make_rewarder("0.5*vader", Vader(), lambda slug: Vader())
    with pytest.raises(ValueError, match="on_error"):
        Rewarder({"vader": Vader()}, on_error="ignore")


def test_a_schedule_moves_on():
    class Scheduled:
        def __init__(self, step=0):
            self.step = step

        def at(self, step):
            return Scheduled(step)

        def score(self, items):
            return [Credit.of_sequence(t, float(self.step)) for t in items]

    rewarder = Rewarder({"s": Scheduled()})
    assert [rewarder.at(5)(traces()).credits[0].reduce(), rewarder(traces()).credits[0].reduce()] == [5.0, 0.0]


def test_a_wrong_number_of_credits_or_credit_on_the_prompt():
    class Wrong:
        def __init__(self, over):
            self.over = over

        def score(self, items):
            if self.over is None:
                return []
            return [Credit(trace=t, values=np.zeros(len(t.prompt_ids)), over="prompt") for t in items]

    with pytest.raises(ValueError, match="0 credits for 4"):
        Rewarder({"w": Wrong(None)})(traces())
    with pytest.raises(ValueError, match="over the completion"):
        Rewarder({"w": Wrong("prompt")})(traces())


def test_what_is_no_credit_of_the_completion_is_refused():
    """In another order, on a part of the tokens (one value would be spread over all), or not a credit at all."""

    class Gives:
        def __init__(self, make):
            self.make = make

        def score(self, items):
            return self.make(Length().score(items), items)

    def first_token(credits, items):
        keep = lambda t: dataclasses.replace(
            t, completion_ids=t.completion_ids[:1], completion_pieces=t.completion_pieces[:1]
        )
        return [Credit(trace=keep(t), values=[5.0]) for t in items]

    for make in (lambda credits, items: credits[::-1], first_token):
        for on_error in ("stop", "skip"):
            with pytest.raises(ValueError, match=r"length gave completion 0 \(row 0\) credit on other tokens; give"):
                Rewarder({"length": Gives(make)}, on_error=on_error)(traces())
    for make in (lambda credits, items: [1.0] * 4, lambda credits, items: [*credits[:3], None]):
        with pytest.raises(ValueError, match=r"for row [03], not a Credit; give Credit.of_sequence"):
            Rewarder({"length": Gives(make), "vader": Vader()})(traces())


def test_a_trace_knows_its_row():
    trace = traces()[0]
    example = Example(prompt="How was it?", kind="prompt", row=7, source="a.jsonl", extra={"answer": "good"})
    known = with_row(Group(example=example, prompt_ids=trace.prompt_ids), trace)
    assert (known.meta["answer"], known.meta["row"], known.meta["prompt"]) == ("good", 7, "How was it?")


class Counting:
    """A scorer that says what it could not read."""

    def score(self, items):
        meta = lambda t: {"counts": {"malformed": 2}} if t.text == "bad" else {}
        return [Credit(trace=t, values=np.zeros(len(t)), meta=meta(t)) for t in items]


def test_what_a_scorer_counts_is_told_like_its_parts():
    assert Rewarder({"critic": Counting()})(traces()).parts["critic.malformed"] == [0.0, 2.0, 0.0, 0.0]
