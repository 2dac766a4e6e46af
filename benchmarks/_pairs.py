"""The pairs of preference_step.py: real ones, or random ids of the same lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from pertoken.core.data import Group, encode, load_examples
from pertoken.core.examples import Example
from pertoken.core.lm import LM

LONGEST = 640  # tokens of a sequence; longer pairs (2 % of HH) are left out, so that TRL's whole batch fits into memory
# Deciles 0, 10 ... 100 of the tokens of HH's prompts, chosen and rejected responses under SmolLM2's template.
HH = (
    (31, 40, 45, 69, 96, 126, 153, 186, 234, 313, 500),
    (2, 10, 15, 21, 27, 34, 44, 57, 75, 108, 140),
    (2, 10, 15, 21, 27, 34, 44, 56, 71, 103, 140),
)


def draw_pairs(lm: LM, wanted: int, seed: int) -> tuple[list[Group], str]:
    """HH pairs, or generated ones of the same lengths, and what they are."""
    rng = np.random.default_rng(seed)
    folder = os.environ.get("PERTOKEN_DATA")
    if not folder:
        share = np.arange(0, 1.01, 0.1)
        lengths = [tuple(int(np.interp(rng.random(), share, deciles)) for deciles in HH) for _ in range(wanted)]
        return [random_pair(lm, rng, *n) for n in lengths], "generated pairs with the lengths of HH"
    examples = [e for n in ("hh_helpful", "hh_harmless") for e in load_examples(f"{folder}/{n}", kind="pair")[0]]
    groups, _ = encode([examples[i] for i in rng.permutation(len(examples))[: wanted + wanted // 4 + 8]], lm)
    groups = [g for g in groups if longest(g) <= LONGEST][:wanted]
    return groups, "pairs of HH (helpful and harmless)"


def random_pair(lm: LM, rng: np.random.Generator, prompt: int, chosen: int, rejected: int) -> Group:
    """Random ids of these lengths."""
    ids = [rng.integers(100, 40000, n).tolist() for n in (prompt, chosen, rejected)]
    traces = tuple(lm.trace_of_ids(ids[0], response) for response in ids[1:])
    return Group(example=Example(prompt="?", responses=("!", ".")), prompt_ids=tuple(ids[0]), traces=traces)


def longest(group: Group) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(group.prompt_ids) + max(map(len, group.traces))


def by_size(groups: Sequence[Group], batch: int) -> list[Group]:
    """Whole batches, the largest last."""
    batches = [groups[i : i + batch] for i in range(0, len(groups) - batch + 1, batch)]
    batches.sort(key=lambda some: max(map(longest, some)))
    return [g for some in batches for g in some]
