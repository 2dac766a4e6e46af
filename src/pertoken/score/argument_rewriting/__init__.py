"""Appropriateness rewriting: make it appropriate and keep its content, by two scorers and a weight between them.

Ziegenbein, Skitalinskaya, Bayat Makou, Wachsmuth, "LLM-based Rewriting of Inappropriate Argumentation using
Reinforcement Learning from Machine Feedback", ACL 2024, arXiv 2406.03363. For a rewrite y' of y:

    R = w_a a(y') + w_s s(y, y')
    a = P(appropriate) of a classifier, in [0, 1];   s = F1 of greedily matched token vectors, in [-1, 1]

One number a document. Other mixtures: harmonic 2as / (a + s), and weighted 1 / (w_a / a + w_s / s), both 0 where a or s
is not above 0. An empty rewrite has a = 0, s = -1 (ours). A large w_a is answered with short polite words that say
nothing: look at ``meta["counts"]`` (a, s, edit similarity, length ratio, copy rate, still_inappropriate...).

As credit (ours), exact splits of R by homogeneity: a mixture M(a, s) is a dM/da + s dM/ds, and F1(P, R) likewise is
P 2R^2/(P+R)^2 + R 2P^2/(P+R)^2; P's part stands on each word piece of the rewrite by its best cosine, R's on the piece
that each piece of the original found best. Of a, an `NGramClassifier` says what each character earned
(`NGramClassifier.split`), the rest, which an empty text would have, stands on the last token; any other classifier
knows no tokens, and all of a stands there. `level="sequence"` is the paper's. Plug in others from Python::

    scorer = BERTScorer(model_type="microsoft/deberta-xlarge-mnli", rescale_with_baseline=True, lang="en")
    ArgumentRewriting(classifier=texts_to_probabilities, similarity=lambda y, x: scorer.score(y, x)[2].tolist())

Differs from the authors' code: these two scorers, for DeBERTa-v3-large and BERTScore of DeBERTa-xlarge; a missing
"### Response:" is an empty rewrite (theirs stops); words are cut at white space (theirs, spaCy's, makes words of
repeated white space too); shortest optimal alignments (`edit_similarity(..., compat="reference")` has theirs).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from pertoken.core.completions import completions_stats
from pertoken.core.credit import Credit, laid_out
from pertoken.core.embed import TextEncoder, greedy_match
from pertoken.core.lm import LM
from pertoken.core.trace import Trace, byte_offsets

from .classifier import NGramClassifier, SentenceClassifier, fit_classifier, load_classifier, macro_f1
from .corpus import INSTRUCTION, Labelled, alpaca_prompt, argument_of, load_corpus, rewrite_of, rewrite_places
from .edits import copy_rate, edit_similarity, length_ratio

__all__ = ["INSTRUCTION", "ArgumentRewriting", "Labelled", "NGramClassifier", "SentenceClassifier", "alpaca_prompt"]
__all__ += ["best_of", "copy_rate", "edit_similarity", "fit_classifier", "length_ratio", "load_classifier"]
__all__ += ["load_corpus", "macro_f1", "match_shares", "mixed", "perplexities", "rewrite_of"]
MIXTURES = ("sum", "harmonic", "weighted_harmonic")
Where = list[tuple[int, int, float]]


def mixed(a: float, s: float, w_a: float = 0.5, w_s: float = 0.5, mixture: str = "sum") -> tuple[float, float]:
    """What a and s contribute to the mixture: two numbers whose sum it is."""
    if mixture == "sum":
        return w_a * a, w_s * s
    if a <= 0 or s <= 0:
        return 0.0, 0.0
    if mixture == "harmonic":
        return 2 * a * s * s / (a + s) ** 2, 2 * a * a * s / (a + s) ** 2
    m = 1 / (w_a / a + w_s / s)
    return m * m * w_a / a, m * m * w_s / s


def match_shares(rewrite_TH: np.ndarray, original_SH: np.ndarray) -> tuple[float, np.ndarray]:
    """F1 of the greedy match of unit vectors, and what of it each of the rewrite's T tokens earned: (T,), in sum F1."""
    precision, recall, f1 = greedy_match(rewrite_TH, original_SH)
    shares = np.zeros(len(rewrite_TH))
    if precision + recall <= 0 or not len(shares):
        return f1, shares
    table, total = rewrite_TH @ original_SH.T, (precision + recall) ** 2
    shares += 2 * recall**2 / total * table.max(1) / table.shape[0]
    np.add.at(shares, table.argmax(0), 2 * precision**2 / total * table.max(0) / table.shape[1])
    return f1, shares


def perplexities(lm: LM, texts: Sequence[str]) -> list[float]:
    """exp of the mean negative log-prob of a text's tokens after BOS (or EOS); 0 for a text without a token."""
    first = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
    room = lm.context - 1
    plain = [t.encode("utf8", "replace").decode("utf8") for t in texts]  # no lone surrogates
    cut = [tuple(part[:room] for part in lm.encode_completion(t, ended=False)) for t in plain]
    traces = [lm.trace_of_ids([first], ids, pieces) for ids, pieces in cut if ids]
    found = iter(completions_stats(lm, traces) if traces else ())
    return [float(np.exp(-np.mean(next(found)["logp"]))) if ids else 0.0 for ids, _ in cut]


def best_of(scorer: Any, pools: Sequence[Sequence[Trace]]) -> list[int]:
    """Best-of-n re-ranking: of each pool, the index of the trace with the largest reward (the first of equal ones)."""
    rewards = iter([c.reduce() for c in scorer.score([t for pool in pools for t in pool])])
    return [int(np.argmax([next(rewards) for _ in pool])) for pool in pools]


@dataclass(frozen=True, kw_only=True)
class ArgumentRewriting:
    """Scorer of rewrites."""

    w_a: float = 0.5
    """Weight of appropriateness (studied with w_s: .4/.6, .45/.55, .5/.5, .55/.45, .6/.4, 1/0)."""
    w_s: float = 0.5
    """Weight of similarity."""
    mixture: Literal["sum", "harmonic", "weighted_harmonic"] = "sum"
    """How they are joined."""
    folder: str = ""
    """The classifier: a folder that `fit_classifier(...).save` wrote."""
    classifier: Any = None
    """From Python, in its place: texts -> P(appropriate), (N,)."""
    similarity: Any = None
    """From Python: a `TextEncoder` whose token vectors are matched (default: all-MiniLM), or rewrites, originals ->
    similarities."""
    alpaca: bool = False
    """Read prompt and completion by the Alpaca template; else the whole completion is the rewrite."""
    perplexity: bool = False
    """Report the rewrite's perplexity under lm (the release: GPT-2)."""
    lm: LM | None = None
    """The model of perplexity."""
    level: Literal["token", "sequence"] = "token"

    columns: ClassVar[Mapping[str, str]] = {
        "original": "the text that is rewritten (or, in its place, a prompt with ### Input: and ### Response:)"
    }

    def __post_init__(self) -> None:
        if self.folder and self.classifier is None:
            object.__setattr__(self, "classifier", load_classifier(self.folder))
        if self.mixture not in MIXTURES or self.level not in ("token", "sequence"):
            raise ValueError(f"mixture={self.mixture!r} must be one of {', '.join(MIXTURES)}, level token or sequence")
        if min(self.w_a, self.w_s) < 0 or self.w_a + self.w_s == 0:
            raise ValueError(f"w_a={self.w_a}, w_s={self.w_s}: weights must not be negative, and one of them above 0")
        if self.mixture == "weighted_harmonic" and abs(self.w_a + self.w_s - 1) > 1e-9:
            raise ValueError(f"w_a={self.w_a}, w_s={self.w_s}: a weighted harmonic mean's weights sum to 1; mend them")

    @classmethod
    def example(cls, **options: Any) -> ArgumentRewriting:
        """One with a classifier of four words and the edit similarity, for tests."""
        words = {"great": (1.0, 2.0), "good": (1.5, 1.0), "dull": (1.0, -2.0), "horrible": (2.0, -1.0)}
        similarity = lambda y, x: [edit_similarity(*pair) for pair in zip(y, x, strict=True)]
        made = NGramClassifier({"word": words, "char": {}}, 0.5)
        return cls(**{"classifier": made, "similarity": similarity, "perplexity": True, **options})

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]``: appropriateness and similarity, as they enter R.

        Raises:
            ValueError: no classifier; perplexity without a model; a row without an original; a plugged-in scorer of
                the wrong number of values.
        """
        if self.classifier is None:
            raise ValueError(
                "no classifier: fit_classifier(texts, inappropriate).save(FOLDER), and name it: folder=FOLDER"
            )
        if self.perplexity and self.lm is None:
            raise ValueError("perplexity=True needs the model whose perplexity it is: lm=load(...)")
        places = [_places(t, self.alpaca) for t in items]
        rewrites = ["".join(t.raw_text[i] for i in at) for t, at in zip(items, places, strict=True)]
        originals = [_original(t) for t in items]
        said = [i for i, text in enumerate(rewrites) if text]
        judged = _judged(self.classifier, [rewrites[i] for i in said])
        kept = self._similar([rewrites[i] for i in said], [originals[i] for i in said])
        known = dict(zip(said, zip(judged, kept, strict=True), strict=True))
        ppl = perplexities(self.lm, rewrites) if self.perplexity else None
        credits = []
        for i, trace in enumerate(items):
            (a, a_where), (s, s_where) = known.get(i, ((0.0, []), (-1.0, [])))
            parts = mixed(a, s, self.w_a, self.w_s, self.mixture)
            spans = _scaled(a_where, parts[0], a) + _scaled(s_where, parts[1], s)
            counts = _reported(rewrites[i], originals[i], a, s) | ({"perplexity": ppl[i]} if ppl else {})
            meta = {
                "parts": {"appropriateness": parts[0], "similarity": parts[1]},
                "scale": "a in [0, 1], s in [-1, 1]",
                "counts": counts,
            }
            at = byte_offsets(trace.raw_text)
            placed = [(at[places[i][b]], at[places[i][e - 1] + 1], v) for b, e, v in spans]
            named: dict[str, Any] = {"kind": "reward", "method": "argument-rewriting", "version": 1, "meta": meta}
            credits.append(laid_out(trace, placed, sum(parts), self.level, **named))
        return credits

    def _similar(self, rewrites: Sequence[str], originals: Sequence[str]) -> list[tuple[float, Where]]:
        """s of each pair, and which characters of the rewrite earned what of it."""
        if not rewrites:
            return []
        if self.similarity is not None and not hasattr(self.similarity, "tokens"):
            return [(v, []) for v in _numbers(self.similarity(list(rewrites), list(originals)), rewrites, "similarity")]
        encoder = self.similarity or _minilm()
        texts = dict.fromkeys([*rewrites, *originals])
        cut = encoder.too_long(list(texts))
        if cut:
            warnings.warn(f"{cut} texts are longer than the encoder's window; s is of their beginnings", stacklevel=3)
        known = {t: encoder.tokens(t) for t in texts}
        out = []
        for rewrite, original in zip(rewrites, originals, strict=True):
            s, shares = match_shares(known[rewrite][0], known[original][0])
            out.append((s, [(b, e, float(v)) for (b, e), v in zip(known[rewrite][1], shares, strict=True) if e > b]))
        return out


def _judged(classifier: Any, rewrites: Sequence[str]) -> list[tuple[float, Where]]:
    """a of each text, and which characters earned what of it."""
    if not hasattr(classifier, "split"):
        return [(v, []) for v in _numbers(classifier(list(rewrites)) if rewrites else [], rewrites, "classifier")]
    found = [classifier.split(t) for t in rewrites]
    return [(a, [(i, i + 1, float(v)) for i, v in enumerate(earned) if v]) for a, earned in found]


def _scaled(where: Where, part: float, whole: float) -> Where:
    return [(b, e, v * part / whole) for b, e, v in where] if whole else []


def _numbers(values: Any, texts: Sequence[str], who: str) -> list[float]:
    made = [float(v) for v in values]
    if len(made) != len(texts):
        raise ValueError(f"the {who} gave {len(made)} numbers for {len(texts)} texts; give one each")
    return made


def _reported(rewrite: str, original: str, a: float, s: float) -> dict[str, float]:
    """What is reported of a rewrite, and not optimised."""
    flags = {"still_inappropriate": a < 0.5, "empty": not rewrite, "identical": rewrite == original}
    kept = {"edit_similarity": edit_similarity, "length_ratio": length_ratio, "copy_rate": copy_rate}
    told = {name: float(of(rewrite, original)) for name, of in kept.items()}
    return {"a": float(a), "s": float(s), **told, **{name: float(flag) for name, flag in flags.items()}}


def _places(trace: Trace, alpaca: bool) -> Sequence[int]:
    """Which characters of the completion are the rewrite."""
    before = trace.prompt_text if alpaca else ""
    return [i - len(before) for i in rewrite_places(before + trace.raw_text, alpaca, start=len(before))]


def _original(trace: Trace) -> str:
    known = trace.meta.get("original")
    known = argument_of(trace.prompt_text) if known is None else known
    if not isinstance(known, str) or not known.strip():
        raise ValueError(
            f"row {trace.meta.get('row', '?')} has no column original, the text that is rewritten (nor a prompt with "
            "### Input: and ### Response:); give one"
        )
    return known.strip()


@lru_cache(maxsize=1)
def _minilm() -> TextEncoder:
    return TextEncoder()
