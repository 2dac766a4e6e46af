"""SAR — how unsure a model is of its answers, where tokens that carry meaning and answers that agree count more.

Duan, Cheng, Wang, Zavalny, Wang, Xu, Kailkhura, Xu, "Shifting Attention to Relevance: Towards the Predictive
Uncertainty Quantification of Free-Form Large Language Models", ACL 2024, arXiv 2307.01379. Of K sampled answers s_j to
a question x, with e_i = -log p(z_i) (nats, temperature 1) and a similarity g of texts in [0, 1]:

    R_i = 1 - g(x + s, x + s without z_i),  R~ = R / sum R        E_T(s) = sum_i R~_i e_i               tokenSAR
    E_S(s_j) = -log( p_j + 1/t sum_{k != j} g(s_j, s_k) p_k ),    p_j = exp(-sum_i e_i)                 sentSAR
    the same with p'_j = exp(-E_T(s_j))                                                                 SAR

A question's score is the mean over its answers; it may be negative, and only ranks. As credit: R~_i e_i stands on token
i (kind surprisal), so that an answer's credit sums to E_T; the scores of its question are in ``meta``.

Differs from the authors' code: sums are in logs; relevance is clipped at 0, and uniform where all of it is 0; answers
are removed from by id (there an answer whose text and ids were out of step scored 0, "certain"). `removal`: one
position, or (theirs) every occurrence of the token's text. The default similarity is all-MiniLM's cosine, not a
cross-encoder. lm-polygraph's tokenSAR looks at the greedy answer alone and puts a space between question and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.credit import Credit
from ..core.embed import TextEncoder, cosines
from ..core.lm import LM
from ..core.signals import token_signals
from ..core.trace import Trace

Similarity = Callable[[Sequence[tuple[str, str]]], Sequence[float] | np.ndarray]
"""Pairs of texts -> how alike they are, in [0, 1]."""


def relevance(similarity_T: np.ndarray) -> np.ndarray:
    """R~ (T,), which sums to 1, from g(with, without) of each token; uniform where nothing is relevant.

    Raises:
        ValueError: a similarity that is not a number.
    """
    similarity_T = np.asarray(similarity_T, np.float64)
    if np.isnan(similarity_T).any():
        raise ValueError("the similarity gave NaN; return numbers from 0 (unlike) to 1 (alike)")
    r = np.clip(1.0 - similarity_T, 0.0, 1.0)
    total = r.sum()
    return r / total if total > 0 else np.full(len(r), 1.0 / max(len(r), 1))


def similarities(g: Similarity, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """g of each pair, (pairs,), held in [0, 1].

    Raises:
        ValueError: not one number a pair.
    """
    found = np.asarray(g(pairs), np.float64) if pairs else np.zeros(0)
    if found.shape != (len(pairs),) or np.isnan(found).any():
        said = "NaN" if np.isnan(found).any() else f"an array of shape {found.shape} for {len(pairs)} pairs"
        raise ValueError(f"the similarity gave {said}; return one number a pair, from 0 (unlike) to 1 (alike)")
    return np.clip(found, 0.0, 1.0)


def question_text(trace: Trace) -> str:
    """What was asked, as text: of messages their contents, a line each."""
    asked = trace.meta.get("prompt", trace.prompt_text)
    return asked if isinstance(asked, str) else "\n".join(str(turn.get("content") or "") for turn in asked)


def token_sar(surprisal_T: np.ndarray, relevance_T: np.ndarray) -> np.ndarray:
    """R~_i e_i (T,), whose sum is tokenSAR of the answer."""
    return np.asarray(surprisal_T, np.float64) * relevance_T


def sentence_sar(log_p_K: np.ndarray, similarity_KK: np.ndarray, t: float = 0.001) -> np.ndarray:
    """E_S (K,) from log-probs of the answers (sentSAR), or -E_T of each (SAR). The diagonal of `similarity_KK` is not
    looked at.

    Raises:
        ValueError: `t` not above 0.
    """
    if not t > 0:
        raise ValueError(f"t={t} must be above 0")
    log_p_K = np.asarray(log_p_K, np.float64)
    g = np.clip(np.asarray(similarity_KK, np.float64), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        terms = np.log(g) - (np.log(t) if np.isfinite(t) else np.inf) + log_p_K[None, :]
    np.fill_diagonal(terms, log_p_K)
    return -np.logaddexp.reduce(terms, axis=1)


def semantic_entropy(mean_nll_K: np.ndarray, cluster_K: Sequence[int]) -> float:
    """-1/C sum over clusters of (log sum exp of -mean e, less 5): the reference's form."""
    scores, clusters = -np.asarray(mean_nll_K, np.float64), np.asarray(cluster_K)
    return -float(np.mean([np.logaddexp.reduce(scores[clusters == c]) - 5.0 for c in np.unique(clusters)]))


def lexical_similarity(answers: Sequence[str]) -> float:
    """Mean Rouge-L of pairs of answers (1 for a single one): high where they agree.

    Raises:
        ImportError: the extra ``overlap`` (rouge-score) is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("lexical similarity needs rouge-score: pip install 'pertoken[overlap]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
    return float(np.mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])) if pairs else 1.0


def clusters_of(similarity_KK: np.ndarray, threshold: float = 0.9) -> list[int]:
    """Cluster of each answer: the first earlier one that is alike enough in both directions, else a new one (the paper
    asks an entailment model; any similarity stands in for it here)."""
    out: list[int] = []
    for j, row in enumerate(similarity_KK):
        same = next((k for k in range(j) if min(row[k], similarity_KK[k][j]) >= threshold), None)
        out.append(out[same] if same is not None else max(out, default=-1) + 1)
    return out


def minilm_similarity(encoder: Any = None) -> Similarity:
    """max(0, cosine) of sentence embeddings; two texts without a word are alike."""
    encode = encoder if encoder is not None else TextEncoder()

    def similarity(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = dict(zip(texts, encode(texts), strict=True)) if texts else {}
        a, b = (np.stack([vectors[pair[k]] for pair in pairs]) for k in (0, 1)) if pairs else (np.zeros((0, 1)),) * 2
        return np.clip(np.nan_to_num(cosines(a, b), nan=1.0), 0.0, 1.0)

    return similarity


@dataclass(frozen=True, kw_only=True)
class SAR:
    """Options of SAR."""

    t: float = 0.001
    """t, temperature of how much other answers count."""
    removal: Literal["position", "occurrences"] = "position"
    """What the answer is without a token: without that token, or without its text everywhere."""
    join: str = ""
    """Between question and answer."""
    tokens: Literal["with_question", "alone"] = "with_question"
    """What a token's relevance is judged in: question and answer, or the answer alone."""
    answers: Literal["with_question", "alone"] = "with_question"
    """What sentence similarity compares."""
    similarity: Any = None
    """From Python: g, pairs of texts -> numbers in [0, 1]; default: all-MiniLM's cosine, 0 where it is negative."""

    def __post_init__(self) -> None:
        if not self.t > 0:
            raise ValueError(f"t={self.t} must be above 0")
        if self.removal not in ("position", "occurrences") or not {self.tokens, self.answers} <= {
            "with_question",
            "alone",
        }:
            raise ValueError(f"{self}: removal is position or occurrences, tokens and answers with_question or alone")

    def explain(self, lm: LM, traces: Sequence[Trace]) -> list[list[Credit]]:
        """One credit an answer; answers to one prompt (same ids) are a question's samples. ``meta``: of the answer
        ``token_sar``; of its question ``scores`` (token_sar, sentence_sar, sar, perplexity_entropy,
        length_normalised_entropy, semantic_entropy), ``answers`` = K, ``t``.

        Raises:
            ValueError: a similarity that is NaN, or answers of another tokenizer.
        """
        g: Similarity = self.similarity if self.similarity is not None else minilm_similarity()
        signals = token_signals(lm, traces, ("logp",))
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, trace in enumerate(traces):
            groups.setdefault(trace.prompt_ids, []).append(i)
        out: list[list[Credit]] = [[] for _ in traces]
        for rows in groups.values():
            some = [traces[i] for i in rows]
            surprisals = [np.where(t.mask, -signals[i]["logp"], 0.0) for i, t in zip(rows, some, strict=True)]
            found = self.question(some, surprisals, g)
            for i, trace, values in zip(rows, some, found["values"], strict=True):
                meta = {"token_sar": float(values.sum()), "scores": found["scores"], "answers": len(rows), "t": self.t}
                out[i] = [Credit(trace=trace, values=values, kind="surprisal", method="sar", meta=meta)]
        return out

    def question(self, traces: Sequence[Trace], surprisals: Sequence[np.ndarray], g: Similarity) -> dict[str, Any]:
        """``values``: R~ e of each answer, (T,) each; ``scores``: of the question, by name."""
        asked = [question_text(t) for t in traces]
        whole = [f"{q}{self.join}{t.text}" for q, t in zip(asked, traces, strict=True)]
        before = [f"{q}{self.join}" if self.tokens == "with_question" else "" for q in asked]
        probes = [(b + t.text, b + rest) for b, t in zip(before, traces, strict=True) for rest in self.without(t)]
        alike = similarities(g, probes)
        values, at = [], 0
        for trace, e in zip(traces, surprisals, strict=True):
            mine = alike[at : at + len(trace)].copy()
            at += len(trace)
            mine[[not p for p in trace.completion_pieces]] = 1.0  # a special token says nothing
            weights = np.zeros(len(trace))
            weights[trace.mask] = relevance(mine[trace.mask])
            values.append(token_sar(e, weights))
        compared = whole if self.answers == "with_question" else [t.text for t in traces]
        pairs = [(j, k) for j in range(len(traces)) for k in range(j)]
        gs = similarities(g, [(compared[j], compared[k]) for j, k in pairs])
        similarity_KK = np.eye(len(traces))
        for (j, k), value in zip(pairs, gs, strict=True):
            similarity_KK[j, k] = similarity_KK[k, j] = value
        sums, lengths = np.array([e.sum() for e in surprisals]), [max(int(t.mask.sum()), 1) for t in traces]
        tokens = np.array([v.sum() for v in values])
        scores: Mapping[str, float] = {
            "token_sar": float(tokens.mean()),
            "sentence_sar": float(sentence_sar(-sums, similarity_KK, self.t).mean()),
            "sar": float(sentence_sar(-tokens, similarity_KK, self.t).mean()),
            "perplexity_entropy": float(sums.mean()),
            "length_normalised_entropy": float((sums / lengths).mean()),
            "semantic_entropy": semantic_entropy(sums / lengths, clusters_of(similarity_KK)),
        }
        return {"values": values, "scores": scores}

    def without(self, trace: Trace) -> list[str]:
        """The answer's text without each of its tokens (bytes that are no character any more become U+FFFD)."""
        pieces = trace.completion_pieces
        if self.removal == "occurrences":
            return [trace.text.replace(p.decode("utf8", "replace"), "") if p else trace.text for p in pieces]
        return [b"".join(pieces[:i] + pieces[i + 1 :]).decode("utf8", "replace") for i in range(len(pieces))]
