"""Human preferences with a language model small enough to align in minutes: a Llama trained from scratch on the very
conversations (all responses, whichever was preferred), with a tokenizer and a chat template of its own.

It writes poor English; what it is for is to compare objectives on real human pairs without hours of computing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.examples import Example
from ._tiny_lm import cached_folder, fit

CONTEXT = 512
SIZE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_VERSION = 1


def tokenizer_of(texts: Sequence[str], vocabulary: int = 2048) -> Any:
    """A byte-level BPE of that many tokens, with the template above; <pad>, <bos>, <eos> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **named)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_lm(
    examples: Sequence[Example],
    *,
    epochs: int = 2,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Train the language model on every response of the examples, and return its folder (cached by content).

    Args:
        examples: pairs or single responses, whose prompts are text or messages; conversations beyond 512 tokens lose
            their end.
        epochs: passes over them.
    """
    conversations = [_messages(e, k) for e in examples for k in range(len(e.responses))]
    texts = [turn["content"] for messages in conversations for turn in messages]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def build(path: Path) -> None:
        tokenizer = tokenizer_of(texts)
        rows = []
        for messages in conversations:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            rows.append(tokenizer.encode(text, add_special_tokens=False)[:CONTEXT])
        model = fit(
            rows * epochs,
            size={
                **SIZE,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": CONTEXT,
                "tie_word_embeddings": True,
            },
            batch=16,
            learning_rate=2e-3,
            seed=seed,
            description="train a small LM on the conversations",
            progress=progress,
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return cached_folder("human-lm", [digest, SIZE, epochs, seed, _VERSION], build, folder)


def _messages(example: Example, k: int) -> list[dict[str, str]]:
    turns = example.prompt if not isinstance(example.prompt, str) else [{"role": "user", "content": example.prompt}]
    response = example.responses[k]
    said = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    return [{"role": str(t["role"]), "content": str(t["content"])} for t in (*turns, *said)]
