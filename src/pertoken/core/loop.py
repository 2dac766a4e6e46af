"""The one training loop. `fit` owns optimizer, schedule, clipping, logging, evaluation, checkpoints and exact resume;
what a step computes is the caller's (`step.ObjectiveStep` is the step of every objective on a language model).

A step leaves the *sum* of its loss in the gradients and says the count; the loop divides by the global count. So a
batch cut into any number of packs, over any number of processes, gives the same update.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .checkpoint import RESULT, checkpoints, load_checkpoint, refuse_old_run, refuse_other_run, save_checkpoint
from .data import batches
from .progress import bar, tracking
from .record import write_json


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options of a training run that no method owns."""

    lr: float = 1e-5
    """Peak learning rate."""
    batch_size: int = 16
    """Examples (pairs) an update, over all processes."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Updates; overrides epochs."""
    schedule: str = "cosine"
    """Learning-rate schedule after warm-up: cosine, linear or constant."""
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises linearly from 0."""
    optimizer: str = "adamw"
    """adamw or rmsprop."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient-norm clipping (0: off)."""
    seed: int = 0
    """Seed of the data order and of everything drawn."""
    eval_every: int = 0
    """Updates between evaluations (0: only at the end)."""
    save_every: int = 0
    """Updates between checkpoints (0: only at the end)."""
    keep: int = 2
    """Checkpoints that are kept."""
    tracker: str = "none"
    """Experiment tracker of accelerate: none, tensorboard, wandb, trackio..."""
    precision: str = "no"
    """Mixed precision of accelerate: no or bf16."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        for name, known in (("schedule", _SCHEDULES), ("optimizer", _OPTIMIZERS), ("precision", _PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if not (self.batch_size >= 1 and 0 < self.lr < math.inf and 0 <= self.epochs < math.inf and self.keep >= 1):
            raise ValueError("batch_size >= 1, lr > 0, epochs >= 0 and keep >= 1 are needed")
        for name in ("steps", "seed", "eval_every", "save_every", "weight_decay", "max_grad_norm"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} is a share of the updates, from 0 to 1")

    def trajectory(self) -> dict[str, Any]:
        """The options that change what is learned; the others may differ in a resumed run."""
        return {k: v for k, v in asdict(self).items() if k not in ("eval_every", "save_every", "keep", "tracker")}

    def total_steps(self, n: int) -> int:
        """Updates of a run over n examples."""
        return self.steps if self.steps is not None else math.ceil(self.epochs * math.ceil(n / self.batch_size))

    def learning_rate(self, step: int, total: int) -> float:
        """Learning rate of update `step` (0-based) of `total`: a pure function, so that nothing of it is saved."""
        warm = int(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * _SCHEDULES[self.schedule]((step - warm) / max(1, total - warm))


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}
_OPTIMIZERS = ("adamw", "rmsprop")
_PRECISIONS = ("no", "bf16")  # fp16 would need its loss scaled


@dataclass
class StepResult:
    """What a step found: sums and their counts, on this process; the data's rows that it computed, and which of them
    have no finite loss."""

    loss: float = 0.0
    count: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    bad_rows: tuple[int, ...] = ()

    def add(self, other: StepResult) -> None:
        """Add another part of the same batch."""
        self.loss += other.loss
        self.count += other.count
        for name, (total, count) in other.metrics.items():
            a, b = self.metrics.get(name, (0.0, 0.0))
            largest = name.endswith("/max")  # the largest of all parts, not their mean
            self.metrics[name] = (max(a, total), max(b, count)) if largest else (a + total, b + count)
        self.rows += other.rows
        self.bad_rows += other.bad_rows

    def means(self) -> dict[str, float]:
        """Loss and metrics as means (those with count 0 left out)."""
        out = {"loss": self.loss / self.count} if self.count else {}
        return out | {k: total / count for k, (total, count) in self.metrics.items() if count}


class Step(Protocol):
    """What the loop trains. An attribute ``updates_per_batch`` says that it wants the same rows for so many updates
    (rollouts that are learned from several times)."""

    size: int

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained and saved, by name."""
        ...

    def run(self, rows: list[int], *, train: bool) -> StepResult:
        """Forward, and backward of the loss's sum if `train`, over rows of the data."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data (names without prefix); empty if there are none."""
        ...


def fit(
    step: Step,
    config: LoopConfig,
    out: str | Path,
    *,
    accelerator: Any = None,
    resume: bool = False,
    meta: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train.

    Args:
        step: what is trained and how one batch of it is computed.
        config: the loop's options.
        out: folder of the run: ``log.jsonl``, checkpoints. It must be new, unless `resume`.
        accelerator: an `accelerate.Accelerator`; made if absent.
        resume: continue from the newest checkpoint in `out`; the trajectory is that of a run never stopped.
        meta: what must be the same in a resumed run (method, data hash...).
        say: called with lines for the user. progress: show a bar.

    Returns:
        One record an update: loss, grad_norm, learning_rate, metrics in TRL's names, ``eval_`` figures where evaluated.

    Raises:
        ValueError: `out` holds a run already; a resumed run that differs; a loss that is not finite (the state before
            that update is saved, and the rows are named).
    """
    out = Path(out)
    accelerator = accelerator or make_accelerator(config, out)
    main = accelerator.is_main_process
    torch.manual_seed(config.seed + accelerator.process_index)
    per_epoch, each = math.ceil(step.size / config.batch_size), getattr(step, "updates_per_batch", 1)
    total = config.total_steps(step.size) * (1 if config.steps is not None else each)
    if total and not step.size:
        raise ValueError("there is not one example to train on; give data")
    same = {"config": config.trajectory(), **(meta or {})}
    optimizer = make_optimizer(step.modules, config)
    history: list[dict[str, float]] = []
    done = _begin(step, optimizer, out, same, resume, history, say if say and main else lambda line: None)
    accelerator.wait_for_everyone()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        _rewrite_log(out, history)
    order: list[list[int]] = []
    with tracking(accelerator, config.tracker, same) as track, bar(total, done, progress and main) as tick:
        while done < total:
            started = time.perf_counter()
            epoch, place = divmod(done // each, per_epoch)
            if not order or (place == 0 and done % each == 0):
                order = batches(step.size, config.batch_size, seed=config.seed, epoch=epoch)
            rows = order[place]
            optimizer.zero_grad(set_to_none=True)
            local = step.run(rows[accelerator.process_index :: accelerator.num_processes], train=True)
            result = _all_processes(local, accelerator)
            rate, mean, norm = config.learning_rate(done, total), result.loss / (result.count or 1.0), math.nan
            if math.isfinite(mean):
                norm = apply_gradients(optimizer, accelerator, result.count, rate, config.max_grad_norm)
            if not math.isfinite(norm):
                save_checkpoint(out / "stopped", done, step.modules, optimizer, same, write=main)
                accelerator.wait_for_everyone()  # a process that fails has the launcher end those that still write
                named = ", ".join(map(str, sorted(set(result.bad_rows or result.rows))[:16]))
                what = "gradient norm" if math.isfinite(mean) else "loss"
                raise ValueError(
                    f"the {what} is {norm if math.isfinite(mean) else mean} at update {done} (rows {named}); "
                    f"the state before it is in {out / 'stopped'}. Look at those rows, or lower lr"
                )
            done += 1
            record = {"step": done, "loss": mean, **result.means(), "grad_norm": norm, "learning_rate": rate}
            record["seconds"] = time.perf_counter() - started
            if done == total or (config.eval_every and done % config.eval_every == 0):
                record |= {f"eval_{k}": v for k, v in step.evaluate().items()}
            history.append(record)
            if main:
                with (out / "log.jsonl").open("a", encoding="utf8") as log:
                    log.write(json.dumps(record) + "\n")
            track(record)
            tick(record)
            # between two batches only: what a step keeps of the batch that it is in is not saved
            due = (
                config.save_every
                and done % each == 0
                and done // config.save_every > (done - each) // config.save_every
            )
            if done == total or due:
                save_checkpoint(out, done, step.modules, optimizer, same, keep=config.keep, write=main)
                accelerator.wait_for_everyone()
    return history


def apply_gradients(
    optimizer: torch.optim.Optimizer, accelerator: Any, count: float, rate: float, max_norm: float
) -> float:
    """Make gradients of a sum over `count` those of the mean, clip them (0: not), update; their norm before clipping.
    If it is not finite, or nothing was counted, nothing is updated."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scale = accelerator.num_processes / count if count else 0.0  # wrappers have averaged them over processes
    norm = scale * _norm(grads)
    if math.isfinite(norm) and count:
        scale *= min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        for grad in grads:
            grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        optimizer.step()
    return norm


def _norm(grads: list[torch.Tensor]) -> float:
    """Joint norm of gradients, some of which may be sharded."""
    sharded, whole = [], []
    for grad in grads:
        (sharded if hasattr(grad, "full_tensor") else whole).append(grad)
    norms: list[Any] = [torch.nn.utils.get_total_norm(some) for some in (sharded, whole) if some]
    return math.hypot(*(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for norm in norms))


def make_accelerator(config: LoopConfig, out: Path) -> Any:
    """The accelerator of a run; placement, batches and accumulation are ours.

    Raises:
        ValueError: a way of distributing that cannot work, or a tracker that is unknown or not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(out),
        # a launcher's setting must not divide our sums
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # processes may compute different numbers of packs, so no forward may wait for the others; buffers are constants
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > accelerator.num_processes:
        raise ValueError(f"{launched} processes that do not know each other; without GPUs, set ACCELERATE_USE_CPU=true")
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TPU", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(f"training under {kind} is not supported; launch with configs/ddp.yaml or configs/fsdp2.yaml")
    if config.tracker != "none" and not accelerator.log_with:
        raise ValueError(f"the tracker {config.tracker} is not installed: pip install 'pertoken[trackers]' or itself")
    return accelerator


def make_optimizer(modules: Mapping[str, nn.Module], config: LoopConfig) -> torch.optim.Optimizer:
    """One parameter group a module; a module with an attribute ``lr_factor`` learns at that multiple of the rate, one
    with ``parameter_groups()`` says its own (lists of parameters, with ``lr_factor`` and ``weight_decay``)."""
    groups: list[dict[str, Any]] = []
    for module in modules.values():
        if hasattr(module, "parameter_groups"):
            groups += module.parameter_groups()  # type: ignore[operator]
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained:
            groups.append({"params": trained, "lr_factor": float(getattr(module, "lr_factor", 1.0))})
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _begin(
    step: Step,
    optimizer: torch.optim.Optimizer,
    out: Path,
    same: Mapping[str, Any],
    resume: bool,
    history: list[dict[str, float]],
    say: Callable[[str], None],
) -> int:
    """Load the newest checkpoint, if there is one; how many updates are done."""
    found = checkpoints(out)
    if not resume and (found or any((out / name).exists() for name in ("log.jsonl", RESULT))):
        refuse_old_run(out, resume)
    if not found:
        return 0
    last, path = found[-1]
    refuse_other_run(path, same)
    load_checkpoint(path, step.modules, optimizer)
    log = out / "log.jsonl"
    if log.exists():
        records = [json.loads(line) for line in log.read_text("utf8").splitlines() if line.endswith("}")]
        history.extend(r for r in records if r["step"] <= last)
    say(f"resumed {out} after update {last}")
    return last


def _rewrite_log(out: Path, history: list[dict[str, float]]) -> None:
    """The log of the updates that count: what came after the checkpoint is made again."""
    part = out / "log.jsonl.part"
    part.write_text("".join(json.dumps(record) + "\n" for record in history), "utf8")
    part.replace(out / "log.jsonl")


def _all_processes(local: StepResult, accelerator: Any) -> StepResult:
    if accelerator.num_processes == 1:
        return local
    from accelerate.utils import gather_object

    joined = StepResult()
    for part in gather_object([local]):
        joined.add(part)
    return joined


__all__ = ["RESULT", "LoopConfig", "Step", "StepResult", "fit", "make_accelerator", "refuse_old_run", "write_json"]
