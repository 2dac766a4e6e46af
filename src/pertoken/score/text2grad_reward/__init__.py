"""Text2Grad's reward: a written critique, its quoted phrases as token scores.

Wang et al. (Microsoft), "Text2Grad: Reinforcement Learning from Natural Language Feedback", 2025, arXiv 2505.22338.
An annotator reads prompt and response and writes JSON: a paragraph, phrases that are good, phrases that are poor. Then

    delta_t = +1 | -1 | 0          token t spells a good phrase, a poor one, neither
    delta_t <- delta_t w(l_t)      summaries: w(l) = 1 / (1 + exp( clip( a (l - L*) - 6, -10, 6) ))

l counts tokens from the first one with a score (l = 1; w = 1 before it). Values are of shape (T,), their sum is the
scalar reward with the same information and no location (`level="sequence"`).

`annotator` is ``rule`` (a lexicon and phrases), ``row`` (the data's column ``critique``), ``lm`` (a model asked for the
JSON: a general one, or one that `sft` trained on `training_examples`, its folder given as `critic`), or a callable
(prompt, response) -> JSON text or `core.credit.Critique`.

Differs from the authors' code: scores go from characters to tokens by offsets, where the release aligns words (it loses
the last one, and gives up after five offsets); a phrase that is not in the response is counted and earns nothing, where
the release's fuzzy windows score whatever is near; a phrase is sought as whole words before it is sought inside words;
+0.1 on every token of a response without any score (`fallback`) is off.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from pertoken.core.credit import Credit, Critique
from pertoken.core.lm import LM, load
from pertoken.core.rollout import Sampling
from pertoken.core.trace import Trace

from .annotators import Rule, Writer, as_written, training_examples
from .critique import Quote, Written, parse
from .spans import ESCAPE, Matching, byte_offsets, locate, occurrences, speaking, token_scores

__all__ = ["Critique", "LengthWeight", "Matching", "Quote", "Rule", "Text2GradReward", "Writer", "Written"]
__all__ += ["length_weights", "occurrences", "parse", "token_scores", "training_examples"]
WIDE = 0.5  # share of a response beyond which one span is as good as a scalar


@dataclass(frozen=True, kw_only=True)
class LengthWeight:
    """The weight of late tokens (summaries)."""

    target: int | None = None
    """L*, tokens after which scores fade (the release: 48); None: they do not."""
    steepness: float = 1.0
    """a."""


@dataclass(frozen=True, kw_only=True)
class Text2GradReward:
    """Scorer: the critique of an annotator as span credit."""

    annotator: Any = "rule"
    """rule, row, lm, or a callable (prompt, response) -> JSON text or Critique."""
    lm: Any = None
    """The model that writes critiques, for annotator="lm"."""
    critic: str = ""
    """Folder of such a model, in its place."""
    rule: Rule = field(default_factory=Rule)
    """For annotator="rule"."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=500, temperature=0.0))
    """How the model writes."""
    most: int | None = None
    """Phrases of either list that the model is asked for (summaries: 2)."""
    matching: Matching = field(default_factory=Matching)
    """How phrases are found."""
    length: LengthWeight = field(default_factory=LengthWeight)
    """The weight of late tokens."""
    fallback: float = 0.0
    """Score of every token where none has any (the release: 0.1)."""
    level: str = "token"
    """token, or sequence: the sum on the last token."""

    columns: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if not callable(self.annotator) and self.annotator not in ("rule", "row", "lm"):
            raise ValueError(f"annotator={self.annotator!r} is not one of rule, row, lm, or a callable")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level={self.level!r} is not one of token, sequence")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """One reward credit a trace.

        Returns:
            Credits whose ``meta`` has the ``critique``, named ``parts`` (good, poor, fallback), the ``scale``, and
            ``counts``: critiques that were ``malformed``, ``repaired`` or ``too_long`` to ask for; entries that were
            ``dropped``; phrases ``exact``, ``normalised``, ``fuzzy``, ``unmatched`` or ``of_context`` (of the prompt or
            a tool); spans that are ``wide`` (over half of the response) or have ``no_tokens`` (punctuation alone).

        Raises:
            ValueError: no model, or no critique in the row, where the annotator needs one; a span outside of the text.
        """
        spoken_of = [(_prompt(t), t.text) for t in items]
        if callable(self.annotator):
            said = [self.annotator(*pair) if len(t) else Written() for t, pair in zip(items, spoken_of, strict=True)]
        elif self.annotator == "rule":
            said = [self.rule(*pair) for pair in spoken_of]
        elif self.annotator == "row":
            said = [_of_row(t) for t in items]
        else:
            said = iter(self._writer().ask([p for t, p in zip(items, spoken_of, strict=True) if len(t)]))
            said = [next(said) if len(t) else Written() for t in items]
        credits = [self._credit(t, pair[0], one) for t, pair, one in zip(items, spoken_of, said, strict=True)]
        _warn(credits)
        return credits

    def _writer(self) -> Writer:
        lm = _critic(self.critic, str(self.lm.device) if self.lm is not None else None) if self.critic else self.lm
        if lm is None:
            raise ValueError('annotator="lm" needs a model: give lm, or critic, the folder of one')
        return Writer(lm, self.sampling, self.most)

    def _credit(self, trace: Trace, prompt: str, said: Any) -> Credit:
        counts: Counter[str] = Counter()
        if said is None:
            counts["too_long"] += 1
            said = Written(malformed=True)
        written = as_written(said)
        critique = written if isinstance(written, Critique) else self._located(trace, prompt, written, counts)
        values = token_scores(trace, critique, self.matching.overlap)
        size = len(b"".join(trace.completion_pieces))
        counts["wide"] += sum(end - start > WIDE * size for start, end, _ in critique.spans)
        spoken_T = speaking(trace)
        counts["no_tokens"] += sum(not ((spoken_T >= a) & (spoken_T < b)).any() for a, b, _ in critique.spans)
        added = np.zeros(len(trace))
        if self.fallback and not values.any() and not counts["malformed"]:
            everything = Critique("", ((0, size, self.fallback),) if size else ())
            added = token_scores(trace, everything)
        weights = np.ones(len(trace))
        if self.length.target is not None:
            weights = length_weights(values + added, self.length.target, self.length.steepness)
        values, added = values * weights, added * weights
        parts = {"good": values.clip(0).sum(), "poor": values.clip(max=0).sum(), "fallback": added.sum()}
        meta: dict[str, Any] = {
            "critique": critique.text,
            "parts": {name: float(part) for name, part in parts.items()},
            "scale": "+1 a token of a good phrase, -1 of a poor one",
            "counts": {name: int(n) for name, n in sorted(counts.items()) if n},
        }
        named = {"method": "text2grad-reward", "version": 1, "meta": meta}
        if self.level == "sequence":
            return Credit.of_sequence(trace, float((values + added).sum()), **named)
        return Credit(trace=trace, values=values + added, level="span", **named)

    def _located(self, trace: Trace, prompt: str, written: Written, counts: Counter[str]) -> Critique:
        counts["malformed"] += written.malformed
        counts["repaired"] += written.repaired
        counts["dropped"] += written.dropped
        text = b"".join(trace.completion_pieces).decode("utf-8", ESCAPE)
        begins = byte_offsets(text)
        emitted = np.zeros(int(begins[-1]), bool)
        for (start, end), own in zip(trace.spans(), trace.mask, strict=True):
            emitted[start:end] = own
        allowed = [bool(emitted[a:b].any()) for a, b in itertools.pairwise(begins)]
        found, ways = locate(written, text, prompt, allowed, self.matching)
        counts.update(ways)
        return Critique(written.feedback, tuple((int(begins[a]), int(begins[b]), float(s)) for a, b, s in found))


def length_weights(scores_T: np.ndarray, target: int = 48, steepness: float = 1.0) -> np.ndarray:
    """w(l) of each token: l = 1 at the first token with a score (or the first of all, if none has), w = 1 before it."""
    scored = np.flatnonzero(scores_T)
    first = int(scored[0]) if len(scored) else 0
    l = np.arange(len(scores_T)) - first + 1
    weight = 1 / (1 + np.exp(np.clip(steepness * (l - target) - 6, -10, 6)))
    return np.where(l >= 1, weight, 1.0)


@lru_cache(maxsize=2)
def _critic(folder: str, device: str | None) -> LM:
    return load(folder, device=device)


def _prompt(trace: Trace) -> str:
    """The prompt's words: of all its messages, if it has several."""
    prompt = trace.meta.get("prompt", trace.prompt_text)
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)


def _of_row(trace: Trace) -> Any:
    said = trace.meta.get("critique")
    if said is None:
        row = trace.meta.get("row", "?")
        raise ValueError(f"row {row} has no column 'critique': JSON with good_spans and poor_spans; add it to the data")
    return said


def _warn(credits: Sequence[Credit]) -> None:
    """One warning for all that was left out or degenerate."""
    total: Counter[str] = Counter()
    for credit in credits:
        total.update(credit.meta["counts"])
    lost = {
        "malformed": "critiques without readable spans have reward 0",
        "unmatched": "phrases are not in the response",
        "wide": "spans cover more than half of their response and say little more than a scalar",
    }
    told = [f"{total[name]} {what}" for name, what in lost.items() if total[name]]
    if told:
        warnings.warn(f"of {len(credits)} critiques: {'; '.join(told)}", stacklevel=3)
