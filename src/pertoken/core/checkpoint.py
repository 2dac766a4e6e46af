"""Checkpoints: whole or absent, and readable without pickle.

A checkpoint is a folder of safetensors and JSON, written beside its place and renamed when all of it is on disk. A full
disk or a kill in the middle leaves the last good one as it was.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .record import read_json, write_json

_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(int(m.group(1)), p) for p in Path(folder).glob("checkpoint-*") if (m := _NAME.match(p.name))]
    return sorted(found)


def save_checkpoint(
    folder: Path, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, meta: Mapping[str, Any],
    *, keep: int = 2, write: bool = True,
) -> Path:
    """Write ``checkpoint-<step>`` and drop all but the newest `keep`.

    Args:
        folder: the run's folder.
        step: updates made so far.
        modules: by name (policy, objective state...); their trainable parameters and buffers are kept.
        optimizer: its state goes under the parameters' names.
        meta: JSON values: what a resumed run checks and continues from.
        keep: checkpoints that stay.
        write: False on all but the main process: sharded tensors are gathered, nothing is written.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    names = {p: f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}
    tensors = {name: _whole(p) for p, name in names.items()}
    buffers = {f"{m}.{n}": _whole(b) for m, module in modules.items() if m != "policy" for n, b in module.named_buffers()}
    state = {
        f"{names[p]}|{key}": _whole(torch.as_tensor(value))
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    state["rng|cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["rng|cuda"] = torch.cuda.get_rng_state()
    target = Path(folder) / f"checkpoint-{step:06d}"
    if not write:
        return target
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file(tensors | buffers, part / "weights.safetensors")
        save_file(state, part / "optimizer.safetensors")
        write_json(part / "state.json", {"step": step, **meta})
        for file in part.iterdir():  # the rename must not reach the disk before what it names
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for _, old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Put a checkpoint back into modules and optimizer; returns its meta.

    Raises:
        ValueError: its tensors are not those of these modules.
    """
    weights = load_file(path / "weights.safetensors")
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}
    buffers = {f"{m}.{n}": b for m, module in modules.items() if m != "policy" for n, b in module.named_buffers()}
    if weights.keys() != (named | buffers).keys():
        odd = sorted(weights.keys() ^ (named | buffers).keys())
        raise ValueError(f"{path} holds other parameters ({odd[0]}...); resume with the model and options it was made with")
    with torch.no_grad():
        for name, tensor in (named | buffers).items():
            tensor.copy_(_like(weights[name], tensor))
    if optimizer is not None:
        state = load_file(path / "optimizer.safetensors")
        torch.set_rng_state(state.pop("rng|cpu"))
        cuda = state.pop("rng|cuda", None)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
        for joint, value in state.items():
            name, _, key = joint.partition("|")
            parameter = named[name]
            like = value.ndim and value.shape == parameter.shape
            optimizer.state[parameter][key] = _like(value, parameter) if like else value
    return read_json(path / "state.json")


def _whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if it is sharded, with memory of its own (safetensors shares none)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()  # type: ignore[operator]
    return tensor.detach().cpu().clone().contiguous()


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, put where and how `tensor` lies (device; shards of a mesh)."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return value.to(tensor.device)
