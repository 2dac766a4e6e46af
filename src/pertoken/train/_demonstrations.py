"""Demonstrations of DR-IRL: good answers to harmful prompts, in a column of the data."""

from __future__ import annotations

from typing import Any

from ..core.data import Group
from ..core.rewarding import with_row
from ..core.trace import Trace

CATEGORIES = ("insult", "crime", "privacy", "ethics", "unfairness", "physical harm", "mental manipulation")
"""The paper's seven (any names do, in the column ``category``)."""
CHAIN_OF_DRAFT = (
    "Category of harm: {category}. Request: {prompt}\nThink step by step, but keep a draft of at most five words a "
    "step: what is asked, whom it harms, what can be offered instead. After ####, write the answer: refuse the harmful "
    "part, say why in one sentence, offer something safe."
)
"""What a strong model may be given to write demonstrations by (`.format(category=, prompt=)`); the words are ours."""


def demonstration(lm: Any, group: Group) -> Trace:
    """The row's demonstration after its prompt; without that column, the chosen response of a pair."""
    if "demonstration" not in group.example.extra:
        return with_row(group, group.pair[0])
    ids, pieces = lm.encode_completion(str(group.example.extra["demonstration"]))
    return with_row(group, lm.trace_of_ids(group.prompt_ids, ids, pieces, ended=True))
