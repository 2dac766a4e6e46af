"""Preference pairs out of scored candidates, as indices: whoever holds token ids keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """A pair: which prompt, which of its rewrites is best and which worst, and their scores."""

    prompt: int
    best: int
    worst: int
    scores: tuple[float, float]


def choose_pairs(
    prompts: Sequence[str],
    rewrites: Sequence[Sequence[str]],
    scorer: Callable[[str, Sequence[str]], Sequence[float]],
    margin: float = 0.0,
) -> tuple[list[Choice], dict[str, int]]:
    """The best and the worst rewrite of each prompt, by any scorer (of images rendered from them, in the paper).

    Args:
        prompts: N texts. rewrites: of each, any number. margin: least difference of a pair.
        scorer: a prompt and its rewrites -> one score each; the first of equals wins, equal scores make no pair.

    Returns:
        The pairs, by index, so that whoever holds ids keeps them; how many rewrites (``empty``, ``score not finite``)
        and prompts (``margin``) gave nothing.
    """
    found, lost = [], dict.fromkeys(("empty", "score not finite", "margin"), 0)
    for i, (prompt, said) in enumerate(zip(prompts, rewrites, strict=True)):
        full = [k for k, text in enumerate(said) if text.strip()]
        scores = [float(s) for s in scorer(prompt, [said[k] for k in full])] if full else []
        finite = [(k, s) for k, s in zip(full, scores, strict=True) if math.isfinite(s)]
        lost["empty"] += len(said) - len(full)
        lost["score not finite"] += len(full) - len(finite)
        (best, high), (worst, low) = (pick(finite, key=lambda one: one[1], default=(0, 0.0)) for pick in (max, min))
        if high > low and high - low >= margin:
            found.append(Choice(i, best, worst, (high, low)))
        else:
            lost["margin"] += 1
    return found, lost
