"""Token signals: how sure a model was of each token of a completion, computed in one pass and kept on disk by content.

What uncertainty methods, detectors and deferral rules look at. A signal is known by the model's identity, the ids of
prompt and completion, and its own name, so that methods which ask for different ones share what they have in common.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .cache import ArrayCache, key_of, remember
from .completions import completions_stats
from .lm import LM, Prompt
from .packing import evaluating
from .stats import PER_COMPLETION, layers_of
from .trace import Trace

SCALAR = ("logp", "entropy", "margin", "rank", "quantile", "mass", "top1", "top1_logp", "sumsq")
"""Signals of one number a token; the others (``hidden``, ``hidden_all``, ``hidden_end``...) are vectors, which take
room: ask for them where they are needed."""
_VERSION = 1
_CHUNK = {True: 4096, False: 512}


def token_signals(
    lm: LM,
    traces: Sequence[Trace],
    wants: Sequence[str] = ("logp", "entropy", "margin", "rank"),
    *,
    cache: ArrayCache | None = None,
    max_tokens: int = 4096,
) -> list[dict[str, np.ndarray]]:
    """What a model says of every token of completions at temperature 1, whatever they were drawn from.

    A trace beyond the context is looked at in windows that overlap by half (a warning says how many there are): every
    token is seen once, after as much of what stands before it as fits, at least half a context.

    Args:
        lm: the model.
        traces: prompts and completions in its own ids; empty completions are fine.
        wants: names of `stats.Stats`: ``logp`` and ``entropy`` (nats), ``margin`` = log-prob of the likeliest less that
            of the second, ``rank`` (0 is the likeliest), ``hidden``, ``hidden_all``, ``hidden_end``...
        cache: where the signals are kept; default: the usual one.
        max_tokens: of a pack that is computed together.

    Returns:
        For each trace, in order, one array a signal: (T,) float64, or (T, ...) float32 for vectors; (H,) for
        ``hidden_end`` and ``hidden_prompt``. Tokens that the policy did not emit are in it.

    Raises:
        ValueError: another tokenizer, or no such signal.
    """
    for i, trace in enumerate(traces):
        if trace.tokenizer != lm.view.fingerprint:
            raise ValueError(
                f"trace {i} is of another tokenizer than {lm.name or 'the model'}; encode it with lm.trace"
            )
    long = sum(len(t.prompt_ids) + len(t) > lm.context for t in traces)
    if long:
        what = f"{long} of {len(traces)} traces are longer than the {lm.context} tokens of the context"
        warnings.warn(f"{what}; they were looked at in windows that overlap by half", stacklevel=2)
    names = tuple(dict.fromkeys(wants))
    shelf = (cache or ArrayCache()).context({**lm.identity(), "signals": _VERSION})

    def compute(missing: Sequence[tuple[int, str]]) -> list[np.ndarray]:
        # one pass over the traces that lack something, for all that any of them lacks
        lacking = list(dict.fromkeys(i for i, _ in missing))
        asked = frozenset(name for _, name in missing) | {"logp"}
        parts = {i: windows(lm, traces[i]) for i in lacking}
        found = iter(completions_stats(lm, [w for i in lacking for w in parts[i]], asked, max_tokens=max_tokens))
        of = {i: [next(found) for _ in parts[i]] for i in lacking}
        return [_joined(of[i], name).astype(np.float64 if name in SCALAR else np.float32) for i, name in missing]

    flat = remember(
        shelf,
        [(i, name) for i in range(len(traces)) for name in names],
        lambda item: key_of(traces[item[0]].prompt_ids, traces[item[0]].completion_ids, item[1]),
        compute,
        chunk=_CHUNK[all(name in SCALAR for name in names)],
    )
    n = len(names)
    return [dict(zip(names, flat[k * n : k * n + n], strict=True)) for k in range(len(traces))]


def windows(lm: LM, trace: Trace) -> list[Trace]:
    """The trace itself if it fits into the context; else traces whose completions are its completion in parts, after
    what stands before them as far as that fits: half a context, or the whole prompt before the first part."""
    ids, pieces = trace.ids("all"), trace.completion_pieces
    start, end = len(trace.prompt_ids), len(trace.ids("all"))
    if end <= lm.context:
        return [trace]
    out, half = [], lm.context // 2
    first = 0 if start < lm.context else start - half
    while start < end or not out:
        upto = min(first + lm.context, end)
        at = start - len(trace.prompt_ids)
        out.append(lm.trace_of_ids(ids[first:start], ids[start:upto], pieces[at : at + upto - start]))
        start, first = upto, upto - half
    return out


def _joined(parts: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """A signal of a trace from those of its windows; of the whole, the first's or the last's."""
    if name in PER_COMPLETION:
        return parts[0 if name == "hidden_prompt" else -1][name]
    return np.concatenate([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]


class _Enough(Exception):
    """Carries what a layer was given out of a forward pass that need not go on."""


@torch.no_grad()
def prompt_states(lm: LM, prompts: Sequence[Prompt | tuple[int, ...]], layer: int, *, batch: int = 64) -> np.ndarray:
    """Hidden states (N, H), float32, that enter a layer at the last token of each prompt: what the first `layer` layers
    make of it. The layers above are not computed.

    Args:
        prompts: texts, messages, or ids that are encoded already.
        layer: from 1 to the number of layers less one.

    Raises:
        ValueError: no such layer; a prompt beyond the context.
    """
    ids = [p if isinstance(p, tuple) and p and isinstance(p[0], int) else lm.encode_prompt(p) for p in prompts]  # type: ignore[arg-type]
    long = [i for i, p in enumerate(ids) if len(p) > lm.context]
    if long:
        raise ValueError(f"prompt {long[0]} has {len(ids[long[0]])} tokens, more than the {lm.context} of the context")
    order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [np.zeros(0)] * len(ids)
    with lm.active() as causal, evaluating(causal):
        layers = list(layers_of(causal))
        if not 1 <= layer < len(layers):
            raise ValueError(f"layer={layer} of {len(layers)}: give one from 1 to {len(layers) - 1}")

        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Enough(args[0] if args else kwargs["hidden_states"])

        hook = layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for start in range(0, len(order), batch):
                some = order[start : start + batch]
                width = max(len(ids[i]) for i in some)
                rows = torch.tensor([[0] * (width - len(ids[i])) + list(ids[i]) for i in some], device=lm.device)
                real = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in some], device=lm.device)
                position = (real.cumsum(1) - 1).clamp(min=0)
                try:
                    causal.base_model(input_ids=rows, attention_mask=real, position_ids=position, use_cache=False)
                except _Enough as enough:
                    for i, state in zip(some, enough.args[0][:, -1].float().cpu().numpy(), strict=True):
                        out[i] = state
        finally:
            hook.remove()
    return np.stack(out) if out else np.zeros((0, 0), np.float32)
