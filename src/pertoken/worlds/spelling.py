"""The spelling world: write out an inflected word letter by letter. Answers vary in length, and much of what a model is
unsure of cannot be wrong.

    w41 f7 =    u n k a ' r u - t e s      prefix un-, word ka|ru|te, suffix -s

A lexicon of `WORDS` made-up words of one to six syllables, and 24 forms (a prefix and a suffix each). Every other word
is *loose*: between its syllables may stand one of `MARKS`, each as often in the corpus, so that a language
model is unsure at every boundary of it and right whatever it writes (`right`); the others have no marks. What can be
wrong are the letters of words that the corpus seldom has. What is asked of a trained model is a word in a form in which
the corpus never has it: a hash of the prompt decides. One token a word, form or letter.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._tiny_lm import cached_folder, fit

CODE_VERSION = 1  # of the sampling and training code: part of the cache's key, raise it when the weights would change
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
WORDS = 400
SYLLABLES = 6
"""Of the longest word."""
PREFIXES = ("", "un", "over", "semi")
SUFFIXES = ("", "s", "ing", "ful", "less", "ation")
MARKS = ("", "'", "-", ".")
"""Between two syllables of a loose word."""
FORMS = len(PREFIXES) * len(SUFFIXES)
LETTERS = "abcdefghijklmnopqrstuvwxyz'-."
CONTEXT = 40
LONGEST = 32  # tokens of an answer, <eos> included
COMMON = 20.0
"""The word of rank r is in the corpus in proportion to 1 / (r + COMMON)."""
HELD_OUT = 0.25
"""Share of all prompts that no corpus has."""
VOCABULARY = (*SPECIAL, *LETTERS, "=", *(f"w{i}" for i in range(WORDS)), *(f"f{i}" for i in range(FORMS)))
STEPS, BATCH, LEARNING_RATE = 600, 64, 3e-3


class Task(NamedTuple):
    """A prompt, the parts of its answer (prefix, syllables, suffix), and whether the word is loose."""

    prompt: str
    parts: tuple[str, tuple[str, ...], str]
    loose: bool

    @property
    def answer(self) -> str:
        """Without marks."""
        return self.parts[0] + "".join(self.parts[1]) + self.parts[2]


@functools.cache
def lexicon() -> tuple[tuple[str, ...], ...]:
    """The syllables of each word, from the most frequent word to the rarest; all words differ. Odd ones are loose."""
    rng, found = np.random.default_rng(41), {}
    while len(found) < WORDS:
        n = int(rng.integers(1, SYLLABLES + 1))
        word = tuple("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(n))
        found.setdefault("".join(word), word)
    return tuple(found.values())


def task(word: int, form: int) -> Task:
    """A word in a form."""
    prefix, suffix = PREFIXES[form % len(PREFIXES)], SUFFIXES[form // len(PREFIXES)]
    return Task(f"w{word} f{form} =", (prefix, lexicon()[word], suffix), word % 2 == 1)


@functools.cache
def split(held_out: bool) -> tuple[tuple[int, int], ...]:
    """All words and forms on a side, in the order of a hash."""
    listed = []
    for word, form in ((word, form) for word in range(WORDS) for form in range(FORMS)):
        digest = hashlib.sha256(f"{word}/{form}".encode()).digest()
        if (digest[0] < 256 * HELD_OUT) == held_out:
            listed.append((digest[1:], (word, form)))
    return tuple(pair for _, pair in sorted(listed))


def tasks(n: int, seed: int) -> list[Task]:
    """n different tasks that no corpus has, every word as likely.

    Raises:
        ValueError: there are not so many.
    """
    held_out = split(True)
    if n > len(held_out):
        raise ValueError(f"{n} tasks: no corpus lacks more than {len(held_out)}")
    return [task(*held_out[i]) for i in np.random.default_rng((seed, 7)).permutation(len(held_out))[:n]]


def written(asked: Task, rng: np.random.Generator) -> str:
    """One of the right answers: any mark, or none, at each boundary of syllables of a loose word."""
    prefix, syllables, suffix = asked.parts
    marks = rng.integers(0, len(MARKS), len(syllables) - 1) * asked.loose
    return prefix + syllables[0] + "".join(MARKS[m] + s for m, s in zip(marks, syllables[1:])) + suffix


def right(asked: Task, text: str) -> float:
    """1.0 if the letters are right, and marks stand, one at a time, at boundaries of a loose word's syllables alone."""
    said = "".join(text.split())
    prefix, syllables, suffix = asked.parts
    for k, syllable in enumerate((prefix + syllables[0], *syllables[1:])):
        said = said[1:] if k and asked.loose and said[:1] in MARKS[1:] else said
        if not said.startswith(syllable):
            return 0.0
        said = said.removeprefix(syllable)
    return float(said == suffix)


def tokenizer() -> Any:
    """PreTrainedTokenizerFast: one token a word, form or letter (with blanks between); adds no special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **names)


def corpus(n: int, seed: int) -> list[list[str]]:
    """n rows of words: prompt and one of its right answers, frequent words more often."""
    rng, pairs = np.random.default_rng(seed), split(False)
    weight = np.array([1 / (word + COMMON) for word, _ in pairs])
    rows = []
    for i in rng.choice(len(pairs), n, p=weight / weight.sum()):
        asked = task(*pairs[i])
        rows.append([*asked.prompt.split(), *written(asked, rng)])
    return rows


def train_lm(
    *,
    layers: int,
    hidden: int,
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Train a language model of the world from scratch, and return its Hugging Face folder (safetensors).

    The folder is `spelling-<hash of settings, seed and code version>` under `folder`, else $PERTOKEN_CACHE, else
    ~/.cache/pertoken; if it is there it is returned at once.
    """
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}

    def build(path: Path) -> None:
        id_of = {word: i for i, word in enumerate(VOCABULARY)}
        rows = [[1, *(id_of[word] for word in row), 2] for row in corpus(steps * batch, 1000 * seed + layers)]
        model = fit(
            rows,
            size={
                "vocab_size": len(id_of),
                "max_position_embeddings": CONTEXT,
                "intermediate_size": 4 * hidden,
                **size,
            },
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            description=f"train LM spelling ({layers} layers)",
            progress=progress,
        )
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)

    settings = [VOCABULARY, size, steps, batch, learning_rate, seed, HELD_OUT, COMMON, CODE_VERSION]
    return cached_folder("spelling", settings, build, folder)
