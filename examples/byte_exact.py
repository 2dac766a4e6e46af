"""Byte-exact: prompts that end inside a word, and two models with different tokenizers averaged byte by byte.

(2) SmolLM2, English prose cut after three letters of a word of seven or more. Mean log2-loss of the next four true
    bytes, summed over them, when the model reads
      naive     the prompt's own tokens,
      healing   all but the last of them, the next token being one that begins with the bytes taken back,
      exact     byte-exact, canonical.
    Bound: exact at least 5x below naive, and at most 2 % above healing. Reached with the specification's 200 prompts:
    8.7x (14.52 and 1.66 bits), 0.527 of healing's. The default is fewer, to stay within three minutes on one core.
(3) Two small LMs trained here on plays, one with a byte-level BPE, one with a SentencePiece-like BPE. Bits a byte on
    held-out passages, of each and of their mean. Bound: the mean at most 0.02 above the better one.

Acceptance (1), the enumeration, is in tests/methods/test_byte_exact.py.

    python examples/byte_exact.py                  about three minutes
    python examples/byte_exact.py --prompts 200    the result
    python examples/byte_exact.py --full           200 prompts, longer training
"""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pertoken.core.evaluate import mean_interval
from pertoken.core.lm import LM, load
from pertoken.generate.byte_exact import ByteExact, ByteModel, ByteState, MeanState, Search
from pertoken.results import save_result
from pertoken.worlds._tiny_lm import fit

SEED = 0
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    prompts: int = 50
    """Prompts of part 2."""
    passages: int = 20
    """Held-out passages of part 3."""
    passes: int = 1
    """Passes over the training text of part 3."""
    full: bool = False
    """200 prompts, 100 passages, 6 passes."""
    save: bool = False
    """Write results/byte-exact.json."""


def documents(domains: tuple[str, ...]) -> list[str]:
    """Texts of PERTOKEN_DATA's corpora.

    Raises:
        ValueError: it is not set.
    """
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        raise ValueError("set PERTOKEN_DATA to the folder that holds corpora/")
    with gzip.open(Path(folder) / "corpora" / "domains.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows if row["domain"] in domains]


def cut_prompts(n: int) -> list[tuple[str, bytes]]:
    """(prompt that ends after three letters of a word, its next four bytes), one a document."""
    rng = np.random.default_rng(SEED)
    texts = documents(("science", "speech", "wikipedia"))
    out = []
    for i in rng.permutation(len(texts)):
        text = texts[i]
        words = [m for m in re.finditer(r"(?<= )[A-Za-z]{7,}", text) if 150 <= m.start() <= 600]
        if not words or not text.isascii():
            continue
        at = words[int(rng.integers(len(words)))].start()
        begin = text.rindex(" ", 0, at - 120)
        out.append((text[begin + 1 : at + 3], text[at + 3 : at + 7].encode()))
        if len(out) == n:
            return out
    raise ValueError(f"the corpus has only {len(out)} such prompts; ask for fewer")


def bits(state: Any, data: bytes) -> float:
    """log2-loss of bytes from a state on."""
    total = 0.0
    for k, byte in enumerate(data):
        total -= float(state.logps()[byte]) / np.log(2)
        if k + 1 < len(data):
            state = state.advance(byte)
    return total


def naive(lm: LM, prompt: str) -> ByteState:
    """The model after the prompt's own tokens; every continuation counts."""
    return ByteModel(lm, lm.encode_prompt(prompt), Search(mode="all")).start()


def healing(lm: LM, prompt: str) -> ByteState:
    """The last token taken back, and a token that begins with its bytes asked for in its place."""
    *left, last = lm.encode_prompt(prompt)
    state = ByteModel(lm, left, Search(mode="all")).start()
    for byte in lm.view.piece(last):
        state = state.advance(byte)
    return ByteState(state.model, tuple(b for b in state._cover if not b.history), state.logp)


def cut_words(n: int) -> dict[str, np.ndarray]:
    """log2-loss of each prompt's next four bytes, by method."""
    lm = load("smollm2", template="plain")
    method = ByteExact()
    read = {"naive": naive, "healing": healing, "exact": method.state}
    out: dict[str, list[float]] = {name: [] for name in read}
    seconds = dict.fromkeys(read, 0.0)
    for prompt, following in cut_prompts(n):
        for name, start in read.items():
            began = time.perf_counter()
            out[name].append(bits(start(lm, prompt), following))
            seconds[name] += time.perf_counter() - began
    for name, losses in out.items():
        print(f"  {name:8s} {np.mean(losses):8.4f} bits   {seconds[name] / n:.2f} s a prompt", flush=True)
    return {name: np.array(losses) for name, losses in out.items()}


def passages(texts: list[str], length: int = 200) -> list[str]:
    """Texts in pieces of about `length` characters, cut between words."""
    out = []
    for text in texts:
        words, piece = text.split(" "), ""
        for word in words:
            piece = f"{piece} {word}" if piece else word
            if len(piece) >= length:
                out.append(piece)
                piece = ""
    return out


def byte_level(texts: list[str], size: int) -> Tokenizer:
    """A GPT-2-like tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kind = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, kind)
    return core


def pieces(texts: list[str], size: int) -> Tokenizer:
    """A Llama-2-like tokenizer: a space is put before the text, unknown characters fall back to bytes."""
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIALS, *raw], show_progress=False)
    )
    core = Tokenizer(trained.model)  # without the trainer's idea that raw bytes are special tokens
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(undo)
    return core


def small_lm(name: str, core: Tokenizer, texts: list[str], passes: int, seed: int) -> LM:
    """A Llama of half a million parameters trained on the passages."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    rows = [[1, *ids, 2] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] * passes
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    model = fit(rows, size=size, batch=16, learning_rate=3e-3, seed=seed, description=name)
    return LM(model, tokenizer, name=name, template="plain")


def two_vocabularies(count: int, passes: int) -> dict[str, np.ndarray]:
    """(bits, bytes) of each held-out passage, by model."""
    texts = documents(("drama",))
    held_out, training = passages(texts[: len(texts) // 10]), passages(texts[len(texts) // 10 :])
    one = small_lm("byte-level BPE, 1000 ids", byte_level(training, 1000), training, passes, 0)
    two = small_lm("SentencePiece-like BPE, 700 ids", pieces(training, 700), training, passes, 1)
    chosen = np.random.default_rng(SEED).permutation(len(held_out))[:count]
    method, out = ByteExact(search="text"), {one.name: [], two.name: [], "mean": []}
    for i in chosen:
        data = held_out[i].encode()
        states = [method.state(lm, b"") for lm in (one, two)]
        for state in states:
            state.model.prefetch(data)
        alone = np.zeros(3)
        mean = MeanState(states)
        for byte in data:
            alone -= [float(s.logps()[byte]) for s in (*mean.states, mean)]
            mean = mean.advance(byte)
        assert not mean.dropped
        for name, nats in zip(out, alone, strict=True):
            out[name].append((nats / np.log(2), len(data)))
    return {name: np.array(rows) for name, rows in out.items()}


def main(options: Options) -> None:
    """Print both figures beside their baselines."""
    n, count, passes = (200, 100, 6) if options.full else (options.prompts, options.passages, options.passes)
    print(f"(2) SmolLM2, {n} prompts cut after three letters of a word: loss of the next four bytes")
    losses = cut_words(n)
    naive_, healed, exact = (losses[k].mean() for k in ("naive", "healing", "exact"))
    print(f"  naive / exact {naive_ / exact:.2f} (bound 5), exact / healing {exact / healed:.4f} (bound 1.02)")
    print(f"(3) two vocabularies, {count} held-out passages")
    found = two_vocabularies(count, passes)
    rates = {name: rows[:, 0].sum() / rows[:, 1].sum() for name, rows in found.items()}
    for name, rate in rates.items():
        print(f"  {name:32s} {rate:.4f} bits a byte")
    *singles, mean = rates.values()
    print(f"  mean - best {mean - min(singles):+.4f} (bound 0.02)")
    if options.save:
        best = min(list(rates)[:2], key=rates.__getitem__)
        save_result(
            "byte-exact",
            metric="log2-loss of the next four bytes of a prompt cut inside a word, byte-exact (less is better)",
            value=float(exact),
            interval=mean_interval(losses["exact"])[1:],
            baseline="the prompt's own tokens",
            baseline_value=float(naive_),
            bound="at least 5x below the naive tokens, at most 2 % above token healing",
            reached=bool(naive_ >= 5 * exact and exact <= 1.02 * healed),
            world=f"SmolLM2-135M, {n} prompts of English prose cut after three letters of a word",
            seeds=[SEED],
            notes=f"Interval: bootstrap over prompts. Canonical mode, fast. {n} of the specification's 200 prompts.",
            rows=[
                {
                    "metric": "the same, token healing",
                    "value": float(healed),
                    "interval": mean_interval(losses["healing"])[1:],
                },
                {
                    "metric": "bits a byte of the mean of two models with different tokenizers",
                    "value": float(mean),
                    "baseline": f"the better one ({best})",
                    "baseline_value": float(min(singles)),
                    "bound": "at most 0.02 above the better one",
                    "reached": bool(mean <= min(singles) + 0.02),
                    "world": f"plays (Tiny Shakespeare), two LMs of half a million parameters, {count} passages",
                },
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
