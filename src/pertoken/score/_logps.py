"""Log-probs of completions under one or more models, prompts that several completions share computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..core.lm import LM, same_vocabulary
from ..core.packing import Cost, pack
from ..core.stats import Needs, token_stats
from ..core.trace import Trace

_MAX_TOKENS = 4096  # positions a forward


def completion_logps(models: Mapping[str, LM], traces: Sequence[Trace]) -> dict[str, list[np.ndarray]]:
    """Log-prob of every completion token, without gradients.

    Args:
        models: by name, of one tokenizer.
        traces: of that tokenizer; empty completions are fine.

    Returns:
        For each model one float64 array (T,) a trace, in order; 0 on tokens that the policy did not emit.

    Raises:
        ValueError: another tokenizer; an emitted token whose log-prob is not finite (says which).
    """
    first, *rest = models.values()
    for other in rest:
        same_vocabulary(first, other)
    same_tokenizer(first, traces)
    index, packs = [], []
    stretches = _stretches(traces)
    if stretches:
        packs = pack([[traces[i] for i in s] for s in stretches], cost=Cost.of(first.causal), max_tokens=_MAX_TOKENS)
        index = [[stretches[g][k] for g, k in p.order] for p in packs]
    needs = Needs({name: frozenset({"logp"}) for name in models})
    out = {name: [np.zeros(len(trace)) for trace in traces] for name in models}
    for items, layout in zip(index, packs, strict=True):
        with torch.no_grad():
            stats = token_stats(models, layout, needs)
        for name in models:
            rows = stats[name].logp_NT.double().cpu().numpy()
            for i, row in zip(items, rows, strict=True):
                out[name][i] = _finite(np.where(traces[i].mask, row[: len(traces[i])], 0.0), traces[i], i, name)
    return out


def same_tokenizer(lm: LM, traces: Sequence[Trace]) -> None:
    """Check that a model can read the ids of traces.

    Raises:
        ValueError: it cannot.
    """
    for i, trace in enumerate(traces):
        if trace.tokenizer != lm.view.fingerprint:
            raise ValueError(
                f"{where(trace, i)} is of tokenizer {trace.tokenizer}, {lm.name or 'the scorer'} has "
                f"{lm.view.fingerprint}; encode the text with the scorer's (lm.trace), then move the credit with Credit.to"
            )


def where(trace: Trace, i: int) -> str:
    """A name for a trace in an error: the row of the data it came from, if it knows."""
    return f"row {trace.meta['row']}" if "row" in trace.meta else f"item {i}"


def _stretches(traces: Sequence[Trace]) -> list[list[int]]:
    """Indices of the traces with tokens, those of one prompt together, as many as fit a forward."""
    of_prompt: dict[tuple[int, ...], tuple[list[int], int]] = {}
    out = []
    for i, trace in enumerate(traces):
        if not len(trace):
            continue
        size = len(trace.prompt_ids) + len(trace)
        members, used = of_prompt.get(trace.prompt_ids, ([], _MAX_TOKENS))
        if used + size > _MAX_TOKENS:
            members, used = [], 0
            out.append(members)
        members.append(i)
        of_prompt[trace.prompt_ids] = members, used + size
    return out


def _finite(values: np.ndarray, trace: Trace, i: int, name: str) -> np.ndarray:
    if np.isfinite(values).all():
        return values
    t = int(np.flatnonzero(~np.isfinite(values))[0])
    raise ValueError(
        f"log-prob of token {t} of {where(trace, i)} under {name} is {values[t]}; do not mask the vocabulary of a scorer"
    )
