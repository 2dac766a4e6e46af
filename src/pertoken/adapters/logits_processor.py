"""Any guide (a reward model, a constraint, a product of them) in transformers' own generation.

    processor = guide_processor(LMGuide(lm=arm), ["How was the film?"], alpha=1.0)
    model.generate(**inputs, logits_processor=[processor])

It adds alpha times the guide's log-weights to the model's log-probs, before temperature, top-k and top-p, as
`generate genarm` does; the guide keeps its own prompts (they may be in another template) and its own cache. One
processor is for one call of `generate`, greedy or sampled. Beams are refused: the rows of a beam change places, and
transformers does not tell a processor which went where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.decode import Guide, weighted
from ..core.head import at_least_float32
from ..generate._guides import as_wide


def guide_processor(guide: Guide, prompts: Sequence[Any], *, alpha: float = 1.0, n: int = 1) -> Any:
    """A guide as a transformers `LogitsProcessor`.

    Args:
        guide: of the model's token ids.
        prompts: of the rows of `generate`'s inputs, in order: text, messages or ids, as the guide reads them.
        alpha: power of the guide; at 0 scores pass untouched. n: `num_return_sequences`.

    Returns:
        The processor. Called with (ids (N, L), scores (N, V)), it gives log-weights (N, V), not normalised.

    Raises:
        ValueError: no prompt, n below 1, or an alpha that is not finite.
    """
    from transformers import LogitsProcessor

    if not prompts or n < 1 or not math.isfinite(alpha):
        raise ValueError(f"{len(prompts)} prompts, n={n}, alpha={alpha}: give a prompt or more, n >= 1, a finite alpha")

    class GuideProcessor(LogitsProcessor):
        def __init__(self) -> None:
            self.state: Any = None
            self.seen: Tensor | None = None

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if alpha == 0:
                return scores
            self._same_rows(input_ids)
            if self.seen is None:
                self.state = guide.start([p for p in prompts for _ in range(n)])
                logw = guide.step(self.state, None)
            else:
                logw = guide.step(self.state, input_ids[:, -1])
            self.seen = input_ids.clone()
            logp = at_least_float32(scores).log_softmax(-1)
            return weighted([logp, as_wide(logw, logp.shape[-1]).to(logp.device)], (1.0, alpha))

        def _same_rows(self, input_ids: Tensor) -> None:
            if self.seen is None:
                if len(input_ids) != len(prompts) * n:
                    raise ValueError(
                        f"{len(input_ids)} rows for {len(prompts)} prompts x n={n}: n is num_return_sequences, and "
                        "beams are not supported (num_beams=1)"
                    )
            elif input_ids.shape[1] != self.seen.shape[1] + 1 or len(input_ids) != len(self.seen):
                raise ValueError(
                    f"rows went from {tuple(self.seen.shape)} to {tuple(input_ids.shape)} ids, not by one token: make "
                    "a new processor for each call of generate, and use no assistant"
                )
            elif not torch.equal(input_ids[:, :-1], self.seen):
                raise ValueError(
                    "the rows are not the ones of the last step: beams change places, which no processor is told; use "
                    "num_beams=1, and a new processor for each call of generate"
                )

    return GuideProcessor()
