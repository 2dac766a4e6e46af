"""LoRA adapters by peft: put on a model, and merged into it."""

from __future__ import annotations

from typing import Any

import torch


def add_lora(model: Any, rank: int) -> Any:
    """A fresh adapter of that rank (alpha twice the rank) on all linear layers of a transformers model.

    It is always the same adapter: a resumed run, and each process, starts from it.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        )


def merge_lora(model: Any) -> Any:
    """The plain model with its adapter added into its weights."""
    return model.merge_and_unload()
