"""ICN: list what has been found so far, and the model says which first tokens lead to something else.

In-context navigation (Correlation and Navigation in the Vocabulary Key Representation Space of Language Models; Peng,
An, Shang; ICLR 2025, arXiv 2410.02284). The logits q(context) . k_v have fixed keys k_v, so tokens whose keys are
neighbours rank together, whatever they mean. A numbered list of what is known moves q away from there:

    explored = [], probed = {}
    each round: rank tokens after   instruction + explored as a list + an open item;
                the first m that are not in probed join it, and each is completed up to the closing quote;
                non-empty answers that are not listed yet join explored

`reg`: completions follow the INITIAL prompt (empty list, item 1), so that the list only chooses first tokens. Without
`navigate` the list stays empty: first tokens down the ranking. `self_consistency` lists different ways to solve a
question and votes; `probe` shows which tokens rank high only by their neighbours (`correlation_table`).

Ours, not the paper's: `per_cluster` (at most c first tokens of one cluster of keys) and `penalty` (logit - lambda * the
greatest cosine to the keys of earlier first tokens).

Differs from the authors' code: first tokens are kept apart by id, not by decoded text (bytes that form no character
would be equal); ids that are no valid UTF-8 alone, or stand for no text, are not probed; the first token's id is
appended to the prompt, whose text is not tokenized again with it; an answer is listed once; long lists lose their
oldest items; the templates of tasks are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...core.decode import Drawn, Stream, Streamed, generators
from ...core.lm import LM, Prompt
from ...core.rollout import Sampling
from .completing import Memo, completed, encoded, next_logits, says_something
from .keys import cluster_keys, correlation_table, keys, mean_precision, normalised, permutation_p, unit_rows
from .uses import Probed, Vote, majority, probe, self_consistency

__all__ = [
    "ICN",
    "WAYS",
    "Layout",
    "Memo",
    "Probed",
    "Vote",
    "cluster_keys",
    "correlation_table",
    "keys",
    "majority",
    "mean_precision",
    "normalised",
    "permutation_p",
    "probe",
    "self_consistency",
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a list is written."""

    head: str = "\n\nAnswer:\n"
    """Between instruction and list."""
    item: str = '{i}. "'
    """Before an item."""
    close: str = '"'
    """A token with this in it ends an item."""
    between: str = '"\n'
    """After an item that is listed."""
    closed: bool = True
    """An item that was not closed is nothing; else it is what there is of it."""
    given: tuple[str, ...] = ()
    """Items that the list begins with."""

    def answer(self, text: str) -> str:
        """What a completion says: the text before what closes the item, without white space around it."""
        before, close, _ = text.partition(self.close)
        return before.strip() if close or not self.closed else ""

    def text(self, explored: Sequence[str]) -> str:
        """The list, with an open item at its end."""
        items = [*self.given, *explored]
        listed = "".join(self.item.format(i=i + 1) + text + self.between for i, text in enumerate(items))
        return self.head + listed + self.item.format(i=len(items) + 1)


WAYS = Layout(head="\n\n", item="### Way {i}:\n* **Step 1:**", close="#", between="\n\n", closed=False)
"""Chains of thought as a list."""


@dataclass(frozen=True, kw_only=True)
class ICN:
    """Decoder: n different answers to an instruction."""

    per_round: int = 10
    """m, new items a round."""
    reg: bool = True
    """Complete from the initial prompt; else from the list."""
    navigate: bool = True
    """List what is explored; False: always the empty list (the baseline)."""
    layout: Layout = field(default_factory=Layout)
    """How the list is written."""
    chat: bool = False
    """The instruction is a turn of the chat template, and the list begins the reply; else all is one plain text."""
    scan: int = 0
    """N: look no further down the ranking (0: all of it)."""
    longest: int = 80
    """Characters of an item in the list."""
    per_cluster: int = 0
    """c: at most so many first tokens of a cluster of keys (0: any number). Ours."""
    clusters: int = 1024
    """Clusters of `per_cluster`."""
    penalty: float = 0.0
    """lambda of the cosine to the keys of earlier first tokens. Ours."""

    def __post_init__(self) -> None:
        counts = min(self.per_round, self.longest) >= 1 and min(self.scan, self.per_cluster) >= 0
        if not (counts and 0 <= self.penalty < np.inf):
            raise ValueError(f"{self}: per_round, longest >= 1; scan, per_cluster, penalty >= 0 are needed")

    def context(self, lm: LM, prompt: Any, explored: Sequence[str], room: int) -> tuple[int, ...]:
        """Ids of instruction and list with an open item; the oldest items are left out until `room` ids are free.

        Raises:
            ValueError: the instruction alone takes too much.
        """
        items = [text[: self.longest] for text in explored]
        while True:
            ids = encoded(lm, prompt, self.layout.text(items), self.chat)
            if len(ids) + room <= lm.context:
                return ids
            if not items:
                raise ValueError(
                    f"the prompt takes {len(ids)} of {lm.context} positions and {room} are to follow; cut it"
                )
            items = items[1:]

    def first_tokens(self, lm: LM, logits_V: np.ndarray, probed: Sequence[int], m: int) -> list[tuple[int, int]]:
        """The next m first tokens and their ranks (from 1, by logit); fewer, where `scan` or the vocabulary ends.

        Args:
            probed: ids that were taken already.
        """
        order = np.argsort(-logits_V, kind="stable")
        rank = np.empty(len(order), int)
        rank[order] = np.arange(1, len(order) + 1)
        if self.scan:
            order = order[: self.scan]
        groups = cluster_keys(lm, self.clusters) if self.per_cluster else None
        unit = unit_rows(keys(lm)) if self.penalty else None
        out: list[tuple[int, int]] = []
        known = set(probed)
        full = Counter(int(groups[t]) for t in known) if groups is not None else Counter[int]()
        near = (unit @ unit[sorted(known)].T).max(1) if unit is not None and known else None

        def fits(token: int) -> bool:
            open_cluster = groups is None or full[int(groups[token])] < self.per_cluster
            return token not in known and open_cluster and says_something(lm, token)

        while len(out) < m:
            ranking = (
                order
                if near is None
                else order[np.argsort(self.penalty * near[order] - logits_V[order], kind="stable")]
            )
            new = next((t for t in map(int, ranking) if fits(t)), None)
            if new is None:
                break
            out.append((new, int(rank[new])))
            known.add(new)
            if groups is not None:
                full[int(groups[new])] += 1
            if unit is not None:
                near = unit @ unit[new] if near is None else np.maximum(near, unit @ unit[new])
        return out

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
        memo: Memo | None = None,
    ) -> list[list[Drawn]]:
        """n answers to each instruction, each from another first token; greedy by default, at most 64 tokens.

        Args:
            sampling: of what follows the first token. memo: greedy completions that may be taken from there, and are
                put there (with `reg`, all arms complete a first token alike).

        Returns:
            Each trace has the context it followed as its prompt, and the first token in its completion. ``meta``:
            ``answer`` (empty: the first token closed the item), ``round``, ``rank`` and ``first`` (text) of the first
            token, ``listed`` (whether it was new).

        Raises:
            ValueError: fewer first tokens than n; a prompt too long.
        """
        how = sampling or Sampling(temperature=0.0)
        if n < 1:
            raise ValueError(f"n={n}: ask for 1 answer or more")
        out = []
        for i, prompt in enumerate(prompts):
            initial = self.context(lm, prompt, (), how.max_new_tokens)
            explored: list[str] = []
            known: set[str] = {normalised(g) for g in self.layout.given}
            probed: list[int] = []
            drawn: list[Drawn] = []
            draws, rounds = generators(seed, i, n), 0
            while len(drawn) < n:
                here = self.context(lm, prompt, explored if self.navigate else (), how.max_new_tokens)
                new = self.first_tokens(lm, next_logits(lm, here), probed, min(self.per_round, n - len(drawn)))
                if not new:
                    raise ValueError(
                        f"only {len(drawn)} of {n} first tokens can be probed; ask for fewer answers, or raise scan, "
                        "per_cluster or clusters"
                    )
                start = initial if self.reg else here
                probed += [token for token, _ in new]
                numbers = range(len(drawn), len(drawn) + len(new))
                firsts = [token for token, _ in new]
                chance = [draws[k] for k in numbers]
                traces = completed(
                    lm, start, firsts, self.layout.close, how, chance, _relayed(stream, i, numbers), memo
                )
                for k, trace, (token, rank) in zip(numbers, traces, new, strict=True):
                    answer = self.layout.answer(trace.text)
                    fresh = bool(answer) and normalised(answer) not in known
                    meta = {"answer": answer, "round": rounds, "rank": rank, "listed": fresh}
                    meta |= {"first": lm.view.piece(token).decode("utf-8")}
                    place = trace.sampling | {"seed": seed, "place": [i, k]}
                    drawn.append(Drawn(replace(trace, sampling=place, meta={"prompt": prompt}), meta=meta))
                    if fresh:
                        known.add(normalised(answer))
                        explored.append(answer)
                rounds += 1
            out.append(drawn)
        return out


def _relayed(stream: Stream | None, prompt: int, numbers: Sequence[int]) -> Stream | None:
    """A stream of one round, told with its place in the whole."""
    if stream is None:
        return None
    return lambda s: stream(Streamed(prompt, numbers[s.sample], s.token, s.piece, s.ended))
