"""Stages are made once, whole or not at all; ragged arrays come back as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pertoken import __version__
from pertoken.core.record import read_json
from pertoken.core.stages import Stages, load_ragged, save_ragged


def writer(text: str, calls: list[str] | None = None):
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "out.txt").write_text(text)

    return make


def test_a_stage_is_made_once_and_again_for_other_inputs(tmp_path):
    said, calls = [], []
    stages = Stages(tmp_path / "stages", report=said.append)
    first = stages.run("logps", {"seed": 0, "model": "m"}, writer("a", calls))
    assert (first / "out.txt").read_text() == "a"
    assert stages.run("logps", {"model": "m", "seed": 0}, writer("b", calls)) == first
    resumed = Stages(tmp_path / "stages")
    assert resumed.run("logps", {"seed": 0, "model": "m"}, writer("c", calls)) == first
    other = resumed.run("logps", {"seed": 1, "model": "m"}, writer("d", calls))
    assert other != first and calls == ["a", "d"]
    assert resumed.run("other", {"seed": 0, "model": "m"}, writer("e")) != first

    about = read_json(first / "stage.json")
    assert first.name == f"logps-{about['hash']}"
    assert (about["stage"], about["inputs"], about["version"]) == ("logps", {"seed": 0, "model": "m"}, __version__)
    assert about["seconds"] >= 0
    assert [r["reused"] for r in stages.records] == [False, True]
    assert stages.records[1]["seconds"] == about["seconds"]
    assert len(said) == 3 and said[1].startswith("logps: made in") and "already made" in said[2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stage_that_fails_leaves_nothing(tmp_path, error):
    def breaks(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise error("midway")

    stages = Stages(tmp_path)
    with pytest.raises(error, match="midway"):
        stages.run("a", {"x": 1}, breaks)
    assert list(tmp_path.iterdir()) == [] and stages.records == []
    assert (stages.run("a", {"x": 1}, writer("whole")) / "out.txt").read_text() == "whole"


def test_a_killed_stage_is_made_again_and_its_rest_removed(tmp_path):
    code = (
        "import os, sys, pathlib; from pertoken.core.stages import Stages\n"
        "def make(folder):\n    (folder / 'half.txt').write_text('half'); os._exit(9)\n"
        "Stages(sys.argv[1]).run('a', {'x': 1}, make)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    (rest,) = tmp_path.iterdir()
    assert rest.name.endswith(".part")
    # of a live process (this one): left alone
    live = tmp_path / rest.name.replace(f".{rest.name.split('.')[-3]}.", f".{os.getpid()}.")
    live.mkdir()
    artefact = Stages(tmp_path).run("a", {"x": 1}, writer("whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([live.name, artefact.name])


def test_half_a_copy_under_the_final_name_is_replaced(tmp_path):
    stages = Stages(tmp_path)
    artefact = stages.run("a", {}, writer("1"))
    (artefact / "stage.json").unlink()
    assert stages.run("a", {}, writer("2")) == artefact
    assert (artefact / "out.txt").read_text() == "2"


def test_two_makers_of_one_stage_agree(tmp_path):
    both_in = threading.Barrier(2)

    def make(folder: Path) -> None:
        both_in.wait(30)
        writer("same")(folder)

    stages = [Stages(tmp_path), Stages(tmp_path)]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda s=s: found.append(s.run("a", {}, make))) for s in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and found[0] == found[1]
    assert [p.name for p in tmp_path.iterdir()] == [found[0].name]
    assert sorted(s.records[0]["reused"] for s in stages) == [False, True]


def test_what_is_no_stage_is_refused(tmp_path):
    stages = Stages(tmp_path)
    for name in ("", "../up", ".hidden", "a/b", "a b"):
        with pytest.raises(ValueError, match="stage name"):
            stages.run(name, {}, writer("x"))
    with pytest.raises(ValueError, match="beta is nan"):
        stages.run("a", {"beta": float("nan")}, writer("x"))
    with pytest.raises(ValueError, match="model is a object"):
        stages.run("a", {"model": object()}, writer("x"))
    with pytest.raises(ValueError, match=r"wrote a stage\.json of its own"):
        stages.run("a", {}, lambda folder: (folder / "stage.json").touch())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
def test_ragged_arrays_come_back(tmp_path, dtype):
    arrays = [np.ones(3, dtype), np.zeros(0, dtype), np.ones(1, dtype), np.zeros(0, dtype)]
    found = load_ragged(save_ragged(tmp_path / "deep" / "a.npz", arrays))
    assert [a.tolist() for a in found] == [a.tolist() for a in arrays]
    assert {a.dtype for a in found} == {np.dtype(dtype)}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.npz"]
    assert load_ragged(save_ragged(tmp_path / "none.npz", [])) == []


def test_ragged_arrays_refuse_the_rest(tmp_path):
    path = tmp_path / "a.npz"
    for arrays, message in (
        ([np.ones((2, 2))], r"array 0 has shape \(2, 2\)"),
        ([np.ones(2), np.array(["x"])], "array 1 has shape"),
        ([np.array([None])], "dtype object"),
        ([np.ones(2), np.ones(2, np.float32)], "array 1 is float32, the first is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            save_ragged(path, arrays)
    with pytest.raises(ValueError, match="give the file that ending"):
        save_ragged(tmp_path / "a.npy", [])
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        load_ragged(path)
    path.write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"a\.npz does not hold ragged arrays"):
        load_ragged(path)
    np.savez(path, values=np.ones(3), lengths=np.array([1]))
    with pytest.raises(ValueError, match="3 values for lengths that add up to 1"):
        load_ragged(path)
    np.savez(path, values=np.array([{}]), lengths=np.array([1]))  # a pickle inside is never opened
    with pytest.raises(ValueError, match="does not hold ragged arrays"):
        load_ragged(path)
