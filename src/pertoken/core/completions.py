"""Statistics of completions that exist already: of any traces, and the reference's cached log-probs of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .cache import ArrayCache, key_of, remember
from .data import Group
from .describe import describe
from .lm import LM
from .packing import Cost, pack
from .record import data_hash
from .stats import PER_COMPLETION, Needs, Stats, token_stats
from .step import REFERENCE
from .trace import Trace

_TOGETHER = 16  # completions of one prompt that share its forward


@torch.no_grad()
def completions_stats(
    lm: LM,
    traces: Sequence[Trace],
    wants: frozenset[str] = frozenset({"logp"}),
    *,
    max_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Statistics of one model on any traces, prompts that are the same computed once.

    Returns:
        For each trace, in order: ``logp`` and what else was wanted, each of shape (T, ...), float64 where it was a
        number; observation tokens are in it too. ``hidden_end`` and ``hidden_prompt`` have shape (H,).
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, trace in enumerate(traces):
        by_prompt.setdefault(trace.prompt_ids, []).append(i)
    # Very many completions of one prompt would make one huge pack, so they are taken some at a time.
    indices = [some[i : i + _TOGETHER] for some in by_prompt.values() for i in range(0, len(some), _TOGETHER)]
    out: list[dict[str, np.ndarray]] = [{} for _ in traces]
    with lm.active() as causal:
        cost = Cost.of(causal)
    needs, groups = Needs({"model": wants}), [[traces[i] for i in some] for some in indices]
    for packed in pack(groups, cost=cost, max_tokens=max_tokens, ends=needs.ends):
        stats: Stats = token_stats({"model": lm}, packed, needs)["model"]
        values = {"logp": stats.logp_NT, **stats.extra}
        arrays = {name: v.double().cpu().numpy() for name, v in values.items() if v.ndim > 1}
        for row, (g, k) in enumerate(packed.order):
            i = indices[g][k]
            part = slice(len(traces[i]))
            out[i] = {n: (a[row] if n in PER_COMPLETION else a[row, part]).copy() for n, a in arrays.items()}
        if progress:
            progress(len(packed.order))
    return out


def add_reference_logps(
    groups: Sequence[Group], reference: LM, cache: ArrayCache | None = None, say: Callable[[str], None] | None = None
) -> None:
    """Add the column of per-token reference log-probs, from the cache by content, computing what is missing."""
    identity = reference.identity()
    if torch.is_autocast_enabled(reference.device.type):
        identity = identity | {"autocast": str(torch.get_autocast_dtype(reference.device.type))}
    shelf = (cache or ArrayCache()).context(identity)
    traces = [t for g in groups for t in g.traces]

    def compute(missing: list[Trace]) -> list[np.ndarray]:
        if say:
            say(f"reference log-probs of {len(missing)} responses ({len(traces) - len(missing)} known or repeated)")
        return [s["logp"] for s in completions_stats(reference, missing)]

    arrays = iter(remember(shelf, traces, lambda t: key_of(t.prompt_ids, t.completion_ids), compute, chunk=512))
    for group in groups:
        group.add_column(REFERENCE, [next(arrays) for _ in group.traces])


def data_key(groups: Sequence[Group], held_out: Sequence[Group], *, columns: bool = True) -> str:
    """Hash of encoded data: words, labels and scores, ids and which of them the policy emitted, `columns` (but for the
    reference's log-probs, which follow from the rest), and how much of it is trained on."""
    every = [*groups, *held_out]
    encoded = (key_of(t.prompt_ids, t.completion_ids, t.mask.tolist()) for g in every for t in g.traces)
    held = [[describe(v) for k, v in sorted(g.columns.items()) if columns and k != REFERENCE] for g in every]
    return key_of([], [], data_hash(g.example for g in every), len(groups), *encoded, held)
