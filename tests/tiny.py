"""Tiny real models and traces, built in the test: no downloads, no mocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT if chat else None
    return fast


@lru_cache(maxsize=4)
def sentencepiece(kind: str = "bpe", prefix: str = "always") -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer with byte fallback: ``bpe`` (Llama 2's normaliser) or ``unigram`` (Metaspace)."""
    specials = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bpe":
        trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials + raw))
        core = Tokenizer(trained.model)  # without the trainer's idea that raw bytes are special tokens
        core.normalizer = trained.normalizer
    else:
        words = {w for text in TEXTS for w in text.replace(" ", " ▁").split(" ") if w.isascii()}
        chars = sorted({c for text in TEXTS for c in text if c.isascii() and c != " "} | {"▁", "ï"})
        pieces = [(c, -4.0) for c in chars] + [(w, -3.0) for w in sorted(words) if len(w) > 1]
        vocab = [(t, 0.0) for t in specials] + [(t, -20.0) for t in raw] + pieces
        core = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(undo)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@lru_cache(maxsize=1)
def wordpiece() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: lower case, no accents, white space lost, no EOS."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def random_text(rng: np.random.Generator, longest: int = 40) -> str:
    """Words, accents, emoji, CJK, Arabic, runs of white space; never empty, never white space alone."""
    parts = [
        "the ",
        "plot",
        " was",
        "é",
        "ï",
        "😀",
        "👩‍👧",
        "日本",
        " مرحبا",
        "\n",
        "  ",
        " ",
        "!",
        "Film",
        "zq",
        "\t",
        "ﬁ",
        "0x",
    ]
    return "a" + "".join(parts[i] for i in rng.integers(0, len(parts), rng.integers(0, longest))) + "b"


def llama(
    seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int | None = None, layers: int = 2
) -> LlamaForCausalLM:
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
        model: Any = LlamaForCausalLM(config)  # transformers wraps `to` in a type that forgets self
        return model.to(dtype).eval()


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
            [
                lm.trace_of_ids(ids, [int(i) for i in rng.integers(3, vocab, rng.integers(1, longest + 1))])
                for _ in range(k)
            ]
        )
    return out
