"""Frozen features of whole responses, for the reward models that put a head on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.lm import LM
from ..core.run import completions_stats
from ..core.trace import Trace
from ._logps import same_tokenizer, where


def response_features(
    items: Sequence[Trace],
    lm: LM | None,
    encoder: Callable[[Sequence[str]], np.ndarray] | None = None,
    *,
    prompts: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One forward a response; a prompt that several share is computed once.

    Args:
        items: traces of the model's tokenizer.
        lm: gives the last hidden state at the terminator (`ended`), and that at the prompt's last token.
        encoder: texts -> (N, H), in place of the LM: of prompt and response together, and of the prompt.
        prompts: whether the prompts' own features are wanted.

    Returns:
        Features (N, H) of the responses after their prompts, and of the prompts or None; float32 from an LM.

    Raises:
        ValueError: nothing to compute them with; another tokenizer; a prompt that leaves no room.
    """
    if encoder is not None:
        ends = torch.as_tensor(encoder([t.prompt_text + t.text for t in items]))
        return ends, torch.as_tensor(encoder([t.prompt_text for t in items])) if prompts else None
    if lm is None:
        raise ValueError(
            "the features are hidden states; give lm=core.lm.load(...), encoder=TextEncoder(), or a folder"
        )
    same_tokenizer(lm, items)
    names = ("hidden_end", "hidden_prompt") if prompts else ("hidden_end",)
    found = completions_stats(lm, [ended(t, lm, where(t, i)) for i, t in enumerate(items)], frozenset(names))
    width = int(lm.causal.config.get_text_config().hidden_size)
    arrays = [np.array([s[name] for s in found], np.float32).reshape(-1, width) for name in names]
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]) if prompts else None


def ended(trace: Trace, lm: LM, name: str = "this item") -> Trace:
    """The trace with its terminator last: the token whose state is the embedding. A response that does not fit loses
    its right end, left of the terminator.

    Raises:
        ValueError: the prompt fills the context.
    """
    ids, pieces = trace.completion_ids, trace.completion_pieces
    whole = bool(ids) and (trace.ended or ids[-1] in lm.stop_ids)
    room, said = lm.context - len(trace.prompt_ids) - 1, len(ids) - 1 if whole else len(ids)
    if room < 0:
        raise ValueError(f"the prompt of {name} fills the model's {lm.context} positions; cut it from the left")
    if whole and said <= room:
        return trace
    keep, last = min(said, room), ids[-1] if whole else lm.terminator
    changes: dict[str, Any] = {"emitted": None, "sampled_logps": None, "policy_logps": None, "ended": True}
    return dataclasses.replace(
        trace, completion_ids=(*ids[:keep], last), completion_pieces=(*pieces[:keep], b""), **changes
    )
