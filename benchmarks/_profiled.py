"""What preference_step.py found: two sides, step by step; what one step holds in memory, and where its time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _trl import Step
from torch.profiler import ProfilerActivity, profile

WARM = 1  # steps before the timed ones; one after them is profiled


def machine(device: str, threads: int) -> str:
    """For a result's world."""
    return f"{device}, {threads} threads" if device == "cpu" else device


class Profiled:
    """The profile of one step, once it has run inside.

    Attributes:
        peak: the most bytes that the allocator held at one time, less those held before and those of all gradients
            (which are made, and freed or kept, inside).
        parts: seconds by component (CPU only).
    """

    PARTS = (
        "layers: matrix products",
        "layers: attention",
        "layers: the rest",
        "LM head and embedding",
        "clipping and optimizer",
    )

    def __init__(self, gradients: int, device: str):
        self.gradients, self.device = gradients, device
        self.peak, self.parts = 0, dict.fromkeys(self.PARTS, 0.0)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            self.peak = torch.cuda.max_memory_allocated() - before - self.gradients
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiled:
            yield
        events = profiled.profiler.kineto_results.events()
        held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"])
        self.peak = int(held.max()) - self.gradients  # they are made and freed inside the step
        events = profiled.events()
        done = max(e.time_range.end for e in events if e.name.startswith("autograd::engine"))
        for event in events:
            self.parts[self._part(event, done)] += event.self_cpu_time_total / 1e6

    def _part(self, event: Any, backward_done: float) -> str:
        sizes = [size for shape in event.input_shapes or [] if isinstance(shape, list) for size in shape]
        if event.time_range.start > backward_done:
            return "clipping and optimizer"
        if any(isinstance(size, int) and size >= 16384 for size in sizes):
            return "LM head and embedding"
        if "attention" in event.name:
            return "layers: attention"
        return (
            "layers: matrix products" if event.name in ("aten::mm", "aten::addmm", "aten::bmm") else "layers: the rest"
        )


@dataclass
class Race:
    """Steps of both sides on the same batches, the last one profiled."""

    trl: list[Step]
    ours: list[Step]
    held: tuple[Profiled, Profiled]
    count: dict[str, int]

    @property
    def ratios(self) -> np.ndarray:
        """Seconds of TRL over ours, of the timed steps."""
        return np.array([a.seconds / b.seconds for a, b in zip(self.trl, self.ours)])[WARM:-1]

    def gap(self, name: str) -> float:
        """The largest difference between both sides, over all steps; of norms, relative."""
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(self.trl, self.ours)]
        return max(abs(a - b) / (a if name == "norm" else 1.0) for a, b in pairs)
