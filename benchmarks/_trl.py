"""TRL's side of preference_step.py: its `DPOTrainer` on token ids, timed step by step."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pertoken.core.data import Group
from pertoken.core.lm import LM
from pertoken.core.step import REFERENCE

BETA, CLIP, RATE = 0.1, 1.0, 1e-6


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
    setting: Setting,
    batch: int,
    make: Callable[[], LM],
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
    lm = make()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.micro,
            gradient_accumulation_steps=batch // setting.micro,
            gradient_checkpointing=setting.recompute,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            use_cpu=lm.device.type == "cpu",
            bf16=False,  # the weights are in dtype already
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = Dataset.from_list(rows)
        trainer = Pretokenized(model=lm.model, args=config, train_dataset=data, processing_class=lm.tokenizer)
        callback = Between(trainer, after, around)
        trainer.add_callback(callback)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return callback.steps


def now() -> tuple[float, float]:
    """Wall clock, and CPU time of all threads."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


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
