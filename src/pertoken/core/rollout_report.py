"""What is told of a batch of rollouts: figures under TRL's names, why the loss is zero, and a table of completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .advantage import Advantages, zero_variance
from .credit import Credit, save_credits
from .experience import Experience, Rollouts
from .rewarding import Rewarded
from .stats import masked_sum
from .trace import Trace

Figures = dict[str, tuple[float, float]]  # sums and counts


def reward_metrics(traces: Sequence[Trace], rewarded: Rewarded) -> Figures:
    """Rewards, their parts, lengths, and how many completions were cut off or could not be scored."""
    totals = [c.reduce() for c in rewarded.credits if c is not None]
    n, all_n = float(len(totals)), float(len(traces))
    out: Figures = {
        "reward": (sum(totals), n),
        "reward_std": (n * float(np.std(totals)) if totals else 0.0, n),
        "completions/mean_length": (float(sum(int(t.mask.sum()) for t in traces)), all_n),
        "completions/clipped_ratio": (float(sum(not t.ended for t in traces)), all_n),
        "completions/failed": (all_n - n, all_n),
    }
    for name, values in rewarded.parts.items():
        known = [v for v in values if v is not None]
        out[f"rewards/{name}"] = (sum(known), float(len(known)))
    return out


def experience_metrics(experience: Experience) -> Figures:
    """Groups whose rewards are all equal, KL to the reference (log-ratio summed over a sequence), entropy a token."""
    out: Figures = {}
    if len(experience.groups_N) > experience.groups_N.unique().numel():  # else nothing is compared
        flat_N = zero_variance(masked_sum(experience.reward_NT, experience.mask_NT), experience.groups_N)
        flat, prompts = (float(g.unique().numel()) for g in (experience.groups_N[flat_N], experience.groups_N))
        out["frac_reward_zero_std"] = (flat, prompts)
    stats = experience.stats
    if {"policy", "reference"} <= stats.keys():
        kl_N = masked_sum(experience.log_ratio(), experience.mask_NT)
        out["objective/kl"] = (float(kl_N.sum()), float(len(kl_N)))
    if "policy" in stats and "entropy" in stats["policy"].extra:
        total = masked_sum(stats["policy"].extra["entropy"], experience.mask_NT).sum()
        out["entropy"] = (float(total), float(experience.mask_NT.sum()))
    return out


def why_zero(experience: Experience, found: Advantages, options: Rollouts) -> list[str]:
    """In words, why a batch has no policy loss; nothing, if it has one."""
    batch, hint = f"batch {experience.batch + 1}", ""
    if options.mask_truncated and not experience.ended_N.any():
        hint = "all completions were cut off, and mask_truncated leaves them out; raise max_new_tokens"
    elif not found.advantage_NT.any():
        scores_N = masked_sum(experience.reward_NT, experience.mask_NT)
        row = experience.groups[0].example.row
        equal = options.generations > 1 and bool(zero_variance(scores_N, experience.groups_N).all())
        hint = "every advantage is 0" + (
            f": the completions of each prompt have equal rewards (those of row {row}: {float(scores_N[0]):g}). Give a "
            "reward that grades, a higher temperature, more generations, or prompts of another difficulty"
            if equal
            else ", though the rewards differ; look at the reward's shape and at the KL penalty"
        )
    return [f"{batch}: the policy's loss is 0, because {hint}"] if hint else []


def write_completions(experience: Experience, found: Advantages, folder: Path) -> Path:
    """The completions of a batch with reward and advantage of each token, as credits (`pertoken view`)."""
    credits = []
    for n, trace in enumerate(experience.traces):
        for kind, table in (("reward", experience.reward_NT), ("advantage", found.advantage_NT)):
            values = table[n, : len(trace)].double().cpu().numpy() * trace.mask
            credits.append(Credit(trace=trace, values=values, kind=kind, method=kind))
    return save_credits(credits, folder / f"batch_{experience.batch + 1:06d}.jsonl")
