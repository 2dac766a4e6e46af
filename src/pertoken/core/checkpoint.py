"""Checkpoints: whole or absent, and readable without pickle.

A checkpoint is a folder of safetensors and JSON, written beside its place and renamed when all of it is on disk. A full
disk or a kill in the middle leaves the last good one as it was. What a folder holds already is refused here, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .record import read_json, write_json

RESULT = "results.json"
STATE = "state.safetensors"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(int(m.group(1)), p) for p in Path(folder).glob("checkpoint-*") if (m := _NAME.match(p.name))]
    return sorted(found)


def refuse_old_run(out: Path, resume: bool) -> None:
    """An output folder is new, or a run to be resumed.

    Raises:
        ValueError: it holds a run and `resume` is off, or something that is no run.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    finished, steps = (out / RESULT).exists(), [s for s, _ in checkpoints(out)]
    if not resume:
        what = "a finished run" if finished else f"a run stopped at update {steps[-1]}" if steps else "files"
        raise ValueError(
            f"{out} holds {what}; nothing is overwritten: choose another folder, or continue it with --resume"
        )
    if not (finished or steps or any((out / name).exists() for name in ("log.jsonl", "stages"))):
        raise ValueError(f"{out} holds files, but no run to resume; choose another folder")


def refuse_other_run(path: Path, same: Mapping[str, Any]) -> None:
    """What a checkpoint's run was made with must be what it is resumed with.

    Raises:
        ValueError: it is not; names the options that differ.
    """
    was, now = read_json(path / "state.json"), json.loads(json.dumps(dict(same)))
    odd: list[str] = []
    for key, value in now.items():
        old = was.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            odd += [f"{key}.{k}" for k in value | old if value.get(k) != old.get(k) or (k in value) != (k in old)]
        elif value != old:
            odd.append(key)
    if odd:
        raise ValueError(
            f"{path.parent} was run with other {', '.join(odd)}; resume with the same, or choose a new folder"
        )


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    write: bool = True,
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
    kept = _kept(modules)
    names = {tensor: name for name, tensor in kept.items()}
    weights = {name: whole(tensor, write) for name, tensor in kept.items()}
    state = {
        f"{names[p]}|{key}": whole(torch.as_tensor(value), write)
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    state |= {f"rng|{device}|{i}": drawn for i, one in enumerate(_rng_states()) for device, drawn in one.items()}
    target = Path(folder) / f"checkpoint-{step:06d}"
    if not write:
        return target
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file(weights, part / "weights.safetensors")
        save_file(state, part / "optimizer.safetensors")
        write_json(part / "state.json", {"step": step, **meta})
        for path in (*part.iterdir(), part):  # the rename must not reach the disk before what it names
            opened = os.open(path, os.O_RDONLY)
            os.fsync(opened)
            os.close(opened)
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
    weights, kept = load_file(path / "weights.safetensors"), _kept(modules)
    odd = sorted(weights.keys() ^ kept.keys()) or [n for n, t in kept.items() if t.shape != weights[n].shape]
    if odd:
        raise ValueError(
            f"{path} holds other parameters ({odd[0]}...); resume with the model and options it was made with"
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(_like(weights[name], tensor))
    if optimizer is not None:
        state = load_file(path / "optimizer.safetensors")
        rank = dist.get_rank() if _several() else 0
        drawn = {name: state.pop(name) for name in [n for n in state if n.startswith("rng|")]}
        if f"rng|cpu|{rank}" in drawn:
            torch.set_rng_state(drawn[f"rng|cpu|{rank}"])
        if f"rng|cuda|{rank}" in drawn and torch.cuda.is_available():
            torch.cuda.set_rng_state(drawn[f"rng|cuda|{rank}"])
        fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
        for joint, value in state.items():
            name, _, key = joint.partition("|")
            if key == "step":  # a number, which only fused kernels want beside the parameter
                optimizer.state[kept[name]][key] = value.to(kept[name].device) if kept[name] in fused else value
            else:
                optimizer.state[kept[name]][key] = _like(value, kept[name])
    return read_json(path / "state.json")


def save_state(module: nn.Module | None, folder: Path) -> None:
    """Write what an objective learnt in a module of its own beside the model; nothing, if there is no such thing."""
    tensors = _kept({"state": module}) if module is not None else {}
    if tensors:
        save_file({name: whole(t) for name, t in tensors.items()}, Path(folder) / STATE)


def saved_state(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a run knew of its objective's own module.

    Args:
        folder: of a finished run, of one that was stopped (its newest checkpoint is read), or one of its checkpoints.

    Returns:
        What the run was made with (``method``, ``options``, and its ``reference``'s identity), and the module's tensors
        by name.

    Raises:
        ValueError: no run is there, or its objective had no module.
    """
    folder = Path(folder)
    if (folder / RESULT).exists() and (folder / STATE).exists():
        record, tensors = read_json(folder / RESULT), load_file(folder / STATE)
        models = dict(record["provenance"]["models"])
        made = {"method": record["method"], "options": record["options"], "reference": models["reference"]}
    else:
        found = checkpoints(folder)
        path = found[-1][1] if found else folder
        if not (path / "weights.safetensors").exists():
            raise ValueError(f"{folder} holds no trained run; name the folder that a run was written to")
        tensors, record = load_file(path / "weights.safetensors"), read_json(path / "state.json")
        made = {key: record.get(key) or {} for key in ("method", "options", "reference")}
    own = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    if not own:
        raise ValueError(f"the run in {folder} (method {made['method']}) learnt nothing beside the model")
    return made, own


def _kept(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What a checkpoint keeps, by name: trainable parameters, and buffers (the policy's are constants)."""
    parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    buffers = {f"{m}.{n}": b for m, module in modules.items() if m != "policy" for n, b in module.named_buffers()}
    return {name: p for name, p in parameters.items() if p.requires_grad} | buffers


def _rng_states() -> list[dict[str, Tensor]]:
    """Random states of every process, in order: each draws its own."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if not _several():
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def whole(tensor: Tensor, write: bool = True) -> Tensor:
    """A tensor on the CPU, gathered if it is sharded, with memory of its own (safetensors shares none).

    A process that does not `write` takes part in gathering and keeps nothing.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()  # type: ignore[operator]
    return tensor.detach().to("cpu", copy=True).contiguous() if write else torch.empty(0)


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, put where and how `tensor` lies (device; shards of a mesh)."""
    value = value.to(tensor.device)
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return value
