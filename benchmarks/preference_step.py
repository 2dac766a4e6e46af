"""Optimiser steps of DPO on SmolLM2-135M: pertoken against TRL's `DPOTrainer`, in one process, step by step in turn.

Both train a copy of the same weights on the same pairs in the same order, from the same token ids and the same
reference log-probs (computed once, before), with AdamW (fused, no weight decay), clipping at norm 1 and a constant
learning rate. TRL's own loop runs (`trainer.train()`), with no other change than that it is handed ids instead of
text; between two of its steps a callback runs one of ours, so that both meet the machine in the same state. A pilot
tries TRL's settings (the whole batch at once, or pair by pair with accumulation; layers kept or computed again in
backward) on the two batches of middle size, and the fastest one races. TRL 1.16 has switched its padding-free option
off.

Memory: the most that torch's allocator held at any moment of a step, less weights, gradients and optimizer state,
measured on the largest batch, in a step that is not timed. The same step says where the time goes (profiler).

    python benchmarks/preference_step.py               12 timed steps of 4 pairs (HH when PERTOKEN_DATA is set)
    python benchmarks/preference_step.py --quick       3 steps, no pilot: does it run?
    python benchmarks/preference_step.py --curve       also generated pairs of prompt : response 256:64, 64:64, 32:128
    python benchmarks/preference_step.py --device cuda --dtype bfloat16     (written for it, but only ever run on CPU)
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pertoken.core.data import Group, encode, load_examples
from pertoken.core.examples import Example
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig, apply_gradients, make_accelerator, make_optimizer
from pertoken.core.packing import pack
from pertoken.core.step import REFERENCE, ObjectiveStep
from pertoken.train.dpo import DPO

BETA, CLIP, WARM = 0.1, 1.0, 1
CONFIG = LoopConfig(lr=1e-6)
LONGEST = 640  # tokens of a sequence; longer pairs (3 % of HH) are left out, so that TRL's whole batch fits into memory
# Deciles 0, 10 ... 100 of the tokens of HH's prompts, chosen and rejected responses under SmolLM2's template.
HH = (
    (31, 40, 45, 69, 96, 126, 153, 186, 234, 313, 500),
    (2, 10, 15, 21, 27, 34, 44, 57, 75, 108, 140),
    (2, 10, 15, 21, 27, 34, 44, 56, 71, 103, 140),
)
CURVE = ((256, 64), (64, 64), (32, 128))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    steps: int = 12
    """Timed steps (one before them warms up, one after them is profiled)."""
    batch: int = 4
    """Pairs a step."""
    pairs: int = 0
    """Pairs to draw; gone through again when the steps need more (0: as many as the steps need)."""
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    curve: bool = False
    """Also generated pairs of three prompt : response lengths."""
    quick: bool = False
    """Three steps; TRL pair by pair, without a pilot."""
    json: bool = False
    """Write results/preference-step.json."""


@dataclass(frozen=True)
class Setting:
    """How TRL runs: pairs a forward, and whether layers are computed again in backward."""

    micro: int
    recompute: bool

    def __str__(self) -> str:
        return (
            f"{self.micro} pair{'s' * (self.micro > 1)} a forward, layers {'recomputed' if self.recompute else 'kept'}"
        )


@dataclass
class Step:
    """One optimiser step of either side; CPU seconds count all threads."""

    seconds: float
    cpu: float
    loss: float
    norm: float = float("nan")


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


class Between(TrainerCallback):
    """Times TRL's steps, each `around` something, and calls `after` between them."""

    def __init__(self, trainer: Pretokenized, after: Callable[[int], None], around: Callable[[int], Any]):
        self.trainer, self.after, self.around, self.steps = trainer, after, around, list[Step]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.losses = []
        self.inside = self.around(len(self.steps))
        self.inside.__enter__()
        self.begin = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds, cpu = (b - a for a, b in zip(self.begin, now()))
        self.inside.__exit__(None, None, None)
        self.steps.append(Step(seconds, cpu, statistics.fmean(self.trainer.losses)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" in logs:  # after on_step_end, outside of the time
            self.steps[-1].norm = float(logs["grad_norm"])
            self.after(len(self.steps) - 1)


def run_trl(
    groups: Sequence[Group],
    options: Options,
    setting: Setting,
    after: Callable[[int], None] = lambda n: None,
    around: Callable[[int], Any] = lambda n: contextlib.nullcontext(),
) -> list[Step]:
    """One pass of TRL over the groups in their order."""
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
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.micro,
            gradient_accumulation_steps=options.batch // setting.micro,
            gradient_checkpointing=setting.recompute,
            num_train_epochs=1,
            learning_rate=CONFIG.lr,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            use_cpu=options.device == "cpu",
            bf16=False,  # the weights are in options.dtype already
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        lm = load("smollm2", dtype=options.dtype, device=options.device, attention="sdpa")
        data = Dataset.from_list(rows)
        trainer = Pretokenized(model=lm.model, args=config, train_dataset=data, processing_class=lm.tokenizer)
        callback = Between(trainer, after, around)
        trainer.add_callback(callback)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return callback.steps


class Ours:
    """pertoken's step and update, as `loop.fit` runs them."""

    def __init__(self, groups: Sequence[Group], options: Options):
        lm = load("smollm2", dtype=options.dtype, device=options.device)
        self.accelerator = make_accelerator(CONFIG, tempfile.gettempdir())
        self.step = ObjectiveStep(DPO(beta=BETA), lm, groups, accelerator=self.accelerator)
        self.optimizer = make_optimizer(self.step.modules, CONFIG)

    def __call__(self, rows: Sequence[int]) -> Step:
        begin = now()
        self.optimizer.zero_grad(set_to_none=True)
        result = self.step.run(list(rows), train=True)
        norm = apply_gradients(self.optimizer, self.accelerator, result.count, CONFIG.lr, CLIP)
        return Step(*(b - a for a, b in zip(begin, now())), result.means()["loss"], norm)


def now() -> tuple[float, float]:
    """Wall clock, and CPU time of all threads."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Profiled:
    """What one step holds and where its time goes."""

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


def draw_pairs(options: Options, lm: LM, wanted: int) -> tuple[list[Group], str]:
    """HH pairs, or generated ones of the same lengths, and what they are."""
    rng = np.random.default_rng(options.seed)
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        share = np.arange(0, 1.01, 0.1)
        lengths = [tuple(int(np.interp(rng.random(), share, deciles)) for deciles in HH) for _ in range(wanted)]
        return [random_pair(lm, rng, *n) for n in lengths], "generated pairs with the lengths of HH"
    examples = [e for n in ("hh_helpful", "hh_harmless") for e in load_examples(f"{folder}/{n}", kind="pair")[0]]
    groups, _ = encode([examples[i] for i in rng.permutation(len(examples))[: wanted + wanted // 4 + 8]], lm)
    groups = [g for g in groups if longest(g) <= LONGEST][:wanted]
    return groups, "pairs of HH (helpful and harmless)"


def random_pair(lm: LM, rng: np.random.Generator, prompt: int, chosen: int, rejected: int) -> Group:
    """Random ids of these lengths."""
    ids = [rng.integers(100, 40000, n).tolist() for n in (prompt, chosen, rejected)]
    traces = tuple(lm.trace_of_ids(ids[0], response) for response in ids[1:])
    return Group(example=Example(prompt="?", responses=("!", ".")), prompt_ids=tuple(ids[0]), traces=traces)


def longest(group: Group) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(group.prompt_ids) + max(map(len, group.traces))


def tokens(groups: Sequence[Group], options: Options, setting: Setting, ours: Ours) -> dict[str, int]:
    """Positions that reach the layers, over all batches."""
    count = Counter[str]()
    for start in range(0, len(groups), options.batch):
        batch = groups[start : start + options.batch]
        for at in range(0, len(batch), setting.micro):
            part = batch[at : at + setting.micro]
            count["TRL, padded"] += 2 * len(part) * max(map(longest, part))
        count["TRL, unpadded"] += sum(len(t.prompt_ids) + len(t) for g in batch for t in g.traces)
        count["pertoken, unpadded"] += sum(len(g.prompt_ids) + sum(len(t) - 1 for t in g.traces) for g in batch)
        count["pertoken, padded"] += sum(p.tokens for p in pack([g.traces for g in batch], cost=ours.step.cost))
    return dict(count)


def same_ids(groups: Sequence[Group], lm: LM) -> str:
    """Whether TRL makes the same ids of the same conversations."""

    def turns(text: Any, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}] if isinstance(text, str) else [dict(t) for t in text]

    rows = [
        {
            "prompt": turns(g.example.prompt, "user"),
            **{k: turns(r, "assistant") for k, r in zip(("chosen", "rejected"), g.example.responses)},
        }
        for g in groups
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, max_length=None)
        made = DPOTrainer._prepare_dataset(None, Dataset.from_list(rows), lm.tokenizer, config, "train")  # type: ignore
    newline = lm.tokenizer.encode("\n", add_special_tokens=False)
    exact = after_newline = 0
    for row, group in zip(made, groups):
        theirs = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        mine = [list(group.prompt_ids), *(list(t.completion_ids) for t in group.traces)]
        exact += theirs == mine
        after_newline += theirs == [mine[0], *(m + newline for m in mine[1:])]
    return f"{exact} of {len(groups)} pairs, {after_newline} more but for the newline after the last turn"
