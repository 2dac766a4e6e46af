"""LangGame: every question has one right option, and held-out words are answers in evaluation alone."""

import pytest

from pertoken.worlds.langgame import KINDS, additions, questions, split_words

WORDS = "about letter banana street a on if level copper summer station question beautiful structure tree book".split()


def right_by_rule(q, word):
    """The rule of the question, read from its text alone."""
    subject = q.text.split("'")[1] if q.text.count("'") >= 2 and q.kind != "most" else ""
    return {
        "contains": lambda: subject in word,
        "starts": lambda: word.startswith(subject),
        "ends": lambda: word.endswith(subject),
        "longest": lambda: len(word) == max(map(len, q.options)),
        "shortest": lambda: len(word) == min(map(len, q.options)),
    }[q.kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_one_option_is_right(kind):
    for q in questions(100, WORDS, WORDS, kinds=(kind,), seed=2):
        assert len(set(q.options)) == 4 and q.options[q.right] == q.answer and q.answer in q.prompt
        if kind == "most":
            letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if q.answer.count(c) >= 2]
            assert any(all(o.count(c) <= 1 for o in q.options if o != q.answer) for c in letters)
        else:
            assert [right_by_rule(q, o) for o in q.options] == [i == q.right for i in range(4)]


def test_seeds_and_places():
    some = questions(400, WORDS, WORDS, seed=1)
    assert some == questions(400, WORDS, WORDS, seed=1) != questions(400, WORDS, WORDS, seed=2)
    assert {q.right for q in some} == {0, 1, 2, 3} and {q.kind for q in some} == set(KINDS)


def test_words_are_split():
    seen, unseen = split_words(WORDS, 0.25)
    assert not set(seen) & set(unseen) and sorted(seen + unseen) == sorted(WORDS)
    assert all(q.answer in unseen for q in questions(50, unseen, WORDS, kinds=("contains",)))


def test_additions():
    for asked, said in additions(50):
        a, b = asked.strip("$=").split("+")
        assert int(said[::-1]) == int(a) + int(b)


def test_bad_input():
    with pytest.raises(ValueError, match="choose of"):
        questions(1, WORDS, WORDS, kinds=("x",))
    with pytest.raises(ValueError, match="hold no question of kind longest"):
        questions(1, ["a"], ["b"], kinds=("longest",))
