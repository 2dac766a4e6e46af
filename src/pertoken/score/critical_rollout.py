"""Critical tokens by rollout: the token after which a wrong chain is never put right again. The ground truth of cDPO.

Lin, Liang, Xu, Lin, Wang, Luo, Shi, Li, Yang, Tu, "Critical Tokens Matter", ICML 2025, arXiv 2411.19943. From every
prefix y_1..y_i of a response the model samples n = 64 completions:

    score_i = (correct ones among them) / n

The critical token of an incorrect response is the first i with score_i = 0, if no later score is above 3 of 64; after
one that is, the search starts again, and if nothing is found then, the last candidate stands. The "without" test asks
what that token cost: its probability is set to 0 and the others are renormalised, 64 replacements are drawn, one
completion each, and Pass@k is the unbiased estimate over their c correct ones:

    Pass@k = 1 - C(n - c, k) / C(n, k)

Values are probabilities (kind ``probability``), one a token; ``meta["critical"]`` is the index of the critical token
(None in a correct response), ``meta["counts"]`` the correct ones of n after each emitted token. What is sampled follows
the prompt's and the prefix's own ids: nothing is encoded again. A prefix that ends the response (its terminator, or no
room for another token) has nothing to sample: it is right or wrong as it stands. Draws depend on the seed and the
trace's ids alone. This costs T * n completions a response: it is the truth that `contrastive-estimation` approximates
with two forwards.

Differs from the authors' code: prefixes are ids (the release decodes and encodes them), the response's last token may
be the critical one (there it is never tried), and Pass@k refuses k > n (there k is cut to n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.cache import key_of
from ..core.credit import Credit
from ..core.head import Head
from ..core.lm import LM
from ..core.packing import evaluating
from ..core.rollout import Sampling, inverse_cdf, sample
from ..core.trace import Trace
from ._logps import same_tokenizer, where


def critical_token(counts: Sequence[int], rise: int = 3) -> int | None:
    """Index of the critical token.

    Args:
        counts: correct completions from the prefix that ends at each token, in order.
        rise: most correct completions that a later prefix may have.

    Returns:
        The first 0 after which no count is above `rise`; failing that, the last 0 that looked like it; None if there
        is no 0 at all.
    """
    found = last = None
    for i, count in enumerate(counts):
        if found is None and count == 0:
            found = i
        elif found is not None and count > rise:
            found, last = None, found
    return last if found is None else found


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n of which c are.

    Raises:
        ValueError: counts that cannot be.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"Pass@{k} of {c} right among {n}: 0 <= c <= n and 1 <= k <= n are needed; draw more samples")
    return 1.0 - comb(n - c, k) / comb(n, k)


def without_token(logits: Tensor, token: int) -> Tensor:
    """Log-probs (V,) of the next token with one of them forbidden and the others renormalised.

    Raises:
        ValueError: nothing but that token has a probability.
    """
    masked = logits.detach().clone()
    masked[token] = -torch.inf
    if not bool((masked > -torch.inf).any()):
        raise ValueError(
            f"token {token} is the only one that the model can say here; there is nothing to replace it by"
        )
    return torch.log_softmax(masked, -1)


@dataclass(frozen=True, kw_only=True)
class CriticalRollout:
    """Options of the rollouts, the model that makes them and the judge of its answers."""

    samples: int = 64
    """n, completions from each prefix, and replacements in the "without" test."""
    rise: int = 3
    """Correct completions that a prefix after the critical token may have (of 64: scale it with `samples`)."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512))
    """How completions are drawn. The paper's temperature leaves about ten wrong answers of 64."""
    sees: Literal["completion", "all"] = "completion"
    """What `correct` is given: the response's text, or prompt and response as one text (markers left out)."""
    batch: int = 1024
    """Sequences that are sampled together."""
    seed: int = 0
    """Seed of all draws."""
    lm: LM | None = None
    """The model that wrote the response."""
    correct: Any = None
    """Text -> whether its final answer is right; any callable."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.rise < 0 or self.batch < 1 or self.seed < 0:
            raise ValueError(
                f"samples={self.samples}, rise={self.rise}, batch={self.batch}, seed={self.seed}: samples and batch "
                "are at least 1, the others at least 0"
            )
        if self.sees not in ("completion", "all"):
            raise ValueError(f"sees={self.sees!r} is not one of completion, all")

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Options with which a test can afford it."""
        sampling = Sampling(max_new_tokens=2)
        return {"samples": 2, "sampling": sampling, "correct": lambda text: len(text.encode()) % 2 == 0}

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind probability over the completion of each trace, in order; 0 on tokens not emitted.

        Raises:
            ValueError: no model, no judge, or another tokenizer.
        """
        lm, _ = self._parts()
        same_tokenizer(lm, items)
        return [self._credit(trace) for trace in items]

    def without(self, trace: Trace, at: int) -> int:
        """Correct completions among `samples` in which another token stands at completion position `at`; `pass_at_k`
        makes Pass@k of it.

        Raises:
            ValueError: a position outside of the completion, or where only that token is possible.
        """
        lm, _ = self._parts()
        same_tokenizer(lm, [trace])
        if not 0 <= at < len(trace):
            raise ValueError(f"position {at} does not lie in the {len(trace)} tokens of {where(trace, 0)}")
        prefix = (*trace.prompt_ids, *trace.completion_ids[:at])
        with torch.no_grad(), lm.active() as causal, evaluating(causal):
            ids = torch.tensor([prefix], device=lm.device)
            hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            logps = without_token(Head(causal)(hidden), trace.completion_ids[at])
        rng = np.random.default_rng([self._seed(trace), at])
        uniform = torch.from_numpy(rng.random(self.samples)).to(logps.device)
        drawn = inverse_cdf(logps.expand(self.samples, -1), uniform).tolist()
        starts = [(*trace.completion_ids[:at], token) for token in drawn]
        pieces = [(*trace.completion_pieces[:at], lm.view.piece(token)) for token in drawn]
        return sum(self._counts(trace, starts, pieces, 1, self._seed(trace, "without")))

    def _parts(self) -> tuple[LM, Callable[[str], bool]]:
        if self.lm is None or self.correct is None:
            raise ValueError(
                "rollouts need the model that wrote the responses and a judge of answers; give CriticalRollout(lm=..., "
                "correct=lambda text: ...)"
            )
        return self.lm, self.correct

    def _seed(self, trace: Trace, *what: Any) -> int:
        return int(key_of(trace.prompt_ids, trace.completion_ids, self.seed, *what)[:15], 16)

    def _credit(self, trace: Trace) -> Credit:
        tokens = np.flatnonzero(trace.mask)
        starts = [trace.completion_ids[: t + 1] for t in tokens]
        pieces = [trace.completion_pieces[: t + 1] for t in tokens]
        counts = self._counts(trace, starts, pieces, self.samples, self._seed(trace))
        values = np.zeros(len(trace))
        values[tokens] = np.array(counts, float) / self.samples
        right = self._right(trace, trace.completion_pieces)
        found = None if right else critical_token(counts, self.rise)
        meta = {
            "critical": None if found is None else int(tokens[found]),
            "counts": counts,
            "samples": self.samples,
            "correct": right,
        }
        return Credit(trace=trace, values=values, kind="probability", method="critical-rollout", version=1, meta=meta)

    def _counts(
        self,
        trace: Trace,
        starts: Sequence[tuple[int, ...]],
        pieces: Sequence[tuple[bytes, ...]],
        n: int,
        seed: int,
    ) -> list[int]:
        """Of n completions from each start of the response, the correct ones."""
        lm, _ = self._parts()
        room = lm.context - len(trace.prompt_ids)
        goes_on = [start[-1] not in lm.stop_ids and len(start) < room for start in starts]
        prompts = [(*trace.prompt_ids, *start) for start, on in zip(starts, goes_on, strict=True) if on]
        drawn = iter(sample(lm, prompts, n, self.sampling, seed=seed, batch=self.batch))
        counts = []
        for said, on in zip(pieces, goes_on, strict=True):
            ends = [t.completion_pieces for t in next(drawn)] if on else [()] * n
            counts.append(sum(self._right(trace, (*said, *end)) for end in ends))
        return counts

    def _right(self, trace: Trace, pieces: Sequence[bytes]) -> bool:
        said = (*trace.prompt_pieces, *pieces) if self.sees == "all" else pieces
        return bool(self._parts()[1](b"".join(said).decode("utf-8", errors="replace")))
