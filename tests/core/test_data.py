"""Rows in every format, every kind of bad row, mixtures, splits, and the tokens of groups."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pertoken.core.data import (
    DataReport,
    Example,
    Group,
    as_kind,
    batches,
    encode,
    load_examples,
    split_by_prompt,
)
from pertoken.core.examples import said_by
from pertoken.core.lm import LM

U, A = "user", "assistant"
HH = "\n\nHuman: {}\n\nAssistant:"


def turns(*said: str, first: str = U) -> list[dict[str, str]]:
    """Messages that alternate between user and assistant."""
    order = (U, A) if first == U else (A, U)
    return [{"role": order[i % 2], "content": text} for i, text in enumerate(said)]


def pairs(n: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_file_kind_gives_the_same_examples(tmp_path, name):
    rows = pairs(3)
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif "jsonl" in name:
        write_lines(path, rows)
    else:
        text = json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    examples, report = load_examples(path)
    assert [(e.prompt, e.responses, e.row) for e in examples] == [
        (f"q {i}", (f"good {i}", f"bad {i}"), i) for i in range(3)
    ]
    assert (report.kept, report.total, examples[0].source) == (3, 3, str(path))


def test_a_json_file_may_hold_lines(tmp_path):
    assert len(load_examples(write_lines(tmp_path / "a.json", pairs(2)))[0]) == 2


def test_a_folder_is_one_source_and_its_splits_are_kept_apart(tmp_path):
    write_lines(tmp_path / "b.jsonl", pairs(2, "b"))
    write_lines(tmp_path / "a.jsonl.gz", pairs(2, "a"))
    (tmp_path / "README.md").write_text("about")
    examples, _ = load_examples(tmp_path)
    assert [(e.prompt, e.row) for e in examples] == [("a 0", 0), ("a 1", 1), ("b 0", 2), ("b 1", 3)]

    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train-00000-of-00001", "validation", "test_prefs"):
        write_lines(folder / f"{split}.jsonl", pairs(1, split))
    assert [e.prompt for e in load_examples(folder)[0]] == ["train-00000-of-00001 0"]
    assert [e.prompt for e in load_examples(folder, split="val")[0]] == ["validation 0"]
    assert [e.prompt for e in load_examples(folder, split="test_prefs")[0]] == ["test_prefs 0"]
    with pytest.raises(ValueError, match=r"no file for split 'extra'.*validation\.jsonl"):
        load_examples(folder, split="extra")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        load_examples(tmp_path / "none")


def test_a_bad_line_is_named_or_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(pairs(1)[0]).encode() + b"\n\n{broken\n" + b'{"prompt": "\xff"}\n[1]\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not a JSON object"):
        load_examples(path)
    examples, report = load_examples(path, on_error="refuse")
    assert len(examples) == 1
    assert report.refused == {"unreadable line": [1, 2], "not an object with columns": [3]}


def test_unreadable_files_are_named(tmp_path):
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b"\n".join(json.dumps(r).encode() for r in pairs(2000)))[:2000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: unreadable after line \d+"):
        load_examples(cut)
    for name, content, message in (
        ("a.parquet", b"PAR1 no", "not a readable Parquet"),
        ("b.json", b"[{]", "b.json: not JSON"),
        ("c.csv", b"a,b", "no reader for this ending"),
        ("d.jsonl", b"", "holds no rows"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_examples(tmp_path / name)


def test_a_missing_path_never_asks_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub for a path"))
    for name in (tmp_path / "no.jsonl", "no/such/path", "./x", "missing.parquet"):
        with pytest.raises(ValueError, match="no file or folder"):
            load_examples(name)


def test_hub_ids_and_datasets_objects(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        if name == "org/none":
            raise DatasetNotFoundError("no such dataset")
        return datasets.Dataset.from_list(pairs(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples, _ = load_examples("org/pairs", split="test", limit=2, hub={"revision": "abc"})
    assert [e.source for e in examples] == ["org/pairs"] * 2
    assert calls == [("org/pairs", {"split": "test", "revision": "abc"})]
    with pytest.raises(ValueError, match="'org/none' is no file or folder, and the Hub"):
        load_examples("org/none")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(2))})
    assert len(load_examples(both)[0]) == 2
    with pytest.raises(ValueError, match="no split 'test' among train"):
        load_examples(both, split="test")


# ---- columns


def test_columns_decide_the_kind():
    for row, kind in (
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pair"),
        ({"prompt": "p", "completion": "a", "label": True}, "unpaired"),
        ({"prompt": "p", "completion": "a"}, "sft"),
        ({"messages": turns("p", "a")}, "sft"),
        ({"prompt": "p"}, "prompt"),
        ({"prompt": "p", "messages": turns("p", "a"), "chosen": "a", "rejected": "b"}, "pair"),
    ):
        (example,), _ = load_examples([row])
        assert example.kind == kind, row


def test_wrong_columns_say_found_and_expected():
    rows = [{"question": "q", "answer": "a"}]
    with pytest.raises(ValueError, match=r"columns question, answer; expected chosen \+ rejected \(pair\).*columns=\{"):
        load_examples(rows)
    with pytest.raises(ValueError, match=r"columns prompt; expected chosen \+ rejected \(pair\)"):
        load_examples([{"prompt": "p", "chosen": None}], kind="pair")
    (example,), _ = load_examples(rows, columns={"question": "prompt", "answer": "completion"})
    assert (example.prompt, example.responses) == ("q", ("a",))
    with pytest.raises(ValueError, match="renames 'questions', which rows has not; found: question, answer"):
        load_examples(rows, columns={"questions": "prompt"})
    with pytest.raises(ValueError, match="'answer' to 'question', which rows has already"):
        load_examples(rows, columns={"answer": "question"})


def test_optional_columns_and_the_rest():
    row = pairs(1)[0] | {"score_chosen": 8, "score_rejected": 2.5, "annotator": 7, "criterion": "safe", "tags": ["x"]}
    row |= {"aspects": {"style": [1, 2], "wit": None}, "id": "r1", "source": "forum"}
    (example,), _ = load_examples([row])
    assert (example.scores, example.annotator, example.criterion) == ((8.0, 2.5), "7", "safe")
    assert (example.tags, example.aspects) == (("x",), {"style": (1.0, 2.0)})
    assert example.extra == {"id": "r1", "source": "forum"}
    (example,), _ = load_examples([pairs(1)[0] | {"aspects": "many", "tags": "x", "score": 3}])
    assert example.extra == {"aspects": "many", "tags": "x", "score": 3}  # a coincidence of names is not lost
    (example,), _ = load_examples([{"prompt": "p", "completion": "a", "label": 0, "score": 1, "aspects": {"wit": 2}}])
    assert (example.label, example.scores, example.aspects) == (False, (1.0,), {"wit": (2.0,)})


def test_what_somebody_says_is_words_turn_by_turn():
    dialogue = turns("p", "a", "q")
    assert [said_by(role, dialogue) for role in ("user", "assistant", "system")] == [["p", "q"], ["a"], []]
    assert said_by("user", "p") == said_by("assistant", "p") == ["p"]


def test_conversations_with_an_explicit_prompt():
    reply = turns("good", first=A), turns("bad", first=A)
    (example,), _ = load_examples([{"prompt": turns("p"), "chosen": reply[0], "rejected": reply[1]}])
    assert example.prompt == ({"role": U, "content": "p"},)
    assert example.responses == ("good", "bad")
    whole = turns("p", "good"), turns("p", "bad", "why", "so")
    (example,), _ = load_examples([{"prompt": turns("p"), "chosen": whole[0], "rejected": whole[1]}])
    assert example.responses == ("good", tuple(turns("bad", "why", "so", first=A)))
    (example,), _ = load_examples([{"prompt": "p", "chosen": whole[0], "rejected": whole[1]}])  # UltraFeedback
    assert example.prompt == ({"role": U, "content": "p"},) and example.extra == {}
    (example,), _ = load_examples([{"prompt": "other", "chosen": whole[0], "rejected": whole[1]}])
    assert example.extra == {"prompt": "other"}
    (example,), _ = load_examples([{"prompt": turns("p"), "completion": turns("a", first=A), "label": True}])
    assert example.responses == ("a",)


def test_conversations_with_an_implicit_prompt():
    def load(chosen, rejected):
        (example,), _ = load_examples([{"chosen": chosen, "rejected": rejected}])
        return list(example.prompt), example.responses

    assert load(turns("p", "a", "q", "good"), turns("p", "a", "q", "bad")) == (turns("p", "a", "q"), ("good", "bad"))
    # part at a user turn: the prompt ends before the shared answer, so that each side begins with an assistant turn
    prompt, responses = load(turns("p", "a", "q1", "x"), turns("p", "a", "q2", "y"))
    assert prompt == turns("p")
    assert responses == (tuple(turns("a", "q1", "x", first=A)), tuple(turns("a", "q2", "y", first=A)))
    # one goes on where the other stops
    assert load(turns("p", "a"), turns("p", "a", "q", "b"))[0] == turns("p")
    # identical ones keep a response each, so that they are counted for what they are
    assert load(turns("p", "a"), turns("p", "a")) == (turns("p"), ("a", "a"))


def test_sft_messages_keep_their_later_turns():
    system = {"role": "system", "content": "s"}
    (example,), _ = load_examples([{"messages": [system, *turns("p", "a", "q", "b")]}])
    assert list(example.prompt) == [system, *turns("p")]
    assert example.responses == (tuple(turns("a", "q", "b", first=A)),)


def test_parquet_messages_lose_the_keys_that_arrow_added(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": U, "content": "p", "name": "ann"}, {"role": A, "content": "a"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (example,), _ = load_examples(tmp_path / "a.parquet")
    assert example.prompt == ({"role": U, "content": "p", "name": "ann"},)
    assert example.responses == ("a",)


def test_hh_transcripts_become_messages():
    start = HH.format("hi") + " hello" + HH.format("joke?")
    (example,), _ = load_examples([{"chosen": start + " one: a\n\nb", "rejected": start + " two"}])
    assert list(example.prompt) == turns("hi", "hello", "joke?")
    assert example.responses == ("one: a\n\nb", "two")
    (example,), _ = load_examples([{"chosen": start + " one" + HH.format("more") + " x", "rejected": start + " two"}])
    assert example.responses == (tuple(turns("one", "more", "x", first=A)), "two")
    # the prompt in its own column, with and without repetition
    for chosen, rejected in ((" one", "two"), (start + " one", start + " two")):
        (example,), _ = load_examples([{"prompt": start, "chosen": chosen, "rejected": rejected}])
        assert list(example.prompt) == turns("hi", "hello", "joke?")
        assert example.responses == ("one", "two")
    (example,), _ = load_examples([{"prompt": start}])
    assert list(example.prompt) == turns("hi", "hello", "joke?")
    (example,), _ = load_examples([{"chosen": start + " one", "rejected": start + " two"}], transcripts="text")
    assert (example.prompt, example.responses) == (start, (" one", " two"))


def test_text_that_only_mentions_humans_is_left_alone():
    rows = [{"prompt": "Human: is one word", "chosen": "Human: a\n\nAssistant: b", "rejected": "b"}]
    (example,), _ = load_examples(rows)
    assert (example.prompt, example.responses) == (rows[0]["prompt"], (rows[0]["chosen"], "b"))


def test_invalid_rows_are_refused_and_counted():
    good = pairs(1)[0]
    talk = {"chosen": turns("p", "a"), "rejected": turns("p", "b")}
    rows: list[Any] = [
        good,
        good | {"rejected": None},
        "text",
        good | {"chosen": 5},
        good | {"chosen": turns("a", first=A)},
        good | {"score_chosen": "high"},
        {"chosen": "a", "rejected": "b"},
        talk | {"chosen": turns("p")},
        talk | {"chosen": turns("other", "a")},
        talk | {"chosen": [{"role": A}]},
        talk | {"prompt": turns("p", "a")},
        talk | {"prompt": turns("x")},
        good | {"chosen": HH.format("a") + " x", "rejected": HH.format("b") + " y", "prompt": None},
    ]
    examples, report = load_examples(rows)
    assert [e.row for e in examples] == [0]
    assert report.refused == {
        "without rejected": [1],
        "not an object with columns": [2],
        "one response is text and the other messages": [3, 4],
        "a score is not a number": [5],
        "without prompt": [6],
        "a response does not end with an assistant turn": [7],
        "the two conversations share no prompt": [8],
        "a response is neither text nor messages with role and content": [9],
        "the prompt has no turn to answer at its end": [10],
        "a response is a conversation that does not begin with the prompt": [11],
        "the two transcripts share no prompt": [12],
    }
    assert report.total == len(rows)
    _, report = load_examples([{"prompt": "p", "completion": "a", "label": x} for x in (True, 1, "yes", 0.5)])
    assert report.refused == {"label is not true or false, 1 or 0, up or down": [2, 3]}
    with pytest.raises(
        ValueError, match=r"rows holds no row that can be used: refused 2: without prompt \(rows 0, 1\)"
    ):
        load_examples([{"chosen": "a", "rejected": "b"}] * 2)


def test_wrong_options_are_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "pairs"}, "kind='pairs' is not one of pair, unpaired"),
        ({"transcripts": "chat"}, "not one of messages, text"),
        ({"on_error": "skip"}, "not one of raise, refuse"),
        ({"limit": 0}, "limit=0 leaves no row"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            load_examples(pairs(1), **options)
    assert len(load_examples(pairs(9), limit=4)[0]) == 4


# ---- examples


def test_an_example_refuses_what_its_kind_has_not():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "triple"}, "kind='triple'"),
        ({"responses": ("a",)}, "row 3: 1 responses; an example of kind pair has 2"),
        ({"kind": "sft", "responses": ("a",), "label": True}, "only to them"),
        ({"kind": "unpaired", "responses": ("a",)}, "label=None"),
        ({"responses": ("a", "b"), "scores": (1.0,)}, "1 scores for 2"),
        ({"responses": ("a", "b"), "aspects": {"wit": (1.0,)}}, "1 wit for 2"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            Example(prompt="p", row=3, **fields)


def test_kinds_are_made_of_others():
    rows = [pairs(1)[0] | {"score_chosen": 2, "score_rejected": 1, "aspects": {"wit": [3, 4]}}]
    (pair,), _ = load_examples(rows)
    good, bad = as_kind([pair], "unpaired")
    assert (good.label, good.responses, good.scores, good.aspects) == (True, ("good 0",), (2.0,), {"wit": (3.0,)})
    assert (bad.label, bad.responses, bad.scores, bad.aspects) == (False, ("bad 0",), (1.0,), {"wit": (4.0,)})
    assert as_kind([pair], "sft")[0].responses == ("good 0",)
    assert as_kind([pair], "prompt")[0].responses == ()
    assert as_kind([pair], "pair") == [pair]
    with pytest.raises(ValueError, match="row 0: a sft example cannot become pair"):
        as_kind(as_kind([pair], "sft"), "pair")
    for kind, n in (("pair", 1), ("unpaired", 2), ("sft", 1), ("prompt", 1)):
        examples, _ = load_examples(rows, kind=kind)
        assert [e.kind for e in examples] == [kind] * n


def test_undesirable_answers_are_not_imitated_and_this_is_counted():
    rows = [{"prompt": f"p{i}", "completion": "a", "label": i % 2 == 0} for i in range(5)]
    examples, report = load_examples(rows, kind="sft")
    assert [e.row for e in examples] == [0, 2, 4]
    assert report.skipped == {"undesirable, so nothing to imitate": [1, 3]}
    assert (report.kept, report.total) == (3, 5)


def test_report_lines_and_arithmetic():
    a = DataReport(kept=5, refused={"empty response": list(range(12))}, noted={"prompt cut": [1]})
    assert a.lines() == [
        "5 of 17 rows kept",
        "refused 12: empty response (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... and 2 more)",
        "kept 1: prompt cut (row 1)",
    ]
    b = DataReport(kept=3, refused={"empty response": [20], "identical pair": [21]}, skipped={"not drawn": [2]})
    both = a.merge(b)
    assert (both.kept, both.total) == (8, 23)
    assert both.refused["empty response"] == [*range(12), 20]
    assert a.refused["empty response"] == list(range(12))  # untouched
    one_after_the_other = a.then(DataReport(kept=4, refused={"identical pair": [7]}))
    assert (one_after_the_other.kept, one_after_the_other.total) == (4, 17)


# ---- mixtures


def test_mixtures_follow_weights_and_seed(tmp_path):
    a, b = write_lines(tmp_path / "a.jsonl", pairs(100, "a")), write_lines(tmp_path / "b.jsonl", pairs(100, "b"))
    examples, report = load_examples(f"{a}:0.7, {b}:0.3", seed=1)
    names = [str(e.prompt)[0] for e in examples]
    assert (names.count("a"), names.count("b")) == (100, 43)
    assert len({e.prompt for e in examples}) == 143  # nothing twice
    assert names != sorted(names)
    assert report.kept == 143 and report.total == 200
    assert [len(rows) for rows in report.skipped.values()] == [57]
    assert examples == load_examples({a: 7, b: 3}, seed=1)[0]
    assert examples != load_examples({a: 7, b: 3}, seed=2)[0]
    few, _ = load_examples({a: 1, b: 1}, limit=10)
    assert sorted(str(e.prompt)[0] for e in few) == ["a"] * 5 + ["b"] * 5


def test_mixtures_refuse_what_cannot_be_mixed(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [*pairs(3), {"prompt": "p", "chosen": "x"}])
    b = write_lines(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    for source, message in (
        (f"{a}:0.5,{b}", "has no weight"),
        (f"{a}:0.5,{b}:0", "not positive"),
        (f"{a}:0.5,{b}:1e", "not a number"),
        ({a: 0.5, b: -1}, "not positive"),
        ({a: 0.5, b: 0.5}, "kinds pair, sft; say which"),
    ):
        with pytest.raises(ValueError, match=message):
            load_examples(source)
    examples, report = load_examples({a: 3, b: 1}, kind="sft")
    assert {e.kind for e in examples} == {"sft"} and len(examples) == 4
    assert report.refused == {f"without rejected in {a}": [3]}


# ---- order


def test_split_by_prompt_keeps_prompts_together_and_rows_where_they_are():
    examples, _ = load_examples(pairs(400) + pairs(400))
    train, test = split_by_prompt(examples, test=0.25, seed=3)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert len(train) + len(test) == 800 and 140 < len(test) < 260
    assert [e.row for e in test] == sorted(e.row for e in test)
    fewer = split_by_prompt(examples[:300], test=0.25, seed=3)[1]
    assert {e.prompt for e in fewer} <= {e.prompt for e in test}  # other rows move nothing
    assert [e.row for e in split_by_prompt(examples, test=0.25, seed=4)[1]] != [e.row for e in test]
    assert split_by_prompt(examples, test=0)[1] == []


def test_split_by_prompt_at_its_edges():
    two, _ = load_examples(pairs(2))
    for share in (0.001, 0.999):
        train, test = split_by_prompt(two, test=share)
        assert len(train) == len(test) == 1
    with pytest.raises(ValueError, match="1 prompt in 1 rows cannot be split"):
        split_by_prompt(two[:1])
    with pytest.raises(ValueError, match="not a share"):
        split_by_prompt(two, test=1.0)
    dialogue = [{"prompt": turns(f"q{i}"), "chosen": "a", "rejected": "b"} for i in range(20)]
    dialogue += [{"prompt": turns(f"q{i}", "a", "more"), "chosen": "a", "rejected": "b"} for i in range(20)]
    dialogue += [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    train, test = split_by_prompt(load_examples(dialogue)[0], test=0.5)
    assert {e.row % 20 for e in train}.isdisjoint({e.row % 20 for e in test})


def flat(lists: list[list[int]]) -> list[int]:
    return [i for part in lists for i in part]


def test_batches_are_a_pure_function_of_seed_and_epoch():
    first = batches(10, 4, seed=0, epoch=0)
    assert [len(b) for b in first] == [4, 4, 2] and sorted(flat(first)) == list(range(10))
    assert first == batches(10, 4, seed=0, epoch=0)
    assert first != batches(10, 4, seed=0, epoch=1) and first != batches(10, 4, seed=1, epoch=0)
    assert flat(batches(10, 5, seed=0, epoch=0)) == flat(first)  # the order does not depend on the batch size
    assert [len(b) for b in batches(10, 4, seed=0, epoch=0, drop_last=True)] == [4, 4]
    assert batches(0, 4, seed=0, epoch=0) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(3, 0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="3 groups do not fill a batch of 4"):
        batches(3, 4, seed=0, epoch=0, drop_last=True)


# ---- tokens

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_lm(chat: bool = True, context: int = 64) -> LM:
    """An LM without weights, which encoding never asks for: byte-level BPE without merges (an id a byte), ChatML or
    plain with a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    special = ["<|im_end|>", "<|im_start|>", "<s>"]
    vocab = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>" if chat else "<s>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = CHATML if chat else None
    config = LlamaConfig(vocab_size=len(vocab), max_position_embeddings=context)
    return LM(SimpleNamespace(config=config), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def chat() -> LM:
    return tiny_lm()


@pytest.fixture(scope="module")
def plain() -> LM:
    return tiny_lm(chat=False, context=24)


def pair(prompt: Any = "p", chosen: Any = "good", rejected: Any = "bad", **fields: Any) -> Example:
    return Example(prompt=prompt, responses=(chosen, rejected), **fields)


def test_a_pair_shares_its_prompt_ids(chat):
    (group,), report = encode([pair(row=5, source="a.jsonl")], chat)
    chosen, rejected = group.pair
    assert chosen.prompt_ids is rejected.prompt_ids is group.prompt_ids == chat.encode_prompt("p")
    assert (chosen.text, rejected.text, chosen.ended) == ("good", "bad", True)
    assert chosen.completion_ids[-1] == chat.terminator
    assert chosen.meta == {"source": "a.jsonl", "row": 5} and chosen.tokenizer == chat.view.fingerprint
    direct = chat.trace("p", "good")
    assert (direct.prompt_ids, direct.completion_ids) == (chosen.prompt_ids, chosen.completion_ids)
    assert (direct.prompt_pieces, direct.completion_pieces) == (chosen.prompt_pieces, chosen.completion_pieces)
    assert report.lines() == ["1 of 1 rows kept"]


def test_each_response_is_tokenized_once(chat, monkeypatch):
    seen = []
    inner = chat.view.pieces_of_text
    monkeypatch.setattr(chat.view, "pieces_of_text", lambda text: seen.append(text) or inner(text))
    encode([pair()], chat)
    assert seen == ["good", "bad"]


def test_several_turns_mark_what_the_policy_did_not_say(chat):
    talk = tuple(turns("a", "q", "b", first=A))
    (group,), _ = encode([Example(prompt=tuple(turns("p")), responses=(talk,), kind="sft")], chat)
    (trace,) = group.traces
    assert trace.emitted is not None and 0 < sum(trace.emitted) < len(trace)
    said = [i for i, own in zip(trace.completion_ids, trace.mask, strict=True) if own]
    assert said == [*chat.encode_completion("a")[0], *chat.encode_completion("b")[0]]
    as_text, _ = encode([Example(prompt="p", responses=(talk,), kind="sft")], chat)
    assert as_text[0].traces[0].completion_ids == trace.completion_ids


def test_system_turns_and_prompts_alone(chat):
    (group,), _ = encode([Example(prompt="p", kind="prompt")], chat, system="be kind")
    assert group.traces == () and group.prompt_ids == chat.encode_prompt("p", "be kind")
    with pytest.raises(ValueError, match="row 0 is of kind prompt"):
        _ = group.pair


def test_bad_rows_are_refused_with_their_numbers(chat):
    rows = [
        pair(),
        pair(chosen=" \n"),
        pair(rejected=""),
        pair(rejected="good"),
        pair(chosen="x" * 64),
        pair(scores=(1.0, math.nan)),
        pair(aspects={"wit": (math.inf, 1.0)}),
        pair(prompt=({"role": "tool", "content": "t"},)),
        pair(chosen=tuple(turns("a", "q", " ", first=A))),
        pair(chosen="good ", rejected="good"),
    ]
    groups, report = encode([Example(**{**vars(e), "row": i}) for i, e in enumerate(rows)], chat)
    assert [g.example.row for g in groups] == [0, 9]
    assert report.refused == {
        "empty response": [1, 2, 8],
        "identical pair": [3],
        "a response does not fit into 64 tokens beside its prompt; shorten it or raise max_length": [4],
        "a score is not finite": [5, 6],
        "no tools here": [7],
    }
    assert (report.kept, report.total) == (2, len(rows))
    with pytest.raises(ValueError, match=r"no row that can be used: refused 1: identical pair \(row 0\)"):
        encode([pair(rejected="good")], chat)
    assert encode([], chat)[0] == []


def test_long_prompts_lose_their_left_end_and_responses_nothing(chat):
    rows = [pair(prompt="x" * 40 + "end", chosen="long answer", row=0), pair(row=1)]
    groups, report = encode(rows, chat, max_length=30)
    group, short = groups
    whole = chat.encode_prompt(rows[0].prompt)
    longest = max(map(len, group.traces))
    assert len(group.prompt_ids) + longest == 30
    assert group.prompt_ids == whole[-len(group.prompt_ids) :]
    assert [t.text for t in group.traces] == ["long answer", "bad"]
    assert report.noted == {"prompt cut": [0]} and report.kept == 2
    assert short.prompt_ids == chat.encode_prompt("p")
    (group, _), report = encode(rows, chat, max_prompt_length=20)
    assert len(group.prompt_ids) == 20


def test_a_bos_survives_the_cut(plain):
    (group,), report = encode([pair(prompt="x" * 30 + "end")], plain)
    assert len(group.prompt_ids) + 5 == plain.context == 24
    assert group.prompt_ids[0] == plain.tokenizer.bos_token_id
    assert group.traces[0].prompt_text.endswith("end")
    (group,), _ = encode([pair(prompt="xyz")], plain, max_prompt_length=1)  # no room for both
    assert group.traces[0].prompt_text == "z"


def test_pinned_text_survives_the_cut(chat, plain):
    for prompt in ("aim high: " + "x" * 60 + "end", ({"role": "user", "content": "aim high: " + "x" * 60 + "end"},)):
        (group,), report = encode([pair(prompt=prompt, extra={"pinned": "aim high: "})], chat, max_length=50)
        assert len(group.prompt_ids) + 5 == 50 and report.noted == {"prompt cut": [0]}
        text = group.traces[0].prompt_text
        assert "aim high: x" in text and "xend" in text
    (group,), _ = encode([pair(prompt="aim: " + "x" * 60 + "end", extra={"pinned": "aim: "})], plain)
    assert group.traces[0].prompt_text.startswith("aim: x") and group.traces[0].prompt_text.endswith("xend")
    row = pair(prompt="x" * 60 + "end", extra={"pinned": "somebody's own column"})
    (group,), _ = encode([row], chat, max_length=50)
    assert group.prompt_ids == chat.encode_prompt(row.prompt)[-len(group.prompt_ids) :]
    with pytest.raises(ValueError, match="'aim high: ' does not fit into 5 tokens"):
        encode([pair(prompt="aim high: xxx", extra={"pinned": "aim high: "})], chat, max_prompt_length=5)


def test_messages_and_a_plain_model(plain):
    with pytest.raises(ValueError, match="no chat template for 3 messages"):
        encode([pair(prompt=tuple(turns("a", "b", "c")))], plain)


def test_lengths_that_cannot_be(chat):
    cases: list[dict[str, Any]] = [{"max_length": 65}, {"max_length": 1}, {"max_prompt_length": 0}]
    for options in cases:
        with pytest.raises(ValueError, match="max_"):
            encode([pair()], chat, **options)


def test_rows_of_two_sources_are_told_apart(chat):
    rows = [pair(rejected="good", source="a", row=1), pair(rejected="good", source="b", row=1), pair(source="a")]
    _, report = encode(rows, chat)
    assert report.refused == {"identical pair in a": [1], "identical pair in b": [1]}


def test_columns_are_checked(chat):
    (group,), _ = encode([pair(row=9)], chat)
    values = [np.zeros(len(t)) for t in group.traces]
    group.add_column("reference_logps", values)
    group.add_column("margin", 1.5)
    group.add_column("score", [1.0, 2.0])
    assert set(group.columns) == {"reference_logps", "margin", "score"}
    for bad, message in (
        (values[:1], "1 entries for 2 completions"),
        ([values[0], values[0]], r"shape \(5,\) for 4 tokens"),
        (math.nan, "not finite"),
        ([values[0], values[1] + np.inf], "not finite"),
    ):
        with pytest.raises(ValueError, match=f"column 'c' of row 9.*{message}"):
            group.add_column("c", bad)
    other = chat.trace("q", "x")
    with pytest.raises(ValueError, match="row 9: traces of several prompts"):
        Group(example=group.example, prompt_ids=group.prompt_ids, traces=(*group.traces, other))


# ---- real data


@pytest.mark.skipif(not os.environ.get("PERTOKEN_DATA"), reason="PERTOKEN_DATA names no folder of extra real data")
def test_hh_pairs_load_whole():
    examples, report = load_examples(Path(os.environ["PERTOKEN_DATA"]) / "hh_harmless")
    assert (len(examples), report.kept, report.total) == (1636, 1636, 1636)
    assert all(isinstance(e.prompt, tuple) and e.prompt[-1]["role"] == U for e in examples)
    assert all(isinstance(r, str) and r for e in examples for r in e.responses)
    train, test = split_by_prompt(examples)
    assert 100 < len(test) < 240 and len(train) + len(test) == 1636
