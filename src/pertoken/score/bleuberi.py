"""BLEUBERI — n-gram overlap with reference answers as a reward for following instructions.

Chang et al., "BLEUBERI: BLEU is a surprisingly effective reward for instruction following", 2025, arXiv 2505.11080.
With hypothesis and references cut by mteval-13a (case kept), for n = 1..4:

    p_n = ( match_n + 1 ) / ( possible_n + 1 ),   match_n = sum over n-grams of min( count, most in one reference )
    BLEU = BP exp( mean_n log p_n ),   BP = 1 if |y| > |r| else exp( 1 - |r| / |y| ),   |r| = the SHORTEST reference

in [0, 1]; every order is smoothed, 1-grams too, so disjoint text is above 0 and a single right token has 1. An answer
between ``<answer>`` tags is taken out first; a blank one has 0. It saturates beyond the shortest reference: report
lengths beside it.

As credit (ours): each order has a quarter of BLEU, shared by its matched n-grams (the first ones, where the count is
clipped), or by all words where none matched; the sum is BLEU.

Differs from the authors' code: nothing to tokenise counts as blank (theirs divides by zero); ``bleu_rm`` normalises
within a prompt's group, theirs over the whole call (``z_over="call"``); BERTScore's encoder is all-MiniLM unless
another is given (theirs distilbert-base-uncased).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from ..core.credit import Credit, laid_out
from ..core.embed import TextEncoder, greedy_match
from ..core.options import known_values
from ..core.trace import Trace, byte_offsets

ORDERS = 4
_FORMAT = re.compile(r"^<think>.*?</think><answer>.*?</answer>$")  # without DOTALL, as theirs: a newline fails


def tokenize(text: str) -> list[str]:
    """mteval-13a's words, case kept.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    return _tokenizer()(text).split()


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise ImportError("bleuberi needs sacrebleu: pip install 'pertoken[overlap]'") from error
    return Tokenizer13a()


def answer_of(text: str) -> str:
    """The answer in a completion: after the first <answer>, up to the next tag of either kind; else all of it."""
    return (text.split("<answer>")[1].split("</answer>")[0] if "<answer>" in text else text).strip()


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """Counts of n-grams."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def matches(words: Sequence[str], references: Sequence[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    """Clipped counts: of each n-gram of the hypothesis, at most as many as any one reference has."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= ngrams(reference, n)
    return ngrams(words, n) & most


def bleu(hypothesis: str, references: Sequence[str]) -> float:
    """BLEU as above, of plain text; 0 for a blank hypothesis.

    Raises:
        ValueError: no reference, or one without a word.
    """
    words, refs = tokenize(hypothesis), [tokenize(r) for r in references]
    if not refs or not all(refs):
        raise ValueError("BLEU needs one or more references, and a word in each; leave such rows out")
    if not hypothesis.strip() or not words:
        return 0.0
    ratio = len(words) / min(map(len, refs))
    logs = 0.0
    for n in range(1, ORDERS + 1):
        found = sum(matches(words, refs, n).values())
        logs += math.log((found + 1) / (max(len(words) - n + 1, 0) + 1)) / ORDERS
    return math.exp(logs + (0.0 if ratio > 1 else 1 - 1 / ratio))


def sacrebleu(hypothesis: str, references: Sequence[str]) -> float:
    """sacrebleu's sentence BLEU (exponential smoothing, closest reference length), in [0, 1]."""
    _tokenizer()
    from sacrebleu import sentence_bleu

    return sentence_bleu(hypothesis, list(references)).score / 100 if hypothesis.strip() else 0.0


def rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    """rougeL F, best over references, without a stemmer; 0 for a blank hypothesis.

    Raises:
        ImportError: rouge-score is not installed.
    """
    if not hypothesis.strip():
        return 0.0
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score: pip install 'pertoken[overlap]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max(scorer.score(r, hypothesis)["rougeL"].fmeasure for r in references)


def harmonic(a: float, b: float) -> float:
    """2ab / (a + b), 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def z_scores(values: Sequence[float]) -> np.ndarray:
    """(x - mean) / (unbiased std + 1e-6); zeros for one value, or for equal ones."""
    x = np.asarray(values, np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return np.zeros(len(x))
    return (x - x.mean()) / (x.std(ddof=1) + 1e-6)


def format_ok(text: str) -> bool:
    """Whether the whole completion is <think>..</think><answer>..</answer>, in one line."""
    return _FORMAT.match(text) is not None


@dataclass(frozen=True, kw_only=True)
class Bleuberi:
    """Scorer of completions against their row's references."""

    flavour: Literal["bleu", "sacrebleu", "rouge", "bleu_rouge_f1", "bertscore", "bleu_rm"] = "bleu"
    """The overlap; bleu_rm: the mean of the z-scores of BLEU and of a reward model."""
    reasoning: bool = False
    """Add the format reward: 1 where the completion is one line of <think>..</think><answer>..</answer>."""
    z_over: Literal["group", "call"] = "group"
    """bleu_rm: what z-scores are taken over, the completions of a prompt or all that are scored together."""
    reward_model: Any = None
    """From Python, for bleu_rm: a scorer."""
    encoder: Any = None
    """From Python, for bertscore: a `TextEncoder`."""
    level: Literal["token", "sequence"] = "token"

    columns: ClassVar[Mapping[str, str]] = {"references": "answers to compare with, a list of texts"}

    def __post_init__(self) -> None:
        known_values(self)
        if self.flavour == "bleu_rm" and self.reward_model is None:
            raise ValueError("flavour=bleu_rm combines BLEU with a reward model; give reward_model=SCORER from Python")

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]`` names overlap (and format).

        Raises:
            ValueError: a row without references, or with a blank one.
        """
        overlaps = [self._overlap(answer_of(t.text), references_of(t), t.text) for t in items]
        if self.flavour == "bleu_rm":
            overlaps = self._with_model(items, overlaps)
        return [self._credit(t, value) for t, value in zip(items, overlaps, strict=True)]

    def _overlap(self, answer: str, references: Sequence[str], text: str) -> float:
        if self.flavour == "bertscore":
            encoder = self.encoder or _minilm()
            own = encoder.tokens(text)[0]
            return max(greedy_match(own, encoder.tokens(r)[0])[2] for r in references)
        if self.flavour == "bleu_rouge_f1":
            return harmonic(bleu(answer, references), rouge_l(answer, references))
        score = {"sacrebleu": sacrebleu, "rouge": rouge_l}.get(self.flavour, bleu)
        return score(answer, references)

    def _with_model(self, items: Sequence[Trace], overlaps: Sequence[float]) -> list[float]:
        rm = [credit.reduce() for credit in self.reward_model.score(items)]
        out = np.zeros(len(items))
        keys = [t.prompt_ids if self.z_over == "group" else () for t in items]
        for key in set(keys):
            at = [i for i, k in enumerate(keys) if k == key]
            out[at] = (z_scores([overlaps[i] for i in at]) + z_scores([rm[i] for i in at])) / 2
        return out.tolist()

    def _credit(self, trace: Trace, overlap: float) -> Credit:
        parts = {"overlap": overlap} | ({"format": float(format_ok(trace.text))} if self.reasoning else {})
        meta = {"parts": parts, "scale": "z-scores" if self.flavour == "bleu_rm" else "overlap in [0, 1]"}
        named: dict[str, Any] = {"kind": "reward", "method": "bleuberi", "version": 1, "meta": meta}
        spans = where_earned(trace.raw_text, references_of(trace), overlap)
        return laid_out(trace, spans, sum(parts.values()), self.level, **named)


def references_of(trace: Trace) -> list[str]:
    """The references of a trace's row.

    Raises:
        ValueError: there are none, or one is blank.
    """
    known = trace.meta.get("references")
    known = [known] if isinstance(known, str) else known
    if not known or not all(isinstance(r, str) and tokenize(r) for r in known):
        raise ValueError(
            f"row {trace.meta.get('row', '?')}: bleuberi compares with the column references (one or more texts, none "
            "of them blank); give them, or leave the row out"
        )
    return list(known)


def where_earned(text: str, references: Sequence[str], amount: float) -> list[tuple[int, int, float]]:
    """An amount on byte spans: a quarter an order, shared by the n-grams that match."""
    answer = answer_of(text)
    words, at = tokenize(answer), byte_offsets(text)
    tag = text.find("<answer>") + len("<answer>")  # the same words may stand in the thinking before, or in the tag
    start = max(0, text.find(answer, tag if "<answer>" in text else 0))
    spans: list[tuple[int, int]] = []
    for word in words:  # words that the tokenizer rewrote (entities) stand where the reading is
        found = text.find(word, start)
        begin = found if found >= 0 else start
        start = begin + len(word) if found >= 0 else start
        spans.append((at[min(begin, len(text))], at[min(begin + len(word), len(text))]))
    share = np.zeros(len(words))
    refs = [tokenize(r) for r in references]
    for n in range(1, ORDERS + 1):
        left = matches(words, refs, n)
        hit = []
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            if left[gram] > 0:
                left[gram] -= 1
                hit.append(i)
        if not hit:
            share += 1 / ORDERS / max(1, len(words))
        for i in hit:
            share[i : i + n] += 1 / ORDERS / len(hit) / n
    return [(a, b, amount * float(s)) for (a, b), s in zip(spans, share, strict=True)]


@lru_cache(maxsize=1)
def _minilm() -> TextEncoder:
    return TextEncoder()
