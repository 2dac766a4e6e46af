"""Signals of a text for detectors, and the zero-shot scores that a detector is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.lm import LM, same_vocabulary
from ..core.packing import Cost, pack
from ..core.signals import token_signals
from ..core.stats import Needs, token_stats
from ..core.trace import Trace

METRICS = ("entropy", "top1_logp", "logp", "quantile", "mass")


@dataclass(frozen=True)
class Signals:
    """Of one text: metrics (T, 5) in the order of METRICS; hidden (T + 1, H), before each token and after the last."""

    metrics: np.ndarray
    hidden: np.ndarray


def as_traces(lm: LM, texts: Sequence[str], longest: int) -> list[Trace]:
    """Texts as completions of the model's BOS (or EOS, if it has none), cut at `longest` tokens."""
    first = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
    out = []
    for text in texts:
        ids, pieces = lm.encode_completion(text, ended=False)
        out.append(lm.trace_of_ids((first,), ids[:longest], pieces[:longest]))
    return out


def signals_of(lm: LM, traces: Sequence[Trace], longest: int = 512) -> list[Signals]:
    """Signals of completions' first `longest` tokens, from the cache where they are known."""
    cut = [
        t
        if len(t) <= longest
        else lm.trace_of_ids(t.prompt_ids, t.completion_ids[:longest], t.completion_pieces[:longest])
        for t in traces
    ]
    found = token_signals(lm, cut, (*METRICS, "hidden", "hidden_end"))
    return [
        Signals(np.stack([f[name] for name in METRICS], 1), np.concatenate([f["hidden"], f["hidden_end"][None]]))
        for f in found
    ]


def baselines(lm: LM, traces: Sequence[Trace]) -> dict[str, np.ndarray]:
    """Zero-shot scores (N,): mean log-prob, mean -log rank (from 1), LRR, mean entropy."""
    found = token_signals(lm, traces, ("logp", "rank", "entropy"))
    ranks = [np.log(f["rank"] + 1) for f in found]
    return {
        "log_prob": np.array([f["logp"].mean() for f in found]),
        "log_rank": np.array([-r.mean() for r in ranks]),
        "lrr": np.array([-f["logp"].sum() / max(r.sum(), 1e-6) for f, r in zip(found, ranks, strict=True)]),
        "entropy": np.array([f["entropy"].mean() for f in found]),
    }


@torch.no_grad()
def binoculars(observer: LM, performer: LM, traces: Sequence[Trace], max_tokens: int = 4096) -> np.ndarray:
    """B = mean(-log P2[t]) / mean(-sum_v P1[v] log P2[v]) of each completion; low: machine (Hans et al., 2401.12070).

    Raises:
        ValueError: models of different tokenizers.
    """
    same_vocabulary(observer, performer)

    def cross(logits: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        p, logq = logits["observer"].softmax(-1), logits["performer"].log_softmax(-1)
        return {"cross": -(p * logq).sum(-1)}

    needs = Needs({"observer": frozenset({"logp"}), "performer": frozenset({"logp"})}, {"binoculars": cross})
    out = np.zeros(len(traces))
    for packed in pack([[t] for t in traces], cost=Cost.of(performer.causal), max_tokens=max_tokens):
        stats = token_stats({"observer": observer, "performer": performer}, packed, needs)
        joint = next(s for s in stats.values() if "cross" in s.extra)
        for row, (g, _) in enumerate(packed.order):
            n = len(traces[g])
            out[g] = -float(stats["performer"].logp_NT[row, :n].mean()) / float(joint.extra["cross"][row, :n].mean())
    return out


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve (ties count half)."""
    order = np.argsort(score, kind="stable")
    ranks = np.empty(len(score))
    values, inverse, counts = np.unique(score[order], return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks[order] = (ends - (counts - 1) / 2)[inverse]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))
