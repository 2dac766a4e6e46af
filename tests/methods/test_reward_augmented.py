"""Reward-augmented pairs: by hand, every identity of the specification, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false, reportOptionalIterable=false, reportOptionalSubscript=false

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from pertoken.core.data import encode
from pertoken.core.examples import Example, Refused
from pertoken.core.lm import LM
from pertoken.train.dpo import DPO
from pertoken.train.reward_augmented import (
    Goal,
    RewardAugmented,
    Scoring,
    augment,
    scored_pairs,
    strip,
    takes_system,
    to_trl,
)
from tests import tiny
from tests.methods.one_pass import exact_lm, pair_stats

SHORT = Goal(sentence="score {goal} of {low} to {high}")
USER = dataclasses.replace(SHORT, place="user")
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "How was it?"}
CHAT = (
    SYSTEM,
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    ASKED,
)


def pair(i=0, scores=(8.0, 3.0), prompt="How was it?", responses=("great", "dull"), **fields):
    fields = {"aspects": {"style": (7.0, 2.0), "truth": (9.0, 9.0)}, "extra": {"id": i}, **fields}
    return Example(prompt=prompt, responses=responses, scores=scores, row=i, **fields)


def content(example):
    return {k: v for k, v in vars(example).items()}


EVERY = [
    pair(0),
    pair(1, (7.5, 9.0)),  # the score disagrees with the label
    pair(2, prompt=(ASKED,)),  # not the same as the text of it
    pair(3, prompt=CHAT),
    pair(4, prompt=CHAT[1:]),
    pair(5, prompt=({"role": "system", "content": ""}, ASKED)),
    pair(6, (5.0, 1.0), responses=(({"role": "assistant", "content": "a"},), "b"), aspects={}),
]


def test_by_hand():
    rows, report = augment([pair()], SHORT)
    assert [r.prompt for r in rows] == [
        ({"role": "system", "content": "score 8 of 1 to 10"}, ASKED),
        ({"role": "system", "content": "score 3 of 1 to 10"}, ASKED),
    ]
    assert [r.responses for r in rows] == [("great", "dull"), ("dull", "great")]
    assert [r.scores for r in rows] == [(8.0, 3.0), (3.0, 8.0)]
    assert [r.aspects["style"] for r in rows] == [(7.0, 2.0), (2.0, 7.0)]
    assert report.kept == 1 and report.total == 1


def test_without_system_turns_the_responses_are_swapped_too():
    """The release exchanges the user turns instead, and so teaches goal 3 -> prefer the 8."""
    rows, _ = augment([pair(), pair(1, prompt=CHAT)], USER)
    assert [r.prompt for r in rows[:2]] == ["score 8 of 1 to 10\n\nHow was it?", "score 3 of 1 to 10\n\nHow was it?"]
    assert [r.responses for r in rows] == [("great", "dull"), ("dull", "great")] * 2
    assert rows[2].prompt == (SYSTEM, {"role": "user", "content": "score 8 of 1 to 10\n\nHello"}, *CHAT[2:])


def test_the_goal_prefers_the_response_that_is_closest_to_it():
    """R(x, y, g) = -(r - g)^2, whatever the label says."""
    for row in augment(EVERY, SHORT)[0]:
        goal = row.extra["augmented"]["goal"]
        chosen, rejected = (-((score - goal) ** 2) for score in row.scores)
        assert chosen > rejected


def test_a_system_turn_is_merged_not_overwritten():
    row = augment([pair(prompt=CHAT)], SHORT)[0][0]
    assert row.prompt == ({"role": "system", "content": "score 8 of 1 to 10\n\nBe brief."}, *CHAT[1:])


def test_scores_are_written_as_they_are_and_nothing_else_is_a_number():
    for score, text in ((8.0, "8"), (7.5, "7.5"), (10, "10"), (7.25, "7.25"), (1.0, "1")):
        said = Goal().say(score)
        numbers = [w.strip(".,()") for w in said.split() if any(c.isdigit() for c in w)]
        assert sorted(numbers) == sorted([text, "1", "10"])
    assert Goal(low=0.5, high=5).say(2.0).count("0.5") == 1
    assert Goal().say((8.0, 7.5), ("truth", "ease_of_use")).count("truth 8, ease of use 7.5") == 1


@pytest.mark.parametrize("goal", [SHORT, USER, Goal(), Goal(sentence=" aim {goal} :", separator="", place="user")])
@pytest.mark.parametrize("order", ["interleaved", "blocks"])
def test_round_trip(goal, order):
    before = copy.deepcopy(EVERY)
    rows, report = augment(EVERY, goal, order=order)
    assert len(rows) == 2 * len(EVERY) and report.kept == len(EVERY)
    assert list(map(content, EVERY)) == list(map(content, before)), "the rows that came in are as they were"
    back = list(map(content, strip(rows)))
    twice = [e for e in EVERY for _ in range(2)] if order == "interleaved" else [*EVERY, *EVERY]
    assert back == list(map(content, twice))


def test_order_and_pairs_of_rows():
    rows, _ = augment(EVERY, SHORT)
    again, _ = augment(EVERY, SHORT)
    blocks, _ = augment(EVERY, SHORT, order="blocks")
    assert list(map(content, rows)) == list(map(content, again))
    assert [content(r) for r in blocks] == [content(r) for r in (*rows[::2], *rows[1::2])]
    for i, (one, other) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert one.row == other.row == i
        assert one.responses == EVERY[i].responses and other.responses == one.responses[::-1]
        assert one.extra["augmented"]["goal"] == EVERY[i].scores[0]
        assert other.extra["augmented"]["goal"] == EVERY[i].scores[1]


def test_the_goal_is_the_same_on_both_sides_of_a_row():
    """In the export as in the ids: both responses stand after one prompt."""
    lm = tiny.lm()
    groups, _ = encode(augment([pair()], SHORT)[0], lm)
    for group, goal in zip(groups, ("8", "3"), strict=True):
        assert group.traces[0].prompt_ids == group.traces[1].prompt_ids
        assert f"score {goal} of 1 to 10" in group.traces[0].prompt_text


def test_calling_twice_is_refused():
    for goal in (SHORT, USER, Goal(), Goal(place="user")):
        rows, _ = augment([pair()], goal)
        with pytest.raises(ValueError, match="has a goal already"):
            augment(rows, goal)
        bare = [dataclasses.replace(r, extra={}) for r in rows]  # as read from somebody's file
        with pytest.raises(ValueError, match="row 0 has a goal already"):
            augment(bare, goal)


def test_only_a_goal_looks_like_a_goal():
    """A short sentence is in many prompts but for its number."""
    for sentence in ("{goal}", "{goal}:", "Aim: {goal}"):
        goal, data = Goal(sentence=sentence), [pair(prompt="Aim: a question? Why")]
        rows, _ = augment(data, goal, aspects=("style", "truth"))
        for made in (rows, augment(data, goal)[0], augment([pair(scores=(7.25, 1.5))], goal)[0]):
            with pytest.raises(ValueError, match="has a goal already"):
                augment([dataclasses.replace(r, extra={}) for r in made], goal)


def test_an_empty_user_turn_comes_back():
    data = [pair(prompt=""), pair(prompt=({"role": "user", "content": ""},))]
    rows, _ = augment(data, dataclasses.replace(USER, separator=""))
    assert list(map(content, strip(rows))) == [content(e) for e in data for _ in range(2)]


def test_ties():
    data = [pair(0), pair(1, (6.0, 6.0)), pair(2)]
    rows, report = augment(data, SHORT)
    assert [r.row for r in rows] == [0, 0, 2, 2] and report.skipped == {"equal scores": [1]}
    kept, report = augment(data, SHORT, tie="keep")
    assert len(kept) == 6 and kept[2].prompt == kept[3].prompt and kept[2].responses == kept[3].responses[::-1]
    rounded, report = augment([pair(0), pair(1, (6.2, 6.4))], dataclasses.replace(SHORT, decimals=0))
    assert len(rounded) == 2 and report.skipped == {"equal scores": [1]}


def test_scores_that_disagree_with_the_label():
    rows, report = augment([pair(0), pair(1, (2.0, 9.0))], SHORT)
    assert len(rows) == 4 and list(report.noted.values()) == [[1]]
    assert [r.responses for r in rows[2:]] == [("great", "dull"), ("dull", "great")]
    rows, report = augment([pair(0), pair(1, (2.0, 9.0))], SHORT, disagreement="drop")
    assert len(rows) == 2 and list(report.skipped.values()) == [[1]] and report.total == 2
    rows, report = augment([pair(0), pair(1, (4.0, 4.0))], SHORT, tie="keep", disagreement="drop")
    assert len(rows) == 4 and not report.skipped  # a tie does not disagree


def test_missing_scores_are_dropped_and_counted():
    data = [pair(0), pair(1, None), pair(2, (math.nan, 3.0)), pair(3, (8.0, -100.0)), pair(4, (-100.0, -100.0))]
    rows, report = augment([*data, pair(5, (math.inf, 1.0))], SHORT)
    assert len(rows) == 2 and report.total == 6
    assert sorted(report.refused.values()) == [[1], [2, 5], [3, 4]]
    with pytest.raises(ValueError, match="no row that can be used"):
        augment(data[1:2], SHORT)
    assert augment(data[1:2], SHORT, required=False)[0] == []


def test_the_scale_and_a_collapse_of_scores():
    with pytest.raises(ValueError, match=r"row 1 is scored 11, outside of 1 to 10"):
        augment([pair(0), pair(1, (11.0, 2.0))], SHORT)
    augment([pair(1, (11.0, -100.0))], dataclasses.replace(SHORT, low=-200, high=20))  # there, -100 is a score
    for tie in ("drop", "keep"):
        with pytest.raises(ValueError, match="all scores are 7"):
            augment([pair(0, (7.0, 7.0)), pair(1, (7.0, 7.0))], SHORT, tie=tie)
    with pytest.raises(ValueError, match="of kind sft"):
        augment([Example(prompt="a", responses=("b",), kind="sft")], SHORT)


def test_several_attributes():
    rows, _ = augment([pair(0, None)], SHORT, aspects=("style", "truth"))
    said = [r.prompt[0]["content"] for r in rows]
    assert said == ["score style 7, truth 9 of 1 to 10", "score style 2, truth 9 of 1 to 10"]
    assert list(map(content, strip(rows))) == [content(pair(0, None))] * 2
    _, report = augment([pair(0), pair(1, aspects={"style": (1.0, 2.0)})], SHORT, aspects=("style", "truth"))
    assert report.refused == {"without scores": [1]}
    assert RewardAugmented(aspects=("style",), goal=SHORT).ask("q") == (
        {"role": "system", "content": "score style 10 of 1 to 10"},
        {"role": "user", "content": "q"},
    )


def test_strip_wants_augmented_rows():
    with pytest.raises(ValueError, match="no goal to take out"):
        strip([pair()])


def test_export_is_trls_conversational_format():
    rows = to_trl(augment([pair(3, prompt=CHAT)], SHORT)[0])
    assert json.loads(json.dumps(rows)) == rows
    assert rows[1]["prompt"][0]["content"] == "score 3 of 1 to 10\n\nBe brief." and rows[1]["prompt"][-1] == ASKED
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "dull"}]
    assert (rows[1]["score_chosen"], rows[1]["score_rejected"]) == (3.0, 8.0)
    from pertoken.core.data import load_examples

    read, _ = load_examples(rows)
    assert [e.responses for e in read] == [("great", "dull"), ("dull", "great")] and read[0].scores == (8.0, 3.0)


def ultra(scores, source="flan", instruction="Why?", missing=()):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    completions = [
        {
            "response": f"answer {k}",
            "overall_score": s,
            "annotations": {a: {"Rating": "N/A" if (k, a) in missing else str(4 - k % 2)} for a in aspects},
        }
        for k, s in enumerate(scores)
    ]
    return {"instruction": instruction, "source": source, "completions": completions}


def test_scored_pairs_of_rows_like_ultrafeedbacks():
    data = [ultra([7.0, 9.0, 5.0, 6.0])] * 400
    found, report = scored_pairs(data, seed=1, worse_aspects=True)
    assert {e.responses[0] for e in found} == {"answer 1"} and found[0].scores[0] == 9.0
    counts = {k: sum(e.responses[1] == f"answer {k}" for e in found) for k in (0, 2, 3)}
    assert sum(counts.values()) == 400 and all(abs(n - 400 / 3) < 4 * math.sqrt(400 * 2 / 9) for n in counts.values())
    assert found[0].aspects["honesty"][0] == 3.0
    assert [e.responses for e in found] == [e.responses for e in scored_pairs(data, seed=1, worse_aspects=True)[0]]
    data = [
        ultra([9.0, 7.0]),
        ultra([9.0, 7.0], source="truthful_qa"),
        ultra([9.0, 7.0], instruction="Is it true?"),
        ultra([9.0, 7.0, 3.0], missing=[(0, "honesty"), (2, "honesty")]),  # one completion left
        ultra([7.0, 9.0]),  # the best has the lower mean of aspects
        ultra([1.0, 9.0]),  # by however much it is the best
    ]
    found, report = scored_pairs(data, leave_out={"Is it true?"})
    assert [e.row for e in found] == [0] and report.total == 6
    assert sorted(report.skipped.values()) == [[1, 2], [4, 5]] and list(report.refused.values()) == [[3]]


# ---- with a model


class Run(SimpleNamespace):
    """What `prepare` is given, in its smallest form."""

    def __init__(self, examples, held=(), lm=None, system=None, max_length=None, **options):
        lm = lm or tiny.lm()
        sides = [encode(list(e), lm, max_length=max_length, system=system)[0] if e else [] for e in (examples, held)]
        super().__init__(groups=sides[0], held_out=sides[1], policy=lm, said=[])
        self.before = self.groups
        RewardAugmented(**{"goal": SHORT, **options}).prepare(self)

    @property
    def every(self):
        return [*self.groups, *self.held_out]

    def report(self, line):
        self.said.append(line)

    def credits(self, name, scorer):
        return [[c.values for c in scorer.score(list(g.traces))] for g in self.every]


NO_SYSTEM = tiny.CHAT.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}",
)
DEAF = tiny.CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


def chat_lm(template):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return LM(tiny.llama(), tokenizer, name="other template")


def test_place_follows_the_template():
    assert takes_system(tiny.lm()) and not takes_system(tiny.lm(chat=False))
    method = RewardAugmented(goal=SHORT)
    for lm in (chat_lm(NO_SYSTEM), chat_lm(DEAF), tiny.lm(chat=False)):
        assert not takes_system(lm) and method.ask("q", 7, lm) == "score 7 of 1 to 10\n\nq"
    assert method.ask("q", lm=tiny.lm())[0] == {"role": "system", "content": "score 10 of 1 to 10"}


def test_prepare_keeps_response_ids_and_encodes_prompts_again():
    lm = tiny.lm()
    run = Run([pair(0), pair(1, (5.0, 5.0)), pair(2, (4.0, 9.0))], held=[pair(3, (2.0, 1.0)), pair(4, None)], lm=lm)
    assert [g.example.row for g in run.groups] == [0, 0, 2, 2] and [g.example.row for g in run.held_out] == [3, 3]
    first, second = run.groups[:2]
    chosen, rejected = run.before[0].pair
    assert [t.completion_ids for t in first.traces] == [chosen.completion_ids, rejected.completion_ids]
    assert [t.completion_ids for t in second.traces] == [rejected.completion_ids, chosen.completion_ids]
    said = ({"role": "system", "content": "score 3 of 1 to 10"}, ASKED)
    assert second.prompt_ids == lm.encode_prompt(said) == second.traces[0].prompt_ids == second.traces[1].prompt_ids
    assert any("equal scores" in line for line in run.said) and any("without scores" in line for line in run.said)


def test_prepare_with_a_scorer_maps_to_the_scale():
    length = {"great": 0.5, "dull": -1.0, "fair": 3.0}
    options = {"scorer": lambda text: length[text], "scoring": Scoring(worst=-1, best=2)}
    run = Run([pair(0, None), pair(1, None, responses=("fair", "great"))], **options)
    assert [g.example.scores for g in run.groups] == [(5.5, 1.0), (1.0, 5.5), (10.0, 5.5), (5.5, 10.0)]
    assert any("scores of 1 pairs beyond" in line for line in run.said)
    assert "score 5.5 of" in run.groups[0].traces[0].prompt_text
    method = RewardAugmented(goal=SHORT, **options)
    rows, report = method.transform([pair(0, None), pair(1, None, responses=("fair", "great"))], tiny.lm())
    assert [r.scores for r in rows] == [g.example.scores for g in run.groups] and [1] in report.noted.values()
    for wrong in ((method, None), (RewardAugmented(scoring=Scoring(score_with="vader")), tiny.lm())):
        with pytest.raises(ValueError, match=r"give transform its lm|hand that scorer"):
            wrong[0].transform([pair()], wrong[1])


def test_transform_is_augment():
    rows, report = RewardAugmented(goal=USER, order="blocks").transform(EVERY, tiny.lm())
    wanted, _ = augment(EVERY, USER, order="blocks")
    assert list(map(content, rows)) == list(map(content, wanted)) and report.kept == len(EVERY)


WORDS = "the plot was great, the acting was not, and how was the film " * 6


@pytest.mark.parametrize("goal", [SHORT, USER])
@pytest.mark.parametrize("prompt", [WORDS, (SYSTEM, {"role": "user", "content": WORDS})])
@pytest.mark.parametrize("how", ["max_length", "max_prompt_length"])
def test_a_cut_never_takes_the_goal(goal, prompt, how):
    lm = tiny.lm()
    options = {"max_length": 90} if how == "max_length" else {"max_prompt_length": 84}
    run = Run([pair(0, prompt=prompt)], goal=goal, **options)
    end = lm.encode_prompt(WORDS)[-12:]
    for group, goal_said in zip(run.groups, ("8", "3"), strict=True):
        text = group.traces[0].prompt_text
        assert text.count(f"score {goal_said} of 1 to 10") == 1
        assert len(group.prompt_ids) + max(map(len, group.traces)) <= 90 and len(group.prompt_ids) > 78
        assert group.prompt_ids[-12:] == end, "what is cut is the beginning of the user's words"
        assert ("Be brief." in text) == (not isinstance(prompt, str))
    assert any("its goal kept" in line for line in run.said)
    rows, _ = augment([pair(0, prompt=prompt)], goal)
    encoded, report = encode(rows, lm, max_length=90)
    assert [g.prompt_ids for g in encoded] != [] and report.noted == {"prompt cut": [0, 0]}
    assert all(len(g.prompt_ids) <= 90 and "of 1 to 10" in g.traces[0].prompt_text for g in encoded)


def test_a_goal_without_room_is_refused():
    with pytest.raises(ValueError, match="no training pair is left"):
        Run([pair(0, prompt=WORDS)], max_prompt_length=10)
    _, report = encode([*augment([pair(0)], Goal())[0], pair(1)], tiny.lm(), max_length=40)
    assert report.kept == 1 and any("does not fit" in reason for reason in report.refused)


def test_old_turns_go_before_the_last_words():
    from pertoken.core.data import fit_prompt

    lm = tiny.lm()
    turns = ({"role": "user", "content": WORDS}, {"role": "assistant", "content": "Hi"}, ASKED)
    for goal in (SHORT, USER):
        row = augment([pair(0, prompt=turns)], goal)[0][0]
        ids, cut = fit_prompt(row.prompt, lm, 60, pinned=row.extra["pinned"])
        wanted = augment([pair(0, prompt=(ASKED,))], goal)[0][0].prompt
        assert cut and ids == lm.encode_prompt(wanted)
    with pytest.raises(Refused, match="does not fit"):
        fit_prompt(row.prompt, lm, 8, pinned=row.extra["pinned"])


def test_prompts_that_are_not_their_words_are_refused():
    with pytest.raises(ValueError, match="make the system turn part"):
        Run([pair(0)], system="Be brief.")
    Run([pair(0, prompt=(SYSTEM, ASKED))])


def test_loss_is_dpos():
    models = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
    groups = tiny.groups(models["policy"], n=4)
    stats, batch = pair_stats(RewardAugmented(), models, groups)
    found = RewardAugmented(beta=0.3, label_smoothing=0.3).loss(stats, batch)
    log_ratio = (stats["policy"].sums() - stats["reference"].sums()).detach().numpy()
    z = 0.3 * (log_ratio[batch.chosen] - log_ratio[batch.rejected])
    expected = (0.7 * np.log1p(np.exp(-z)) + 0.3 * np.log1p(np.exp(z))).sum()
    assert found.sum.item() == pytest.approx(expected, abs=1e-10) and found.count == 4
    assert set(found.metrics) == set(DPO().loss(stats, batch).metrics)


def test_without_sentence_no_goal():
    assert RewardAugmented().beta == 0.01 and RewardAugmented().label_smoothing == 0
    for wrong in (
        {"beta": 0.0},
        {"beta": math.inf},
        {"label_smoothing": 0.5},
        {"order": "x"},
        {"tie": "x"},
        {"disagreement": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RewardAugmented(**wrong)
    for options in ({"sentence": "be good"}, {"low": 10.0}, {"high": math.inf}, {"place": "x"}):
        with pytest.raises(ValueError, match=r"goal|low|place"):
            Goal(**options)
    for sentence in ("aim {goal} {x}", "aim {goal} {", "aim {goal} {}"):
        with pytest.raises(ValueError, match="braces other"):
            Goal(sentence=sentence)
    assert Goal(sentence="aim {goal} of {{10}}").say(7.0) == "aim 7 of {10}"
    for best in (1.0, math.inf):
        with pytest.raises(ValueError, match="leave no scale"):
            Scoring(worst=1.0, best=best)
    with pytest.raises(ValueError, match="leave out the scorer"):
        RewardAugmented(aspects=("style",), scoring=Scoring(score_with="vader"))
