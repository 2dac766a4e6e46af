"""Where there is no accelerator, every method is compared on a pretended one, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"),
]
REFUSED = """
import torch, tests.pretend
a = torch.arange(6.0).view(2, 3).to("pretend")
assert (a * 2.0 + torch.tensor(1.0)).sum().item() == 36.0 and a[torch.tensor([1])].cpu().tolist() == [[3.0, 4.0, 5.0]]
layer = torch.nn.Linear(3, 1).to("pretend")
layer(a).sum().backward()
assert layer.weight.grad.device.type == "pretend" and layer.weight.grad.tolist() == [[3.0, 5.0, 7.0]]
here, there = torch.tensor([0]), torch.tensor([0], device="pretend")
refused = {
    "sum": lambda: a + torch.ones(3),
    "cat": lambda: torch.cat([a, torch.ones(1, 3)]),
    "select": lambda: a.index_select(0, here),
    "index": lambda: torch.ones(3)[there],
    "numpy": lambda: a.numpy(),
}
for name, wrong in refused.items():
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError(name)
"""


def python(*words: str) -> subprocess.CompletedProcess:
    """Run it here, as if by hand."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    told |= {"PERTOKEN_TEST_DEVICE": "pretend", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=told, capture_output=True, text=True, timeout=500)


def test_what_cuda_refuses_is_refused():
    done = python("-c", REFUSED)
    assert done.returncode == 0, done.stderr[-3000:]


def test_methods_on_a_pretended_device():
    files = "tests/contracts/test_devices.py tests/contracts/test_devices_beside.py"
    done = python(*f"-m pytest -p tests.pretend {files} -q -x -p no:cacheprovider".split())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
