"""Figures that every comparison reports, one value an item, so that intervals can be computed afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .data import Group
from .lm import LM
from .packing import Cost, pack
from .run import completions_stats
from .stats import Needs, token_stats
from .trace import Trace


def log_ratio_sums(policy: LM, reference: LM, groups: Sequence[Group]) -> np.ndarray:
    """sum_t log pi(y_t) - log pi_ref(y_t) over emitted tokens, of every completion: float64 of shape (groups, K)."""
    traces = [t for g in groups for t in g.traces]
    ours, theirs = completions_stats(policy, traces), completions_stats(reference, traces)
    sums = [(a["logp"] - b["logp"])[t.mask].sum() for a, b, t in zip(ours, theirs, traces, strict=True)]
    return np.asarray(sums, np.float64).reshape(len(groups), -1)


def pair_margins(policy: LM, reference: LM, groups: Sequence[Group]) -> np.ndarray:
    """Log-ratio of the chosen minus that of the rejected, one a pair; the pair is told right where it is positive."""
    sums = log_ratio_sums(policy, reference, groups)
    return sums[:, 0] - sums[:, 1]


@torch.no_grad()
def sequence_kl(policy: LM, reference: LM, traces: Sequence[Trace], *, forward: bool = False) -> np.ndarray:
    """Sum over each completion's positions of the exact KL between the next-token distributions, in nats: (traces,).

    KL(policy || reference) on completions sampled from the policy is the sequence KL without sampling noise of the
    next-token draws; `forward` gives KL(reference || policy), TDPO's.
    """
    want = f"{'kl_forward' if forward else 'kl_reverse'}:reference"
    needs = Needs({"policy": frozenset({"logp", want}), "reference": frozenset({"logp"})})
    out = np.zeros(len(traces))
    with policy.active() as causal:
        cost = Cost.of(causal)
    for packed in pack([[t] for t in traces], cost=cost):
        stats = token_stats({"policy": policy, "reference": reference}, packed, needs)["policy"]
        sums = torch.where(stats.mask_NT, stats.extra[want], 0.0).sum(1).double().cpu().numpy()
        for row, (g, _) in enumerate(packed.order):
            out[g] = sums[row]
    return out


def mean_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval over items: (mean, low, high)."""
    v = np.asarray(values, np.float64)
    if not len(v):
        return (math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = v[rng.integers(0, len(v), (draws, len(v)))].mean(1)
    return float(v.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


# 97.5 % quantiles of Student's t by degrees of freedom; beyond the table, the normal's with the first correction.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def seeds_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % Student-t interval; with one seed the interval is the whole line (nan)."""
    v = np.asarray(values, np.float64)
    n = len(v)
    if n < 2:
        return (float(v.mean()) if n else math.nan, math.nan, math.nan)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)
    half = t * float(v.std(ddof=1)) / math.sqrt(n)
    return float(v.mean()), float(v.mean()) - half, float(v.mean()) + half
