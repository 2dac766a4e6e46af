"""Byte-exact — next-byte distributions of token models: prompts may end inside a token, vocabularies may differ.

Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles. Buu Phan, Brandon Amos,
Itai Gat, Marton Havasi, Matthew Muckley, Karen Ullrich. ICLR 2025, arXiv 2410.09303. The mode `all` is the
push-forward through decode of Vieira et al. (genlm-bytes). Of bytes x, with t token sequences without specials:

    cover(x) = {t : x is a prefix of decode(t), not of decode(t_1..t_{k-1})}
    P(x) = sum_{t in cover(x)} P(t),      P(b | x) ~ P(x b),      P(EOS | x) ~ sum_{t : decode(t) = x} P(t) p(EOS | t)

`mode="canonical"` (the paper's) counts the sequences that the tokenizer itself would give, `mode="all"` every one.
`fast` does not ask whether a last token that is not finished is canonical; what is found not to be is dropped when it
ends. Distributions are (257,) float64, 256 bytes and the end; they are renormalised over what counts. An ensemble is
the arithmetic mean of such vectors. Temperature acts on bytes: (P + 1e-7)^(1/T), renormalised (T < 0.1: the likeliest).

What comes before the last space that surely starts a token (`search="word"`) is read as the tokenizer spells it: all
canonical sequences share it. Special tokens cover no bytes: they are left out and the others renormalised, except those
that end a text, whose probabilities are the end's.

Differs from the authors' code: any tokenizer that keeps its bytes (theirs: SentencePiece); canonical means that some
text's encoding starts with the sequence, which is closed under prefixes (theirs, encode(x_1..x_i) for the left part, is
not for tokenizers that split by regular expressions); the end counts only where a whole text ends; the 1e-7 is added to
possible bytes alone, and not at temperature 1, which draws from P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...core.byte_ranges import Branch, byte_ranges
from ...core.decode import Drawn, Stream, generators
from ...core.lm import LM, load
from ...core.rollout import Sampling
from .canonical import Canonical, Search, canonical
from .states import EOS, ByteModel, ByteState, MeanState
from .texts import Continue, fim, reading, spelling, traced

__all__ = [
    "EOS",
    "Branch",
    "ByteExact",
    "ByteModel",
    "ByteState",
    "Canonical",
    "Continue",
    "MeanState",
    "Search",
    "byte_ranges",
    "canonical",
    "draw",
    "fim",
    "reading",
    "spelling",
    "tempered",
]
PAPER = Sampling(max_new_tokens=500, temperature=0.6)
"""How the authors' script draws."""


@dataclass(frozen=True, kw_only=True)
class ByteExact:
    """Options of byte-exact decoding.

    Raises:
        ValueError: a setting out of range.
    """

    mode: Literal["canonical", "all"] = "canonical"
    """Which token sequences count: those of the tokenizer, or every one."""
    fast: bool = True
    """fast_mode: no validity mask on unfinished tokens (canonical mode)."""
    beam: int = 0
    """K, branches kept at each byte (0: all, exact)."""
    threshold: float = 0.0
    """Branches below this share of P(x) are dropped (0: none, exact)."""
    search: Literal["word", "text"] = "word"
    """What is searched for other tokenizations: the part after the last sure boundary, or the whole text."""
    ensemble: tuple[str, ...] = ()
    """Further models, of any vocabularies: folders, Hub ids."""
    models: Any = ()
    """From Python, in their place: LMs."""

    def __post_init__(self) -> None:
        if self.mode not in ("canonical", "all") or self.search not in ("word", "text"):
            raise ValueError(f"{self.mode!r}, {self.search!r}: mode is canonical or all, search is word or text")
        if self.beam < 0 or not 0 <= self.threshold < 1:
            raise ValueError(
                f"beam={self.beam}, threshold={self.threshold}: beam >= 0 and 0 <= threshold < 1 are needed"
            )

    def state(self, lm: LM, prompt: Any) -> ByteState:
        """The state of one model at the end of a prompt.

        Args:
            prompt: text (a user turn where the model has a chat template, else what is continued), bytes (continued
                as they stand, whatever the template; they may end inside a character), messages (a last turn of the
                assistant is continued), ids, or `Continue`.

        Raises:
            ValueError: a prompt without a token before it and a model without BOS; an impossible byte.
        """
        context, data = reading(lm, prompt, whole=self.search == "text")
        how = Search(mode=self.mode, fast=self.fast, beam=self.beam, threshold=self.threshold)
        model = ByteModel(lm, context, how)
        if not self.beam and not self.threshold:
            model.prefetch(data)
        state = model.start()
        for byte in data:
            state = state.advance(byte)
        return state

    def states(self, lm: LM, prompt: Any) -> MeanState:
        """The mean over the model and those of the ensemble, at the end of a prompt."""
        others = self.models or tuple(load(source) for source in self.ensemble)
        return MeanState([self.state(one, prompt) for one in (lm, *others)])

    def logps(self, lm: LM, prompt: Any, following: bytes = b"", *, end: bool = False) -> np.ndarray:
        """Log-probs of given bytes after a prompt, one a byte (and one of the end), float64; their sum is that of the
        text. -inf from the first impossible byte on."""
        state = self.states(lm, prompt)
        out: list[float] = []
        for k, symbol in enumerate([*following, *([EOS] if end else [])]):
            out.append(float(state.logps()[symbol]))
            if out[-1] == -np.inf:
                out += [-np.inf] * (len(following) + end - len(out))
                break
            if symbol != EOS and (end or k + 1 < len(following)):
                state = state.advance(symbol)
                keep(state)
        return np.array(out)

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Any],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """See `core.decode.Decoder`. `sampling` is of bytes: ``max_new_tokens`` counts them, and temperature, top-p and
        top-k cut their distribution (default: the authors', 500 bytes at temperature 0.6). A token's log-probs are the
        sums of its bytes'. Nothing is streamed: the tokens are known at the end.

        Raises:
            ValueError: as `state`; n below 1.
        """
        if n < 1:
            raise ValueError(f"n={n}: give 1 or more")
        how = sampling or PAPER
        others = self.models or tuple(load(source) for source in self.ensemble)
        out = []
        for place, prompt in enumerate(prompts):
            start = MeanState([self.state(one, prompt) for one in (lm, *others)])
            _, data = reading(lm, prompt, whole=self.search == "text")
            row = []
            for rng in generators(seed, place, n):
                drawn, ended, logps, state = draw(start, how, rng)
                first = next((s for s in state.states if s.model.lm is lm), None)
                meta: dict[str, Any] = {"bytes": len(drawn), "logp": float(logps[:, 1].sum())}
                meta |= {"lost": first.lost if first else 1.0, "dropped_models": state.dropped}
                meta |= {"forwards": sum(s.model.tree.forwards for s in start.states)}
                settings = {"model": lm.name, "seed": seed, "mode": self.mode, "place": [place, len(row)]}
                trace = traced(lm, prompt, data, drawn, ended, logps, first, settings | vars(how))
                row.append(Drawn(trace, meta=meta))
            out.append(row)
        return out


def draw(start: MeanState, how: Sampling, rng: np.random.Generator) -> tuple[bytes, bool, np.ndarray, MeanState]:
    """Draw bytes until the end is drawn, `how.max_new_tokens` are, or a model's context is full.

    Returns:
        The bytes, whether they ended, log-probs (bytes and end, 2) under what was drawn from and under P, the state.
    """
    state, out, logps = start, bytearray(), []
    while len(out) < how.max_new_tokens:
        p = state.logps()
        ruled = p
        while True:
            q = tempered(ruled, how, may_end=len(out) >= how.min_new_tokens)
            cumulative = np.cumsum(np.exp(q))
            symbol = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"))
            after = state if symbol == EOS else state.advance(symbol)
            last = symbol == EOS or len(out) + 1 >= how.max_new_tokens
            last = last or any(s.longest() >= s.model.lm.context - 1 for s in after.states)
            if last or after.alive():
                break
            ruled = np.where(np.arange(EOS + 1) == symbol, -np.inf, ruled)  # a dead end, which fast mode can run into
            if not (ruled > -np.inf).any():
                raise ValueError("whatever follows this text is a dead end; use fast=False, or mode='all'")
        logps.append((q[symbol], p[symbol]))
        if symbol == EOS:
            return bytes(out), True, np.array(logps), state
        out.append(symbol)
        state = after
        if last:
            break
        keep(state, start)
    return bytes(out), False, np.array(logps).reshape(-1, 2), state


def tempered(logps: np.ndarray, how: Sampling, *, may_end: bool = True) -> np.ndarray:
    """Log-probs (257,) of what is drawn from: (P + 1e-7)^(1/T) of the possible symbols (T < 0.1: the likeliest; T = 1:
    P itself), then top-k and top-p. Where nothing but the end is possible, it may end at once."""
    p = np.exp(logps)
    if not may_end and p[:EOS].sum() > 0:
        p[EOS] = 0
    with np.errstate(divide="ignore"):
        logits = np.log(np.where(p > 0, p if how.temperature == 1 else p + 1e-7, 0))
    if how.temperature < 0.1:
        return np.where(np.arange(EOS + 1) == logits.argmax(), 0.0, -np.inf)
    cut = Sampling(top_k=min(how.top_k, EOS + 1), top_p=how.top_p)
    return cut.logps(torch.from_numpy(logits / how.temperature)).numpy()


def keep(*states: Any) -> None:
    """Let the models forget what none of these states of theirs is going to ask."""
    wanted: dict[int, tuple[Any, list[Any]]] = {}
    for state in states:
        for one in getattr(state, "states", [state]):
            wanted.setdefault(id(one.model), (one.model, []))[1].extend(one.histories())
    for model, histories in wanted.values():
        model.tree.keep(histories)
