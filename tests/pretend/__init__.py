"""Importing this makes the device ``pretend`` (see device.cpp); as a pytest plugin: ``pytest -p tests.pretend``.

It is compiled once (half a minute), into .cache/pretend, with the C++ compiler and ninja that torch's extensions need.
A build that was killed leaves a file `lock` there, for which the next one waits: remove it.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend
from torch.utils.cpp_extension import load


def _start() -> None:
    folder = Path(__file__).parents[2] / ".cache" / "pretend"  # of this checkout alone
    folder.mkdir(parents=True, exist_ok=True)
    built: Any = load("pertoken_pretend", [str(Path(__file__).parent / "device.cpp")], build_directory=str(folder))
    rename_privateuse1_backend("pretend")
    built.start()
    module: Any = ModuleType("torch.pretend")  # what torch asks a device's module for
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.synchronize = module.empty_cache = module.manual_seed_all = lambda *_: None
    module.get_rng_state, module.set_rng_state = lambda *_: torch.zeros(8, dtype=torch.uint8), lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("pretend", module)
    generate_methods_for_privateuse1_backend()


_start()
