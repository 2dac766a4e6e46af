"""Training of the arms of `word_pooled.measure` on the same windows of words, and what a step of it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .word_pooled.measure import Arm


def train(
    arm: Any,
    words: Sequence[bytes],
    *,
    window: int,
    batch: int,
    lr: float,
    seed: int,
    seconds: float | None = None,
    steps: int | None = None,
) -> int:
    """AdamW on random windows of words; warm-up of 5 %, then cosine. Returns the number of steps.

    Args:
        seconds: how long (of the process, a thread, on a CPU: others may be running); or `steps`: how many.

    Raises:
        ValueError: both of them, or neither.
    """
    if (seconds is None) == (steps is None):
        raise ValueError("say for how long to train: either seconds or steps")
    device = next(arm.model.parameters()).device
    on_cpu = device.type == "cpu"
    clock = (lambda: time.process_time() / torch.get_num_threads()) if on_cpu else time.perf_counter
    optimizer = torch.optim.AdamW(arm.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    arm.model.train()
    begun, taken, drawn = clock(), 0, _windows(arm, words, window, batch, seed)
    share = lambda: taken / steps if steps is not None else (clock() - begun) / (seconds or 1.0)
    while (done := share()) < 1:
        optimizer.param_groups[0]["lr"] = lr * min((done + 1e-3) / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast(device.type, torch.bfloat16, enabled=not on_cpu):
            loss = arm.model.loss(next(drawn).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(arm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        if seconds is not None and not on_cpu:
            torch.cuda.synchronize()
    arm.model.eval()
    return taken


def _windows(arm: Arm, words: Sequence[bytes], window: int, batch: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(words) - window + 1, size=batch).tolist()
        yield arm.batch([words[s : s + window] for s in starts])


def step_seconds(arms: Mapping[str, Any], words: Sequence[bytes], *, window: int, batch: int, seed: int) -> dict:
    """Seconds of a training step of each arm: the median of nine runs of ten steps, arm after arm in turn. The models
    are changed: train fresh ones."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(10):
        for name, arm in arms.items():
            begun = time.perf_counter()
            train(arm, words, steps=10, window=window, batch=batch, lr=1e-4, seed=seed)
            if next(arm.model.parameters()).device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first makes kernels ready
                found[name].append((time.perf_counter() - begun) / 10)
    return {name: float(np.median(some)) for name, some in found.items()}


@torch.no_grad()
def forward_flops(arm: Any, words: Sequence[bytes], *, window: int, batch: int, seed: int, batches: int = 8) -> float:
    """Floating-point operations of the forward pass of a training step: matrix products and attention, in the mean
    over some batches. Attention counts whole, whatever its mask leaves out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device = next(arm.model.parameters()).device
    drawn = _windows(arm, words, window, batch, seed)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as matrix products, on any device
        for _ in range(batches):
            arm.model.loss(next(drawn).to(device))
    return counter.get_total_flops() / batches
