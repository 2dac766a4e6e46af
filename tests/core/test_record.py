"""Provenance, content hashes, and JSON files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pertoken import __version__
from pertoken.core import record
from pertoken.core.data import load_examples
from pertoken.core.record import canonical_json, data_hash, git_state, provenance, read_json, whole_file, write_json


def test_provenance_says_what_and_on_what(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(sys, "argv", ["/home/ann/bin/pertoken", "train", "--data=/home/ann/x.jsonl", "/srv/home/ann/y"])
    found = provenance(
        models={"policy": {"name": "/home/ann", "weights": "ab"}},
        seed=[0, 1],
        methods={"dpo": 1},
        data="cd",
        extra={"world": "grammar", "score": np.float32(0.5)},
    )
    assert found["models"] == {"policy": {"name": "~", "weights": "ab"}}
    assert (found["seed"], found["methods"], found["data"]) == ([0, 1], {"dpo": 1}, "cd")
    assert (found["world"], found["score"]) == ("grammar", 0.5)
    assert found["command"] == "~/bin/pertoken train --data=~/x.jsonl /srv/home/ann/y"
    assert found["versions"]["pertoken"] == __version__
    assert {"torch", "transformers", "python"} <= set(found["versions"])
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["date"].endswith("+00:00")
    assert found["git"] is None
    write_json("p.json", found)
    assert read_json("p.json") == found
    assert "models" not in provenance(seed=0) and provenance(seed=0)["seed"] == 0


def test_provenance_refuses_what_would_hide_or_break():
    with pytest.raises(ValueError, match="fills date itself"):
        provenance(extra={"date": "today"})
    with pytest.raises(ValueError, match="kl is inf"):
        provenance(extra={"kl": math.inf})


def test_git_state_of_a_repository(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert (git_state(tmp_path) or {})["dirty"] is True


def test_no_git_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_record_loads_without_torch():
    code = "import sys, pertoken.core.record as r; r.provenance(seed=1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_hash_is_of_content_in_order(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    examples, _ = load_examples(rows)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert data_hash(examples) == data_hash(load_examples(path)[0])  # wherever it was read from
    assert len({data_hash(examples), data_hash(examples[::-1]), data_hash(examples[:2]), data_hash([])}) == 4
    changed, _ = load_examples([rows[0] | {"score_chosen": 1, "score_rejected": 0}, *rows[1:]])
    assert data_hash(changed) != data_hash(examples)
    assert data_hash(rows) == data_hash([dict(reversed(r.items())) for r in rows])


def test_json_knows_numpy_paths_and_no_nan(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"x": np.arange(2), "y": np.float32(1.5), "p": Path("a/b"), "n": None, "t": (1, "é")})
    assert read_json(path) == {"x": [0, 1], "y": 1.5, "p": "a/b", "n": None, "t": [1, "é"]}
    assert "é" in path.read_text(encoding="utf-8")
    for bad, message in (
        ({"rows": [{"v": 1.0}, {"v": math.nan}]}, r"rows\[1\]\.v is nan"),
        ({"a": np.array([1.0, np.inf])}, r"a\[1\] is inf"),
        ({"a": {"b": {1, 2}}}, r"a\.b is a set"),
        ({"a": {(1, 2): 3}}, "a key of a is a tuple"),
        (math.nan, "the value is nan"),
        ({"a": object}, "a is a type"),
    ):
        with pytest.raises(ValueError, match=message):
            write_json(path, bad)
    assert read_json(path)["y"] == 1.5  # what was there stays
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_canonical_json_is_one_text_for_one_content():
    assert (
        canonical_json({"b": 1, "a": [1.0, "x"]})
        == canonical_json({"a": (1.0, "x"), "b": 1})
        == '{"a":[1.0,"x"],"b":1}'
    )


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as out:
        out.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 1})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    monkeypatch.undo()
    write_json(path, {"a": 1})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()  # readable by whoever reads results


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_reading_what_is_not_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"a": }')
    with pytest.raises(ValueError, match=r"a\.json, line 2: not JSON"):
        read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
