"""What the scorers that compare two models ask of them: log-probs of completions, and joint functions of the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..core.lm import LM, same_vocabulary
from ..core.packing import Cost, pack
from ..core.run import completions_stats
from ..core.stats import Joint, Needs, token_stats
from ..core.trace import Trace

_TOGETHER = 16  # completions of one prompt that share its forward


def completion_logps(models: Mapping[str, LM], traces: Sequence[Trace]) -> dict[str, list[np.ndarray]]:
    """Log-prob of every completion token, without gradients; a prompt that completions share is computed once.

    Args:
        models: by name, of one tokenizer.
        traces: of that tokenizer; empty completions are fine.

    Returns:
        For each model one float64 array (T,) a trace, in order; 0 on tokens that the policy did not emit.

    Raises:
        ValueError: another tokenizer; a trace beyond the context; an emitted token whose log-prob is not finite (says
            which).
    """
    first, *rest = models.values()
    for other in rest:
        same_vocabulary(first, other)
    same_tokenizer(first, traces)
    for name, lm in models.items():
        for i, trace in enumerate(traces):
            if (size := len(trace.prompt_ids) + len(trace)) > lm.context:
                raise ValueError(
                    f"prompt and response of {where(trace, i)} take {size} tokens, more than the {lm.context} of the "
                    f"context of {name}; cut the prompt (max_length), or take a scorer with a longer context"
                )
    out: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for name, lm in models.items():
        for i, stats in enumerate(completions_stats(lm, traces)):
            values = np.where(traces[i].mask, stats["logp"], 0.0)
            if not np.isfinite(values).all():
                t = int(np.flatnonzero(~np.isfinite(values))[0])
                raise ValueError(
                    f"the log-prob of token {t} of {where(traces[i], i)} under {name} is {values[t]}; "
                    "do not mask the vocabulary of a scorer"
                )
            out[name].append(values)
    return out


@torch.no_grad()
def completion_joint(models: Mapping[str, LM], traces: Sequence[Trace], joint: Joint) -> list[dict[str, np.ndarray]]:
    """What a function of several models' logits says of every completion token; it runs inside the chunk.

    Args:
        models: by name, of one tokenizer and vocabulary.
        traces: of that tokenizer; empty completions are fine.
        joint: ({name: logits (chunk, V)}, ids (chunk,)) -> {statistic: (chunk,)}, as `stats.Needs` takes them.

    Returns:
        For each trace, in order, one float64 array (T,) a statistic; tokens that the policy did not emit are in it.

    Raises:
        ValueError: another tokenizer, or vocabularies of different sizes.
    """
    first, *rest = models.values()
    for other in rest:
        same_vocabulary(first, other)
    same_tokenizer(first, traces)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, trace in enumerate(traces):
        by_prompt.setdefault(trace.prompt_ids, []).append(i)
    indices = [some[i : i + _TOGETHER] for some in by_prompt.values() for i in range(0, len(some), _TOGETHER)]
    needs = Needs({name: frozenset({"logp"}) for name in models}, {"joint": joint})
    out: list[dict[str, np.ndarray]] = [{} for _ in traces]
    with first.active() as causal:
        cost = Cost.of(causal)
    for packed in pack([[traces[i] for i in some] for some in indices], cost=cost):
        extra = next(iter(token_stats(models, packed, needs).values())).extra
        arrays = {name: values.double().cpu().numpy() for name, values in extra.items()}
        for row, (g, k) in enumerate(packed.order):
            i = indices[g][k]
            out[i] = {name: a[row, : len(traces[i])].copy() for name, a in arrays.items()}
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
                f"{lm.view.fingerprint}; encode the text with the scorer's (lm.trace), move its credit by Credit.to"
            )


def where(trace: Trace, i: int) -> str:
    """A name for a trace in an error: the row of the data it came from, if it knows."""
    return f"row {trace.meta['row']}" if "row" in trace.meta else f"item {i}"
