"""The model that a benchmark trains: SmolLM2-135M, or a larger one of its family with random weights, which cost what
trained ones cost."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pertoken.core.lm import LM, embedded_folder, load

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-1.7b": {  # HuggingFaceTB/SmolLM2-1.7B's config.json
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 130000.0,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }
}  # fmt: skip


def named(name: str, dtype: str, device: str) -> LM:
    """``smollm2``, or a shape of `SHAPES` with random weights of one seed, made on the device.

    Raises:
        ValueError: another name.
    """
    if name == "smollm2":
        return load(name, dtype=dtype, device=device)
    if name not in SHAPES:
        raise ValueError(f"{name!r} is not one of smollm2, {', '.join(SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[name], dtype=getattr(torch, dtype)))
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    return LM(model.to(getattr(torch, dtype)).eval(), tokenizer, name=name, note="random weights")


def described(name: str) -> str:
    """For a result's world."""
    return "SmolLM2-135M" if name == "smollm2" else f"{name} with random weights"
