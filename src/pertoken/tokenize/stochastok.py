"""StochasTok — random splits of tokens into two of the same vocabulary, so that a model sees how words are spelled.

Sims, Foster, Kaleb, Nguyen, Lee, Foerster, Teh, Lu, "StochasTok: Improving Fine-Grained Subword Understanding in LLMs",
ICLR 2026, arXiv 2506.01687. Of the vocabulary as bytes, once:

    expansions[v] = [(a, b): bytes(a) + bytes(b) = bytes(v)], shortest a first; no special or added tokens

Expand n ids: int(n p) tries; each picks a position uniformly in the sequence as it is then; a token with expansions
becomes one of them, uniformly, else the try is lost. Pieces may be split again. The bytes never change, nor does the
tokenizer or inference. p is `proportion` (default 0.1); text grows by about p times the share that can be split.

Expansion is on ids, so it works on a list, on a trace (its masks and recorded values are dealt with) and, by `groups`,
on the data of any training run; `epoch` gives new splits (the release expands once, offline).

Differs from the authors' code: one seeded generator an example; tokens without a split are left alone and counted
(there: an assertion); where two ids say the same bytes, the one that is not a raw byte of a fallback is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..core.bytes import ByteView, byte_view
from ..core.data import Group
from ..core.trace import Trace

Pairs = Mapping[int, tuple[tuple[int, int], ...]]


def expansions(pieces: Mapping[int, bytes]) -> dict[int, tuple[tuple[int, int], ...]]:
    """Every way to split each token in two, by id; tokens without one are left out.

    Args:
        pieces: bytes of every id that may be used; of ids that say the same, the first given is made.
    """
    ids: dict[bytes, int] = {}
    for token, piece in pieces.items():
        ids.setdefault(piece, token)
    out = {}
    for token, piece in pieces.items():
        halves = ((ids.get(piece[:j]), ids.get(piece[j:])) for j in range(1, len(piece)))
        pairs = tuple((a, b) for a, b in halves if a is not None and b is not None)
        if pairs:
            out[token] = pairs
    return out


def expand(
    ids: Sequence[int], pairs: Pairs, proportion: float, rng: np.random.Generator, cap: int | None = None
) -> tuple[list[int], list[int]]:
    """Split tokens at random.

    Args:
        pairs: of `expansions`.
        proportion: p; above 1 is legal. cap: most splits.

    Returns:
        The new ids, and for each the place among `ids` that it comes from.

    Raises:
        ValueError: a negative or infinite `proportion`, a negative `cap`.
    """
    if not 0 <= proportion < np.inf or (cap is not None and cap < 0):
        raise ValueError(f"proportion={proportion} and cap={cap}: give 0 (no split) or more")
    # Which token is drawn does not depend on order: new pieces go to the end of the list, a chain keeps the order.
    tokens, comes_from = list(ids), list(range(len(ids)))
    after = [*range(1, len(ids)), -1] if ids else []
    splits = 0
    for _ in range(int(len(ids) * proportion)):
        if splits == cap:
            break
        place = int(rng.integers(len(tokens)))
        options = pairs.get(tokens[place])
        if not options:
            continue
        tokens[place], right = options[int(rng.integers(len(options)))]
        after.append(after[place])
        after[place] = len(tokens)
        tokens.append(right)
        comes_from.append(comes_from[place])
        splits += 1
    out, origins, place = [], [], 0 if ids else -1
    while place >= 0:
        out.append(tokens[place])
        origins.append(comes_from[place])
        place = after[place]
    return out, origins


@lru_cache(maxsize=8)
def _known(view: ByteView) -> tuple[Pairs, int]:
    """Expansions of a tokenizer, and how many tokens of several bytes have none."""
    raw = lambda token: str(view.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")
    added = getattr(view.tokenizer, "added_tokens_decoder", {})  # special or not (a chat's <tool_call>): one by name
    usable = [i for i in sorted(view.tokenizer.get_vocab().values()) if i not in {*view.special_ids, *added}]
    usable = [i for i in usable if view.piece(i)]
    usable.sort(key=raw)  # stable: raw bytes of a fallback come last
    pieces = {i: view.piece(i) for i in usable}
    pairs = expansions(pieces)
    return pairs, sum(len(piece) > 1 and i not in pairs for i, piece in pieces.items())


@dataclass(frozen=True, kw_only=True)
class StochasTok:
    """Options of StochasTok."""

    proportion: float = 0.1
    """p, tries a token."""
    cap: int | None = None
    """Most splits of a sequence."""
    prompts: bool = True
    """Expand prompts of training data, too."""
    seed: int = 0
    """With the epoch, the row and the sequence, decides every split."""

    def __post_init__(self) -> None:
        if not 0 <= self.proportion < np.inf or (self.cap is not None and self.cap < 0) or self.seed < 0:
            raise ValueError(f"{self}: proportion, cap and seed must be 0 or more")

    def report(self, tokenizer: Any) -> dict[str, float]:
        """What can be split: ``tokens`` of several bytes, how many of them ``without_split``, ``splits`` a token."""
        pairs, without = _known(byte_view(tokenizer))
        mean = float(np.mean([len(p) for p in pairs.values()])) if pairs else 0.0
        return {"tokens": float(len(pairs) + without), "without_split": float(without), "splits": mean}

    def expand(self, ids: Sequence[int], tokenizer: Any, *key: int) -> tuple[list[int], list[int]]:
        """`expand` with these options; `key`: whatever tells this sequence from others (row, epoch)."""
        rng = np.random.default_rng([self.seed, *key])
        return expand(ids, _known(byte_view(tokenizer))[0], self.proportion, rng, self.cap)

    def pieces(self, texts: Sequence[str], tokenizer: Any) -> list[list[bytes]]:
        """The pieces of texts, as a model that is trained with this method may see them."""
        view, out = byte_view(tokenizer), []
        for number, text in enumerate(texts):
            ids, _ = self.expand(view.pieces_of_text(text)[0], tokenizer, number)
            out.append(list(view.pieces(ids, at_start=True)))
        return out

    def trace(self, trace: Trace, tokenizer: Any, *key: int, prompt_ids: tuple[int, ...] | None = None) -> Trace:
        """The same completion in smaller pieces: each inherits whether the policy emitted it. Recorded log-probs are
        dropped, as they were of other tokens.

        Args:
            prompt_ids: put this prompt (of the same text) in place of the trace's.

        Raises:
            ValueError: a trace of another tokenizer.
        """
        view = byte_view(tokenizer)
        if trace.tokenizer != view.fingerprint:
            raise ValueError(f"the trace is of tokenizer {trace.tokenizer}, not of {view.fingerprint}: give its own")
        ids, origins = self.expand(trace.completion_ids, tokenizer, *key)
        own: list[list[bytes]] = [[] for _ in trace.completion_ids]
        for token, origin in zip(ids, origins, strict=True):
            own[origin].append(view.piece(token))
        pieces: list[bytes] = []
        for whole, some in zip(trace.completion_pieces, own, strict=True):
            # cut from the text, which may lack the space that the first piece begins with: from the end, therefore
            parts = []
            for piece in reversed(some[1:]):
                at = max(len(whole) - len(piece), 0)
                parts.append(whole[at:])
                whole = whole[:at]
            pieces += [whole, *reversed(parts)]
        emitted = None if trace.emitted is None else tuple(trace.emitted[o] for o in origins)
        asked = trace.prompt_ids if prompt_ids is None else prompt_ids
        return dataclasses.replace(
            trace,
            prompt_ids=asked,
            prompt_pieces=trace.prompt_pieces if prompt_ids is None else view.pieces(asked, at_start=True),
            completion_ids=tuple(ids),
            completion_pieces=tuple(pieces),
            emitted=emitted,
            sampled_logps=None,
            policy_logps=None,
        )

    def groups(self, groups: Sequence[Group], tokenizer: Any, epoch: int = 0) -> list[Group]:
        """Training data with split tokens: prompts (one split a group, as its completions share it) and completions.

        Raises:
            ValueError: a group with columns a token, which belong to the old tokens (expand before preparation).
        """
        out = []
        for number, group in enumerate(groups):
            listed = [entry for column in group.columns.values() if isinstance(column, list) for entry in column]
            if any(np.ndim(entry) for entry in listed):
                raise ValueError(f"row {group.example.row} has columns of its tokens; expand data before preparation")
            prompt = group.prompt_ids
            if self.prompts:
                prompt = tuple(self.expand(prompt, tokenizer, epoch, number, 0)[0])
            traces = tuple(
                self.trace(t, tokenizer, epoch, number, k + 1, prompt_ids=prompt) for k, t in enumerate(group.traces)
            )
            out.append(dataclasses.replace(group, prompt_ids=prompt, traces=traces))
        return out
