"""Log-probs of completions for the scorers that compare two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..core.lm import LM, same_vocabulary
from ..core.run import completions_stats
from ..core.trace import Trace


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
