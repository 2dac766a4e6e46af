"""The spelling world: what is right, what is held out, and what the tokenizer keeps."""

import numpy as np
import pytest

from pertoken.worlds import spelling


def test_words():
    words = spelling.lexicon()
    assert len({"".join(w) for w in words}) == spelling.WORDS
    assert {len(w) for w in words} == set(range(1, spelling.SYLLABLES + 1))
    assert spelling.task(3, 5).loose and not spelling.task(4, 5).loose


def test_right_and_wrong():
    task = spelling.Task("w0 f0 =", ("un", ("ka", "ru", "te"), "s"), True)
    assert task.answer == "unkarutes"
    for text in ("unkarutes", "u n k a ' r u - t e s", "unka'rutes", "unkaru'tes"):
        assert spelling.right(task, text) == 1.0
    for text in (
        "",
        "unkarute",
        "un'karutes",
        "unkarute's",
        "unka'-rutes",
        "unka-rutes-",
        "unkarutess",
        "unkaruteS",
        "k'arutes",
    ):
        assert spelling.right(task, text) == 0.0
    strict = task._replace(loose=False)
    assert spelling.right(strict, "unkarutes") == 1.0 and spelling.right(strict, "unka'rutes") == 0.0


def test_everything_written_is_right():
    rng = np.random.default_rng(0)
    forms = {spelling.written(task, rng) for task in spelling.tasks(50, 0) for _ in range(3)}
    assert len(forms) > 70
    for task in spelling.tasks(50, 0):
        said = spelling.written(task, rng)
        assert spelling.right(task, said) and said.translate({39: None, 45: None, 46: None}) == task.answer
        assert len(said) + 1 <= spelling.LONGEST


def test_sides_do_not_meet():
    train, held_out = set(spelling.split(False)), set(spelling.split(True))
    assert not train & held_out and len(train | held_out) == spelling.WORDS * spelling.FORMS
    assert {word for word, _ in train} == set(range(spelling.WORDS))  # every word is in the corpus in some form
    asked = spelling.tasks(300, 3)
    assert len({t.prompt for t in asked}) == 300 and asked == spelling.tasks(300, 3) != spelling.tasks(300, 4)
    known = {f"w{w} f{form} =" for w, form in train}
    assert not known & {t.prompt for t in asked} and all(" ".join(row[:3]) in known for row in spelling.corpus(50, 0))
    with pytest.raises(ValueError, match="no corpus lacks more"):
        spelling.tasks(10_000, 0)


def test_tokenizer():
    tool = spelling.tokenizer()
    ids = tool.encode("w41 f7 = u n k a ' - s", add_special_tokens=False)
    assert tool.unk_token_id not in ids and len(ids) == 10


def test_training_is_a_function_of_its_arguments(tmp_path):
    kept = [spelling.train_lm(layers=1, hidden=16, steps=2, batch=4, folder=tmp_path / n, progress=False) for n in "ab"]
    assert (kept[0] / "model.safetensors").read_bytes() == (kept[1] / "model.safetensors").read_bytes()
