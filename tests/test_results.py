"""A measured figure names its commit, or is not written."""

import json
import shutil
import subprocess

import pytest

from pertoken import results

FIGURE = {
    "metric": "m", "value": 1.0, "interval": (0.5, 1.5), "baseline": "dpo", "baseline_value": 2.0, "bound": "",
    "reached": None, "world": "w", "seeds": (1,),
}  # fmt: skip


@pytest.fixture()
def repository(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "src").mkdir()
    source = tmp_path / "src" / "results.py"
    shutil.copy(results.__file__, source)
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    monkeypatch.setattr(results, "__file__", str(source))
    return tmp_path


def test_figures_are_written_with_their_commit(repository):
    folder = repository / "results"
    path = results.save_result("a", **FIGURE, folder=folder)
    record = json.loads(path.read_text())
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(record["commit"]) and record["interval"] == [0.5, 1.5]
    results.save_result("b", **FIGURE, folder=folder)  # the first result makes no code dirty


def test_changed_code_is_refused(repository):
    (repository / "src" / "results.py").write_text("")
    with pytest.raises(ValueError, match="commit your changes"):
        results.save_result("a", **FIGURE, folder=repository / "results")


def test_a_gpu_is_named_if_it_was_used(repository, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    for used, world in ((False, "w"), (True, "w; GPU X")):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        path = results.save_result("a", **FIGURE, folder=repository / "results")
        assert json.loads(path.read_text())["world"] == world
