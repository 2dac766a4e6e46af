"""Tiny real models and traces, built in the test: no downloads, no mocks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pertoken.core.lm import LM
from pertoken.core.trace import Trace

TEXTS = (
    "The plot was great, the acting was not.",
    "A dull, lifeless film with a wonderful score!",
    "I loved every minute; my naïve friend 😀 did not.",
    "user assistant system question answer how was the film",
) * 3
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=4)
def tokenizer(chat: bool = True, vocab: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab` ids trained on four sentences, with a ChatML-like template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|start|>", "<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT if chat else None
    return fast


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int | None = None, layers: int = 2) -> LlamaForCausalLM:
    """A random two-layer Llama of width 32, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def lm(seed: int = 0, dtype: torch.dtype = torch.float64, chat: bool = True, layers: int = 2) -> LM:
    """A tiny `LM`; each call gives fresh weights of that seed."""
    return LM(llama(seed, dtype, layers=layers), tokenizer(chat), name=f"tiny-{seed}")


def groups(lm: LM, n: int = 4, k: int = 2, seed: int = 0, longest: int = 9, prompt: int = 8) -> list[list[Trace]]:
    """n prompts of K random completions each (of 1 to `longest` tokens), straight in ids."""
    rng = np.random.default_rng(seed)
    vocab = len(lm.tokenizer)
    out = []
    for _ in range(n):
        ids = [int(i) for i in rng.integers(3, vocab, rng.integers(2, prompt + 1))]
        out.append(
            [lm.trace_of_ids(ids, [int(i) for i in rng.integers(3, vocab, rng.integers(1, longest + 1))]) for _ in range(k)]
        )
    return out
