"""Two processes under `accelerate launch` train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from pertoken.core.checkpoint import checkpoints
from pertoken.core.lm import load
from tests.core import processes
from tests.core.training import FIRST_ROW, assert_close, largest_difference, log

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.core import processes
processes.{call}(Path(sys.argv[1]))
"""


def launch(tmp_path: Path, call: str, *flags: str) -> Path:
    """Run a function of `processes` in two gloo processes; the folder it filled."""
    script, out = tmp_path / "script.py", tmp_path / "two"
    script.write_text(SCRIPT.format(call=call))
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # With --cpu, accelerate starts one process whatever --num_processes says (more want MPI), so the machine is told
    # to be without GPUs by the environment.
    command = f"-m accelerate.commands.launch --num_processes 2 --main_process_port {port}"
    settings = {
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = [sys.executable, *command.split(), *flags, str(script), str(out)]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=os.environ | settings, **told) as running:
        try:
            output, _ = running.communicate(timeout=300)
        except BaseException:  # processes that wait for each other; killed, the launcher would leave them
            running.terminate()
            running.wait(30)
            raise
    assert running.returncode == 0, output[-6000:]
    return out


def kept(folder: Path) -> tuple[list[dict[str, float]], dict]:
    return json.loads((folder / "history.json").read_text()), load_file(folder / "weights.safetensors")


def assert_same(one: Path, two: Path, tolerance: float = 1e-6) -> None:
    (a, x), (b, y) = kept(one), kept(two)
    assert len(a) > 1 and a[0] != a[-1]
    assert_close(a, b, tolerance)
    assert largest_difference(x, y) < tolerance


def test_two_processes_train_as_one(tmp_path):
    """One launch, and every check of what it left: starting Python twice is what takes the time."""
    one = tmp_path / "one"
    one.mkdir()
    processes.run_all(one)
    two = launch(tmp_path, "run_all", "--config_file", str(ROOT / "configs" / "ddp.yaml"))
    for name in ("dpo", "coupled", "drawing", "state", "shared", "tracked"):
        assert_same(one / f"{name}-kept", two / f"{name}-kept")
        assert log(two / name) == kept(two / f"{name}-kept")[0], "a record is missing, or there twice"
    assert_same(one / "rollouts-kept", two / "rollouts-kept")
    coefficients = [float((folder / "rollouts-coef.txt").read_text()) for folder in (one, two)]
    assert coefficients[0] == pytest.approx(coefficients[1]) != 0.5
    assert_same(one / "buffers-kept", two / "buffers-kept", 1e-4)  # its norms compute in float32
    check_random_states(one, two)
    check_files(one, two)
    check_stop(one, two)
    check_run(one, two)


def check_random_states(one: Path, two: Path) -> None:
    """Each process draws on where it stopped."""
    for folder in (one, two):
        a, b = (kept(folder / f"{name}-kept") for name in ("noisy", "noisy-interrupted"))
        assert a[0] == b[0] and largest_difference(a[1], b[1]) == 0
    assert kept(one / "noisy-kept")[0] != kept(two / "noisy-kept")[0]


def check_files(one: Path, two: Path) -> None:
    """The main process alone writes, and all of it."""
    for folder in (one, two):
        files = sorted(str(p.relative_to(folder)) for p in (folder / "dpo").rglob("*"))
        names = ("optimizer.safetensors", "state.json", "weights.safetensors")
        steps = [f"dpo/checkpoint-{s:06d}" for s in (4, 6)]
        assert files == sorted(["dpo/log.jsonl", *steps, *(f"{s}/{n}" for s in steps for n in names)])
    a, b = (load_file(checkpoints(folder / "dpo")[-1][1] / "optimizer.safetensors") for folder in (one, two))
    assert {k for k in b if k.startswith("rng|cpu")} == {"rng|cpu|0", "rng|cpu|1"}
    moments = [k for k in a if not k.startswith("rng|")]
    assert moments and largest_difference({k: a[k] for k in moments}, {k: b[k] for k in moments}) < 1e-6


def check_stop(one: Path, two: Path) -> None:
    """A loss that is not finite on one process stops both, with the same words."""
    (single,) = one.glob("stopped-*.txt")
    told = [(two / f"stopped-{i}.txt").read_text() for i in range(2)]
    assert told[0] == told[1] and f"(rows {FIRST_ROW + 5});" in told[0]
    assert told[0].replace(str(two), "") == single.read_text().replace(str(one), "")
    assert len(checkpoints(two / "stopped" / "stopped")) == 1


def check_run(one: Path, two: Path) -> None:
    """A reference that was given, a helper model, the saved model, the record."""
    assert_close(log(one / "run"), log(two / "run"), 1e-6)
    a, b = (json.loads((folder / "run" / "results.json").read_text()) for folder in (one, two))
    assert a["updates"] == b["updates"] == 6 and a["provenance"]["models"] == b["provenance"]["models"]
    for record in (a, b):
        assert [(s["stage"], s["reused"]) for s in record["stages"]] == [("sft-model", False)]
    for pattern in ("run/model", "run/stages/sft-model-*/model"):
        files = [next(folder.glob(f"{pattern}/model.safetensors")) for folder in (one, two)]
        assert largest_difference(*map(load_file, files)) < 1e-6
    assert not [p for p in two.rglob("*.part")], "rests of a process that came second"


@pytest.mark.slow
def test_sharded_processes_train_as_one(tmp_path):
    """FSDP2 with the shipped configuration, on CPU and gloo."""
    one = tmp_path / "one"
    one.mkdir()
    processes.run_sharded(one)
    two = launch(tmp_path, "run_sharded", "--config_file", str(ROOT / "configs" / "fsdp2.yaml"))
    for name in ("dpo", "coupled", "state", "interrupted"):
        assert_same(one / f"{name}-kept", two / f"{name}-kept")
        a, b = (load_file(checkpoints(f / name)[-1][1] / "weights.safetensors") for f in (one, two))
        trained = kept(one / f"{name}-kept")[1].keys()  # not what each process counts for itself
        assert largest_difference(*({k: saved[k] for k in trained} for saved in (a, b))) < 1e-6
    assert_close(log(one / "run"), log(two / "run"), 1e-6)
    for name in ("run", next((two / "run" / "stages").glob("sft-model-*")).relative_to(two)):
        a, b = (load_file(f / name / "model" / "model.safetensors") for f in (one, two))
        assert largest_difference(a, b) < 1e-6
    assert load(two / "run" / "model", dtype="float64", device="cpu").model.config.vocab_size == 320


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_shipped_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "configs" / f"{name}.yaml"
    loaded: Any = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    said = yaml.safe_load(path.read_text())
    assert str(said["distributed_type"]) == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    if name == "fsdp2":
        assert said["fsdp_config"]["fsdp_version"] == 2
