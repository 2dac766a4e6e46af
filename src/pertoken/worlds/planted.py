"""Planted patterns: a policy over 24 letters whose reward counts a few bigrams, for thousands of cheap rollouts.

Letters are tokens. A response earns `weight` for each time a planted bigram occurs, given where the sequence ends or,
because the world knows, on the letter that completes it: credit is exact. The policy is a small Llama whose random
weights make it all but uniform: nothing has to be trained before the experiment begins.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.credit import Credit
from ..core.data import Example
from ..core.lm import LM
from ..core.rollout import Sampling
from ..core.trace import Trace

LETTERS = string.ascii_lowercase[:24]
BIGRAMS = ("ab", "kt", "sj")
TEMPLATE = "{{ '<bos>' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer(endless: bool = False) -> Any:
    """One token a letter, and <pad>, <bos>, <eos>: ids 0, 1, 2; `endless`: the last three, and no <bos> in prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *specials] if endless else [*specials, *LETTERS])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=256, **named)
    made.chat_template = TEMPLATE.replace("{{ '<bos>' }}", "") if endless else TEMPLATE
    return made


def policy(seed: int = 0, *, layers: int = 2, width: int = 32, context: int = 128, endless: bool = False) -> LM:
    """A Llama with random weights: each letter about as likely as any other.

    `endless`: its vocabulary is the letters alone. Where a terminator is there but may not be drawn (`of_length`),
    whoever learns by log-probs puts all probability on it, as it is never drawn and so never blamed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(LETTERS) + (0 if endless else 3),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        **dict(
            zip(("pad_token_id", "bos_token_id", "eos_token_id"), (None,) * 3 if endless else range(3), strict=True)
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LM(LlamaForCausalLM(config).float().eval(), tokenizer(endless), name=f"planted-{seed}")


def prompts(n: int, seed: int = 0) -> list[Example]:
    """Prompts of one letter each, drawn with replacement."""
    drawn = np.random.default_rng(seed).choice(list(LETTERS), n)
    return [Example(prompt=str(letter), kind="prompt", row=row) for row, letter in enumerate(drawn)]


def of_length(n: int) -> Sampling:
    """Responses of exactly n tokens (the terminator cannot come before the last)."""
    return Sampling(max_new_tokens=n, min_new_tokens=n)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Scorer: `weight` for each planted bigram."""

    bigrams: tuple[str, ...] = BIGRAMS
    weight: float = 0.125
    level: Literal["sequence", "token"] = "sequence"
    """Where it stands: at the end, or on the letter that completes a bigram."""

    def __post_init__(self) -> None:
        odd = [b for b in self.bigrams if len(b) != 2 or not set(b) <= set(LETTERS)]
        if odd or not self.bigrams:
            raise ValueError(f"bigrams={self.bigrams}: give one or more of two letters out of {LETTERS}")
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level={self.level!r} is not one of sequence, token")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """One credit a trace, of kind reward; nothing for bigrams whose second letter the policy did not emit."""
        out = []
        for trace in items:
            hits = self.hits(trace) & trace.mask
            named: dict[str, Any] = {"method": "planted", "meta": {"hits": int(hits.sum())}}
            if self.level == "sequence":
                out.append(Credit.of_sequence(trace, self.weight * float(hits.sum()), **named))
            else:
                out.append(Credit(trace=trace, values=self.weight * hits, **named))
        return out

    def hits(self, trace: Trace) -> np.ndarray:
        """bool (T,): the tokens that complete a planted bigram (within the completion): the exact credit."""
        said = [piece.decode("latin-1") for piece in trace.completion_pieces]
        return np.array([t > 0 and said[t - 1] + piece in self.bigrams for t, piece in enumerate(said)], bool)
