"""The sentiment world: short replies about films, a lexicon as reward, and lexicon words as known token credit.

Prompts are written by us (no word of theirs is in VADER's lexicon); completions are sampled by the caller; the reward
and the labels come in as callables (`pertoken.score.vader.compound` and `lexicon_labels`), since a world knows no room.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from pertoken.core.trace import Trace

SYSTEM_PROMPT = "You are a film critic. Give your honest opinion, good or bad, in one short sentence."
_TRAIN_PERCENT = 75


def prompts() -> dict[str, list[str]]:
    """The world's prompts, split by a hash of their text: adding one never moves another across.

    Returns:
        ``{"train": [...], "test": [...]}``, about 75 to 25, each in the order of the file.
    """
    lines = (files("pertoken.worlds") / "sentiment_prompts.txt").read_text(encoding="utf8").splitlines()
    split: dict[str, list[str]] = {"train": [], "test": []}
    for line in lines:
        bucket = int(hashlib.sha256(line.encode("utf8")).hexdigest(), 16) % 100
        split["train" if bucket < _TRAIN_PERCENT else "test"].append(line)
    return split


def messages(prompt: str) -> list[dict[str, str]]:
    """A prompt as a chat for an instruction-tuned model: the world's system prompt, then the user's turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]


def pairs(
    traces_by_prompt: Sequence[Sequence[Trace]],
    reward: Callable[[str], float],
    *,
    margin: float = 0.3,
    prompts: Sequence[str] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Preference pairs: the best and the worst of the samples of each prompt.

    Args:
        traces_by_prompt: G sampled traces for each prompt. Empty replies and rewards that are not finite are left out.
        reward: score of a completion's text.
        margin: least difference of score; a prompt whose samples lie closer gives no pair.
        prompts: the prompts as the user wrote them, one a group (default: the traces' own prompt text, in which a chat
            template has left the names of the roles).

    Returns:
        rows: ``prompt``, ``chosen``, ``rejected`` (texts), ``score_chosen``, ``score_rejected``, and the traces
        ``chosen_trace``, ``rejected_trace``, so that ids never have to be made from text again.
        report: ``prompts``, ``pairs``, ``margin``, ``skipped`` (prompts, by reason), ``dropped`` (samples, by reason),
        ``mean_score`` of the samples kept.

    Raises:
        ValueError: another number of prompts than of groups.
    """
    if prompts is not None and len(prompts) != len(traces_by_prompt):
        raise ValueError(f"{len(prompts)} prompts for {len(traces_by_prompt)} groups of traces; give one a group")
    rows, skipped, dropped, kept = [], Counter(), Counter(), []
    for i, group in enumerate(traces_by_prompt):
        scored: list[tuple[float, Trace]] = []
        for trace in group:
            score = float(reward(trace.text)) if trace.text.strip() else None
            if score is None:
                dropped["empty"] += 1
            elif not math.isfinite(score):
                dropped["score not finite"] += 1
            else:
                scored.append((score, trace))
        kept += [score for score, _ in scored]
        if len(scored) < 2:
            skipped["fewer than two samples"] += 1
            continue
        # Of equal scores the first sample wins on both ends, so the pair does not depend on how a sort breaks ties.
        high, chosen = max(scored, key=lambda pair: pair[0])
        low, rejected = min(scored, key=lambda pair: pair[0])
        if high == low or high - low < margin:
            skipped["scores closer than the margin"] += 1
            continue
        rows.append(
            {
                "prompt": prompts[i] if prompts is not None else chosen.prompt_text,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "score_chosen": high,
                "score_rejected": low,
                "chosen_trace": chosen,
                "rejected_trace": rejected,
            }
        )
    report = {
        "prompts": len(traces_by_prompt),
        "pairs": len(rows),
        "margin": margin,
        "skipped": dict(skipped),
        "dropped": dict(dropped),
        "mean_score": float(np.mean(kept)) if kept else float("nan"),
    }
    return rows, report


def lexicon_truth(trace: Trace, labels: Callable[[str], Sequence[tuple[int, int, int]]]) -> np.ndarray:
    """Which completion tokens carry sentiment: the ground truth of this world.

    Args:
        trace: T completion tokens.
        labels: byte spans of a text with +1 or -1 (`pertoken.score.vader.lexicon_labels`).

    Returns:
        int8 of shape (T,): +1, -1, or 0 for neutral tokens and those the policy did not emit. A token that touches two
        words takes the sign of the one it shares more bytes with.
    """
    text = b"".join(trace.completion_pieces).decode("utf-8", "surrogateescape")  # keeps byte offsets true
    spans = trace.spans()
    shared = np.zeros(len(trace), np.int64)
    for start, end, sign in labels(text):
        shared += sign * np.clip(np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start), 0, None)
    return (np.sign(shared) * trace.mask).astype(np.int8)
