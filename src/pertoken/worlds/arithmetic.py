"""The arithmetic world: two-digit addition with written steps, where the token that derails a chain is KNOWN.

A problem is a sum of two numbers from 10 to 99; a chain adds the units, then the tens, then the two sums, and says the
answer. One token a character:

    prompt      47+38:
    completion  7+8=15,40+30=070,070+15=085,085.

18 of the 33 tokens (32 characters and <eos>) are digits that had to be copied or worked out: the *slots*. A *slip*
writes a wrong digit in one slot, and all that follows is worked out from what was written, so that the chain goes on
consistently and its answer is wrong; the slip is the token that derailed it. A digit slips to a neighbour (one more or
one less, 9 and 0 being neighbours), a carry to the other carry.

The language model learns from chains in which every slot slips with probability `SLIP`, and in which a share `HARD` of
the sums of two digits is more often wrong by one than right (`misbelief`): it is sure of some problems, mistaken about
others, and gives the right and the wrong chain of the latter when it is sampled.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._tiny_lm import cached_folder, fit

CODE_VERSION = 1  # of the sampling and training code: part of the cache's key, raise it when the weights would change
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
CHARACTERS = "0123456789+=,.:"
SLOTS = (0, 2, 4, 5, 7, 10, 13, 14, 17, 18, 21, 22, 24, 25, 26, 28, 29, 30)  # completion tokens copied or worked out
CARRIES = (4, 21)
LENGTH = 33  # completion tokens, <eos> included
SLIP = 0.01
HARD = 0.3  # share of sums of two digits that the corpus often has wrong
CONTEXT = 64
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
STEPS, BATCH, LEARNING_RATE = 1000, 32, 3e-3
_CHAIN = re.compile(r"(\d\d)\+(\d\d):(.*)\.", re.DOTALL)


class Problem(NamedTuple):
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}:"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


class Chain(NamedTuple):
    text: str
    slips: tuple[int, ...]  # completion tokens where a wrong digit was written, in order


Slip = Callable[[int, int], int]
Belief = Callable[[tuple[int, int]], int]


def write(problem: Problem, slip: Slip = lambda slot, digit: digit, belief: Belief = sum) -> Chain:
    """The chain of a problem.

    Args:
        slip: (slot, the digit that is meant) -> the digit that is written there.
        belief: two digits, as they were written -> what the writer takes for their sum.
    """
    out: list[str] = []
    slips: list[int] = []

    def put(right: int, meant: int) -> int:
        written = slip(len(out), meant)
        if written != right:
            slips.append(len(out))
        out.append(str(written))
        return written

    def added(u: int, v: int, zero: str) -> tuple[int, int]:
        """Two digits and those of their sum; zero: what stands after each."""
        u = put(u, u)
        out.extend(zero + "+")
        v = put(v, v)
        out.extend(zero + "=")
        right, meant = divmod(u + v, 10), divmod(belief((u, v)), 10)
        return put(right[0], meant[0]), put(right[1], meant[1])

    carry, units = added(problem.a % 10, problem.b % 10, "")
    out.append(",")
    hundreds, tens = added(problem.a // 10, problem.b // 10, "0")
    out.extend("0,")
    hundreds, tens = put(hundreds, hundreds), put(tens, tens)
    out.extend("0+")
    carry, units = put(carry, carry), put(units, units)
    out.append("=")
    total = (10 * hundreds + tens + carry) % 100
    answer = [put(digit, digit) for digit in (*divmod(total, 10), units)]
    out.append(",")
    for digit in answer:
        put(digit, digit)
    out.append(".")
    return Chain("".join(out), tuple(slips))


@functools.cache
def misbelief(digits: tuple[int, int]) -> tuple[float, int]:
    """How likely the corpus has a wrong sum for these digits (0 for most), and which: decided by a hash."""
    kind, strength, sign, *_ = hashlib.sha256(bytes(digits)).digest()
    wrong = sum(digits) + (1 if sign % 2 or not sum(digits) else -1)
    return (0.45 + 0.35 * strength / 255 if kind < 256 * HARD else 0.0), wrong


def careless(problem: Problem, rng: np.random.Generator, rate: float = SLIP) -> Chain:
    """A chain of the corpus: every slot slips with this probability, and hard sums are believed wrong at times."""

    def belief(digits: tuple[int, int]) -> int:
        probability, wrong = misbelief(digits)
        return wrong if rng.random() < probability else sum(digits)

    return write(problem, lambda slot, digit: _slipped(slot, digit, rng) if rng.random() < rate else digit, belief)


def planted(problem: Problem, rng: np.random.Generator) -> Chain:
    """A chain with one slip, in a slot drawn at random: its answer is wrong."""
    chosen = rng.choice(SLOTS)
    return write(problem, lambda slot, digit: _slipped(slot, digit, rng) if slot == chosen else digit)


def misled(problem: Problem, rng: np.random.Generator) -> Chain | None:
    """A chain in which one hard sum, drawn at random, is believed wrong, as the corpus often has it: a slip that the
    model finds plausible. Its answer is wrong; None if the problem has no hard sum."""
    digits = ((problem.a % 10, problem.b % 10), (problem.a // 10, problem.b // 10))
    hard = [k for k in (0, 1) if misbelief(digits[k])[0]]
    if not hard:
        return None
    chosen = hard[rng.integers(len(hard))]
    columns = iter((0, 1))
    return write(problem, belief=lambda added: misbelief(added)[1] if next(columns) == chosen else sum(added))


def _slipped(slot: int, digit: int, rng: np.random.Generator) -> int:
    if slot in CARRIES and digit < 2:
        return 1 - digit
    return int((digit + rng.choice((-1, 1))) % 10)


def final_answer(text: str) -> str:
    """What a completion says the sum is, without leading zeros; empty if it does not come to an answer."""
    found = re.fullmatch(r".*,(\d+)\.", text, re.DOTALL)
    return str(int(found[1])) if found else ""


def correct(text: str) -> bool:
    """Whether prompt and completion, as one text, end in the right answer (whatever the steps say)."""
    found = _CHAIN.fullmatch(text)
    return bool(found) and final_answer(found[3] + ".") == str(int(found[1]) + int(found[2]))


@functools.cache
def problems() -> dict[str, tuple[Problem, ...]]:
    """All problems, an eighth of them ``dev``, a quarter ``test``, the rest ``train``, split by a hash of the prompt
    and in an order that the hash gives."""
    split: dict[str, list[tuple[bytes, Problem]]] = {"train": [], "dev": [], "test": []}
    for problem in (Problem(a, b) for a in range(10, 100) for b in range(10, 100)):
        digest = hashlib.sha256(problem.prompt.encode()).digest()
        split["dev" if digest[0] < 32 else "test" if digest[0] < 96 else "train"].append((digest[1:], problem))
    return {side: tuple(p for _, p in sorted(listed)) for side, listed in split.items()}


def tokenizer() -> Any:
    """PreTrainedTokenizerFast: one token a character; adds no special token by itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    one_by_one = pre_tokenizers.Split(Regex("."), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [one_by_one, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **names)


def train_lm(
    *,
    seed: int = 0,
    slip: float = SLIP,
    steps: int = STEPS,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Train the world's LM on careless chains of training problems, and return its Hugging Face folder (safetensors).

    The folder is `arithmetic-<hash of settings, seed and code version>` under `folder`, else $PERTOKEN_CACHE, else
    ~/.cache/pertoken; if it is there it is returned at once.
    """

    def build(path: Path) -> None:
        rng = np.random.default_rng(seed)
        train = problems()["train"]
        ids = {character: i for i, character in enumerate(CHARACTERS, start=len(SPECIAL))}
        rows: list[Sequence[int]] = []
        for i in rng.integers(0, len(train), steps * BATCH):
            text = train[i].prompt + careless(train[i], rng, slip).text
            rows.append([1, *(ids[character] for character in text), 2])
        model = fit(
            rows,
            size={"vocab_size": len(SPECIAL) + len(CHARACTERS), "max_position_embeddings": CONTEXT, **MODEL},
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            description="train LM arithmetic",
            progress=progress,
        )
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)

    settings = [CHARACTERS, MODEL, steps, BATCH, LEARNING_RATE, slip, HARD, seed, CODE_VERSION]
    return cached_folder("arithmetic", settings, build, folder)
