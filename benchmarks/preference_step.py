"""Optimiser steps of DPO on SmolLM2-135M: pertoken against TRL's `DPOTrainer`, in one process, step by step in turn.

Both train a copy of the same weights on the same pairs in the same order, from the same token ids and the same reference
log-probs (computed once, before), with AdamW (fused, no weight decay), clipping at norm 1 and a constant learning rate.
TRL's own loop runs (`trainer.train()`), with no other change than that it is handed ids instead of text; between two of
its steps a callback runs one of ours, so that both meet the same state of the machine. A pilot tries TRL's settings on one
batch each (whole batch or pair by pair with accumulation, gradient checkpointing on or off), and the fastest races.

Memory: the most that was allocated at any moment of a step, as torch's allocator counts it (profiler), less weights,
gradients and optimizer state; measured in a step of its own that is not timed, which also gives the time by component.

    python benchmarks/preference_step.py               12 timed steps of 4 pairs (HH when PERTOKEN_DATA is set)
    python benchmarks/preference_step.py --quick       3 steps, no pilot: does it run?
    python benchmarks/preference_step.py --curve       prompt : response lengths 256:64, 64:64, 32:128
    python benchmarks/preference_step.py --device cuda --dtype bfloat16     (written for it; measured on CPU alone so far)
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from pertoken.core.cache import ArrayCache
from pertoken.core.data import Group, encode, load_examples
from pertoken.core.examples import Example
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig, apply_gradients, make_accelerator, make_optimizer
from pertoken.core.packing import pack
from pertoken.core.run import add_reference_logps
from pertoken.core.step import REFERENCE, ObjectiveStep
from pertoken.results import save_result
from pertoken.train.dpo import DPO

BETA, RATE, CLIP = 0.1, 1e-6, 1.0
# What HH pairs look like to SmolLM2's tokenizer: deciles 0, 10 ... 100 of tokens in prompt, chosen and rejected.
HH = (
    (36, 41, 46, 54, 95, 125, 155, 190, 230, 300, 700),
    (4, 11, 16, 21, 28, 36, 45, 58, 77, 115, 400),
    (3, 9, 14, 19, 26, 34, 42, 53, 70, 108, 400),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    steps: int = 12
    """Timed steps (two more before them warm up)."""
    batch: int = 4
    """Pairs a step."""
    pairs: int = 0
    """Pairs to draw; they are gone through again when the steps need more (0: as many as the steps need)."""
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    curve: bool = False
    """Generated pairs of three prompt : response lengths as well."""
    pilot: bool = True
    """Look for TRL's fastest setting first; else it runs the whole batch at once without gradient checkpointing."""
    quick: bool = False
    """Three steps and no pilot."""
    json: bool = False
    """Write results/preference-step.json."""


class Pretokenized(DPOTrainer):
    """TRL's trainer on rows that hold token ids and reference log-probs already."""

    losses: list[float]

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super()._compute_loss(*args, **options)
        self.losses.append(float(loss.detach()))
        return loss


@dataclass
class Step:
    """One optimiser step of either side."""

    seconds: float
    loss: float
    norm: float


class Ours:
    """pertoken's step and update, as `loop.fit` runs them."""

    def __init__(self, groups: Sequence[Group], options: Options):
        self.lm = load("smollm2", dtype=options.dtype, device=options.device)
        config = LoopConfig(lr=RATE)
        self.accelerator = make_accelerator(config, Path(tempfile.gettempdir()))
        self.step = ObjectiveStep(DPO(beta=BETA), self.lm, groups, accelerator=self.accelerator)
        self.optimizer = make_optimizer(self.step.modules, config)

    def __call__(self, rows: Sequence[int]) -> Step:
        begin = _now()
        self.optimizer.zero_grad(set_to_none=True)
        result = self.step.run(list(rows), train=True)
        norm = apply_gradients(self.optimizer, self.accelerator, result.count, RATE, CLIP)
        return Step(_now() - begin, result.means()["loss"], norm)


def trl_trainer(groups: Sequence[Group], options: Options, steps: int, micro: int, checkpointing: bool) -> Pretokenized:
    """TRL's trainer over the groups in their order, `micro` pairs a forward."""
    rows = [
        {
            "prompt_ids": list(g.prompt_ids),
            "chosen_ids": list(g.pair[0].completion_ids),
            "rejected_ids": list(g.pair[1].completion_ids),
            "ref_chosen_logps": float(g.columns[REFERENCE][0].sum()),
            "ref_rejected_logps": float(g.columns[REFERENCE][1].sum()),
        }
        for g in groups
    ]
    lm = load("smollm2", dtype=options.dtype, device=options.device, attention="sdpa")
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // micro,
        gradient_checkpointing=checkpointing,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        use_cpu=options.device == "cpu",
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=options.seed,
    )
    trainer = Pretokenized(model=lm.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=lm.tokenizer)
    trainer.losses = []
    return trainer


class Between(TrainerCallback):
    """Times TRL's steps and calls `after(step)` between them."""

    def __init__(self, trainer: Pretokenized, after: Callable[[int], None], around: Any = contextlib.nullcontext):
        self.trainer, self.after, self.around, self.steps = trainer, after, around, []
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.losses.clear()
        self.inside = self.around(len(self.steps))
        self.inside.__enter__()
        self.begin = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = _now() - self.begin
        self.inside.__exit__(None, None, None)
        self.steps.append(Step(seconds, statistics.fmean(self.trainer.losses), float("nan")))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "grad_norm" in logs:  # comes after on_step_end, outside of the time
            self.steps[-1].norm = logs["grad_norm"]
            self.after(len(self.steps) - 1)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
