"""Grammar worlds: small probabilistic languages whose words carry KNOWN credit, and a small causal LM trained on them.

A world is a frozen `Grammar`: production rules, a lexicon, and the size and training of its language model. The presets
`GRAMMARS` are data in `_grammars.py`; a new toy language is one more entry there.
`"reviews"` has negation, degree words, moods and aspects named by the prompt; `"lexicon64"` is the 64-word bag-of-words
sentiment language of the T-REG and TDPO specifications; `"slots45"`, of SparsePO's, has sentiment words in one kind of
slot only. An example of `"reviews"`, with the credit below the words:

    prompt      the critic on the plot of the film :
    completion  the plot  was  not   very  good  .  the acting  was  really  superb  .
                 0   0     0  -.375  +.25 -.375  0   0    0      0     +1      +2    0     score = +2.5

What a word earns. A sentiment word w has the base value v(w). It is modified by the negators n (each a negative factor)
waiting in its clause, that is since the last closer (". , and but" ...) or sentiment word, and by the degree words d
directly before it (a degree word followed by anything else lapses). Negation reverses the scale of degrees: "not very
good" is milder than "not good". With an odd number of negators s = -1, otherwise s = +1:

    value(phrase) = v(w) * prod n * (prod d) ** s

The credits of a phrase sum to its value: the sentiment word and its negators share v(w) * prod n in equal parts (so a
negated "good" is itself negative), and each degree word gets its marginal contribution, innermost first: the value of
the phrase with it minus that without it. All other words, and modifiers with nothing to modify, earn exactly 0. Any
word sequence has a score, so samples of a policy that has left the grammar have one too.

Text. A text is a run of words, each with its leading space (" the plot was good ."), and each word is one token.
"""

import functools
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._grammars import PRESETS
from ._rules import Table, draw, expand, inside, parse, resolve
from ._tiny_lm import cached_folder, fit

CODE_VERSION = 2  # of the sampling and training code: part of the cache's key, raise it when the weights would change
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
POLES = {None: 0, "positive": 1, "negative": -1}


class Review(NamedTuple):
    prompt: tuple[str, ...]
    completion: tuple[str, ...]


def to_text(words: Iterable[str]) -> str:
    """Every word with its leading space: the text whose tokens are the words."""
    return "".join(" " + word for word in words)


def _words(words: Sequence[str] | str) -> list[str]:
    return words.split() if isinstance(words, str) else list(words)


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """One language. Every field is part of the hash under which its language models are cached."""

    name: str
    rules: Mapping[str, str]  # symbol -> alternatives; PROMPT and COMPLETION are the roots; no left recursion
    slots: Mapping[str, str]  # what the prompt fixes, in order: slot -> symbol that yields one word
    lexicon: Mapping[str, float]  # v(w)
    degrees: Mapping[str, float] = field(default_factory=dict)  # d > 0
    negators: Mapping[str, float] = field(default_factory=dict)  # n < 0
    closers: tuple[str, ...] = ()  # words that end the scope of a negator
    tilt: float = 1.0  # log factor on the weight of + and - alternatives under a polarity
    model: Mapping[str, int]  # size of the LM, as LlamaConfig names it
    steps: int
    batch: int  # reviews a step
    learning_rate: float  # peak of the cosine schedule
    context: int = 512  # tokens

    def table(self, polarity: str | None = None) -> Table:
        """The rules parsed and normalised; polarity tilts the alternatives that carry a sign."""
        if polarity not in POLES:
            raise ValueError(f"polarity is {polarity!r}; use None, 'positive' or 'negative'")
        return self._tables[polarity]

    @functools.cached_property
    def _tables(self) -> dict[str | None, Table]:
        return {polarity: parse(self.rules, pole * self.tilt) for polarity, pole in POLES.items()}

    @functools.cached_property
    def _prompts(self) -> dict[tuple[str, ...], dict[str, str]]:
        """Every prompt -> its slots."""
        bindings: list[dict[str, str]] = [{}]
        for slot, symbol in self.slots.items():
            bindings = [env | {slot: side[0]} for env in bindings for side in self.table()[resolve(symbol, env)][1]]
        sides = self.table()["PROMPT"][1]
        found = {self._prompt(side, env): env for side in sides for env in bindings}
        if len(found) < len(sides) * len(bindings):  # the completion's words would depend on a slot nobody can read
            raise ValueError(f"grammar {self.name!r}: two prompts read the same; name every slot in every PROMPT")
        return found

    def _prompt(self, side: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
        """The words of a prompt: the slots say all of it, so that a symbol in it has a single alternative."""
        words: list[str] = []
        for symbol in side:
            symbol = resolve(symbol, env)
            words += self._prompt(self.table()[symbol][1][0], env) if symbol in self.table() else [symbol]
        return tuple(words)

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All words, sorted: token id of word i is i + 4."""
        sides = [side for _, sides in self.table().values() for side in sides]
        return tuple(sorted({s for side in sides for s in side if not (s[0] == "=" or s[0].isupper())}))

    def sample(self, n: int, rng: np.random.Generator, polarity: str | None = None) -> list[Review]:
        """n independent reviews: first the slots and the prompt, then the completion, each drawn by the rules."""
        table, (cumulative, sides) = self.table(polarity), self.table()["PROMPT"]
        reviews = []
        for _ in range(n):
            env: dict[str, str] = {}
            for slot, symbol in self.slots.items():
                env[slot] = expand(table, symbol, env, rng)[0]
            prompt = self._prompt(sides[draw(cumulative, rng)], env)
            reviews.append(Review(prompt, tuple(expand(table, "COMPLETION", env, rng))))
        return reviews

    def complete(
        self, prompt: Sequence[str] | str, rng: np.random.Generator, polarity: str | None = None
    ) -> tuple[str, ...]:
        """A completion of this prompt, drawn by the rules."""
        return tuple(expand(self.table(polarity), "COMPLETION", self._env(prompt), rng))

    def _env(self, prompt: Sequence[str] | str) -> dict[str, str]:
        env = self._prompts.get(tuple(_words(prompt)))
        if env is None:
            raise ValueError(f"{prompt!r} is no prompt of grammar {self.name!r}; see prompts(grammar)")
        return env

    def logprob(self, prompt: Sequence[str] | str, words: Sequence[str] | str, polarity: str | None = None) -> float:
        """Exact log p(completion | prompt) in nats, summed over derivations; -inf outside the grammar."""
        probability = inside(self.table(polarity), "COMPLETION", self._env(prompt), _words(words))
        return math.log(probability) if probability > 0 else -math.inf

    def credit(self, words: Sequence[str] | str) -> np.ndarray:
        """True credit of each word (len(words),), float64, by the decomposition in the module's docstring."""
        words = _words(words)
        out, negators, degrees = np.zeros(len(words)), [], []  # positions of the modifiers that wait
        for i, word in enumerate(words):
            if word in self.lexicon:
                value = self.lexicon[word] * math.prod(self.negators[words[j]] for j in negators)
                out[[*negators, i]] = value / (1 + len(negators))
                for j in reversed(degrees):
                    value, before = value * self.degrees[words[j]] ** (-1) ** len(negators), value
                    out[j] = value - before
                negators, degrees = [], []
            elif word in self.degrees:
                degrees.append(i)
            else:
                negators = [*negators, i] if word in self.negators else [] if word in self.closers else negators
                degrees = []
        return out

    def score(self, words: Sequence[str] | str) -> float:
        return float(self.credit(words).sum())

    def tokenizer(self) -> Any:
        """PreTrainedTokenizerFast: one token a word, `Ġword` in the vocabulary; adds no special token by itself."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocab = {token: i for i, token in enumerate([*SPECIAL, *("Ġ" + word for word in self.vocabulary)])}
        core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=self.context, **names)


GRAMMARS: dict[str, Grammar] = {name: Grammar(name=name, **preset) for name, preset in PRESETS.items()}


def prompts(grammar: Grammar) -> dict[str, list[str]]:
    """All prompt texts, about a fifth of them "test", split by a hash of the text (the same in every run)."""
    split: dict[str, list[str]] = {"train": [], "test": []}
    for prompt in map(to_text, grammar._prompts):
        split["test" if hashlib.sha256(prompt.encode()).digest()[0] < 51 else "train"].append(prompt)
    return split


def train_lm(
    grammar: Grammar,
    *,
    seed: int = 0,
    polarity: str | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Train the grammar's LM on fresh samples, each seen once, and return its Hugging Face folder (safetensors).

    A polar LM is the plain one trained on for a quarter of the steps, at a quarter of the rate: one model under two
    conditions, so that the two agree on all that polarity does not touch.

    The folder is `grammar-<name>-<hash of grammar, seed, polarity and code version>` under `folder`, else
    $PERTOKEN_CACHE, else ~/.cache/pertoken; if it is there it is returned at once.
    """

    def build(path: Path) -> None:
        ids = {word: i for i, word in enumerate(grammar.vocabulary, start=len(SPECIAL))}
        start = None
        if polarity is not None:
            from transformers import AutoModelForCausalLM

            start = AutoModelForCausalLM.from_pretrained(
                train_lm(grammar, seed=seed, folder=folder, progress=progress), dtype="float32"
            )
        share = 1 if start is None else 4
        reviews = grammar.sample(grammar.steps * grammar.batch // share, np.random.default_rng(seed), polarity)
        model = fit(
            [[1, *(ids[word] for word in review.prompt + review.completion), 2] for review in reviews],
            size={"vocab_size": len(SPECIAL) + len(ids), "max_position_embeddings": grammar.context, **grammar.model},
            batch=grammar.batch,
            learning_rate=grammar.learning_rate / share,
            seed=seed,
            start=start,
            description=f"train LM {grammar.name} ({polarity or 'plain'})",
            progress=progress,
        )
        model.save_pretrained(path)
        grammar.tokenizer().save_pretrained(path)

    return cached_folder(f"grammar-{grammar.name}", [asdict(grammar), seed, polarity, CODE_VERSION], build, folder)
