"""What navigation is used for: the probe of the ranking, and chains of thought that vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.decode import generators
from ...core.lm import LM
from ...core.rollout import Sampling
from .completing import Memo, completed, encoded, next_logits, says_something
from .keys import Probed, probed_rows

if TYPE_CHECKING:
    from . import ICN, Layout

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
CHOICE = r"\b[A-E]\b"
SUFFIX = "\n\nThe final answer (only the number) is "


def probe(
    lm: LM,
    instruction: Any,
    judge: Callable[[str], bool],
    clusters_V: np.ndarray,
    layout: Layout,
    *,
    tokens: int = 100,
    first: int = 10,
    sampling: Sampling | None = None,
    chat: bool = False,
    batch: int = 50,
    memo: Memo | None = None,
) -> list[Probed]:
    """Complete each of the first tokens of the ranking after an instruction and an empty list, and judge the answers.

    Args:
        judge: whether an answer is right. clusters_V: of `cluster_keys`.
        tokens: N. first: K, whose clusters are the main ones.
        sampling: of the completions; default: greedy, at most 64 tokens.
    """
    how = sampling or Sampling(temperature=0.0)
    prompt = encoded(lm, instruction, layout.text(()), chat)
    order = np.argsort(-next_logits(lm, prompt), kind="stable")
    firsts = [t for t in map(int, order) if says_something(lm, t)][:tokens]
    ranked = []
    for start in range(0, len(firsts), batch):
        some = firsts[start : start + batch]
        traces = completed(lm, prompt, some, layout.close, how, generators(0, start, len(some)), None, memo)
        ranked += [
            (t, lm.view.piece(t).decode("utf-8"), layout.answer(trace.text))
            for t, trace in zip(some, traces, strict=True)
        ]
    return probed_rows(ranked, clusters_V, first, judge)


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that is given most often; of equals, the one given first; None (no answer) does not vote."""
    count = Counter(a for a in answers if a is not None)  # keeps the order in which they came
    return max(count, key=lambda a: count[a]) if count else None


@dataclass(frozen=True)
class Vote:
    """Chains of thought of a question: their texts, what each says in the end (None: nothing), and the majority's."""

    paths: tuple[str, ...]
    answers: tuple[str | None, ...]
    vote: str | None

    def accuracy(self, gold: str) -> tuple[float, float]:
        """(1.0 if the vote is right, share of the paths that are right)."""
        right = [_plain(a) == _plain(gold) for a in self.answers]
        return float(_plain(self.vote) == _plain(gold)), float(np.mean(right))


def self_consistency(
    lm: LM,
    question: Any,
    icn: ICN,
    *,
    paths: int = 4,
    suffix: str = SUFFIX,
    pattern: str = NUMBER,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Vote:
    """Different ways to solve a question (`ICN(layout=WAYS, per_round=1, scan=100)`), and their vote.

    Args:
        suffix: what asks for the final answer after a path, answered greedily in at most 8 tokens.
        pattern: what an answer looks like; the first match counts (`NUMBER`, `CHOICE`).
        sampling: of the paths; default: greedy, at most 256 tokens.
    """
    how = sampling or Sampling(temperature=0.0, max_new_tokens=256)
    (drawn,) = icn.generate(lm, [question], n=paths, sampling=how, seed=seed)
    texts, answers = [], []
    for path in drawn:
        kept = list(path.trace.completion_ids)
        ends = bool(path.trace.ended) or icn.layout.close in lm.view.piece(kept[-1]).decode("utf-8", "replace")
        kept = kept[:-1] if ends else kept  # without the token that closed the item
        asked = (*path.trace.prompt_ids, *kept, *lm.tokenizer.encode(suffix, add_special_tokens=False))
        asked = asked[max(0, len(asked) + 8 - lm.context) :]
        best = int(next_logits(lm, asked).argmax())
        short = Sampling(temperature=0.0, max_new_tokens=8)
        (end,) = completed(lm, asked, [best], "\n", short, generators(seed, 0, 1))
        found = re.search(pattern, end.text)
        texts.append(path.meta["answer"])
        answers.append(_plain(found.group()) if found else None)
    return Vote(tuple(texts), tuple(answers), majority(answers))


def _plain(answer: str | None) -> str | None:
    """A number without separators and trailing zeros, to compare by; other text as it is."""
    if answer is None:
        return None
    text = answer.strip().replace(",", "").rstrip(".")
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", text) if "." in text else text
