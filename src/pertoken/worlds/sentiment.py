"""The sentiment world: short replies about films, a lexicon as reward, and lexicon words as known token credit.

Prompts are written by us (no word of theirs is in VADER's lexicon); completions are sampled by the caller; the reward
and the labels come in as callables (`pertoken.score.vader.compound` and `lexicon_labels`), since a world knows no room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files

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
