"""What decoders that join several models ask of them: ids that mean the same, heads of one width, own templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.decode import LMGuide
from ..core.lm import LM


def as_wide(logw: Tensor, width: int) -> Tensor:
    """Log-weights cut to `width` ids, or with weight 0 for those that are missing."""
    return F.pad(logw[:, :width], (0, max(0, width - logw.shape[-1])), value=-torch.inf)


def same_ids(lm: LM, arm: LM) -> None:
    """Check that the ids which two models share mean the same tokens (sizes may differ: heads are padded).

    Raises:
        ValueError: they do not.
    """
    if lm.view.fingerprint == arm.view.fingerprint:
        return
    mine, theirs = ({i: token for token, i in m.tokenizer.get_vocab().items()} for m in (lm, arm))
    shared = mine.keys() & theirs.keys()
    wrong = min((i for i in shared if mine[i] != theirs[i]), default=None)
    if wrong is not None or not shared:
        at = f": id {wrong} is {mine[wrong]!r} in one, {theirs[wrong]!r} in the other" if wrong is not None else ""
        raise ValueError(
            f"{lm.name or 'the base'} and {arm.name or 'the reward model'} have different tokenizers{at}; train the "
            "reward model from a checkpoint of the base's family"
        )


def in_template(lm: LM, template: str) -> Callable[[Any], tuple[int, ...]]:
    """A function from a prompt (text, or one message) to its ids in a template of a model's own.

    Raises:
        ValueError: the template has no place for the prompt; the function's, for a prompt that is not one text.
    """
    if "{prompt}" not in template:
        raise ValueError(f"template {template!r} does not say where the prompt goes; write {{prompt}} there")
    plain = LM(lm.model, lm.tokenizer, name=lm.name, template="plain", adapter_off=lm.adapter_off)

    def ids(prompt: Any) -> tuple[int, ...]:
        text = prompt if isinstance(prompt, str) else None
        if text is None and len(prompt) == 1 and isinstance(prompt[0], dict):
            text = prompt[0]["content"]
        if text is None:
            raise ValueError("a template takes one text; give prompts as text, or leave templates out")
        return plain.encode_prompt(template.replace("{prompt}", text))

    return ids


def refuse_unreadable(guide: LMGuide, prompt: Any, room: int, what: str) -> None:
    """Check that a model can read a prompt and `room` tokens after it.

    Raises:
        ValueError: they take more positions than it has; the prompt has ids beyond its vocabulary.
    """
    ids, name = guide.ids(prompt), guide.lm.name or "a reward model"
    if len(ids) + room > guide.lm.context:
        raise ValueError(
            f"{what} and its answer may take {len(ids) + room} of {guide.lm.context} positions of {name}; lower "
            "max_new_tokens, or cut the prompt"
        )
    if max(ids) >= guide.vocabulary:
        raise ValueError(
            f"{what} has id {max(ids)}, and {name} only {guide.vocabulary}; give the prompt as text, and {name} a "
            "template of its own"
        )
