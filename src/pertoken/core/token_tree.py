"""Next-token log-probs after many continuations of one context, each token computed once.

The continuations form a tree. Its tokens lie in one row of one KV cache, each attending to the context and its own
ancestors, so nothing is copied when a branch forks, and all that is new is one forward:

    row = context | a b c d ...,   position(v) = |context| + depth(v) - 1,   v attends to context + ancestors(v) + v

Models that cannot take such a row (`packing.shares_prompts`, or a sliding window) compute whole sequences instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from .head import Head
from .lm import LM
from .packing import evaluating, shares_prompts
from .rollout import decoding

History = tuple[int, ...]
_SLACK = 64  # positions that are dead before the cache is copied without them


class TokenTree:
    """What one model says after a context and any of many continuations of it.

    Args:
        lm: the model.
        context: ids before all of them, at least one.

    Attributes:
        forwards, computed: passes of the model, and tokens that went through it (the context too).

    Raises:
        ValueError: an empty context.
    """

    def __init__(self, lm: LM, context: Sequence[int]):
        if not context:
            raise ValueError("an empty context: nothing predicts the first token; give a BOS, or text before it")
        self.lm, self.context = lm, tuple(int(i) for i in context)
        sliding = "sliding_attention" in (getattr(lm.causal.config.get_text_config(), "layer_types", None) or ())
        self._shares = shares_prompts(lm.causal) and not sliding
        self._cache: Any = None
        self._width = 0  # positions in the cache
        self._place: dict[History, int] = {}
        self._said: dict[History, np.ndarray] = {}
        self.forwards = self.computed = 0

    def logps(self, histories: Sequence[History]) -> list[np.ndarray]:
        """Log-probs (V,) float64 of the next token after each.

        Raises:
            ValueError: a history that does not fit into the model's context.
        """
        missing = [h for h in dict.fromkeys(histories) if h not in self._said]
        if missing:
            longest = len(self.context) + max(map(len, missing))
            if longest > self.lm.context:
                raise ValueError(
                    f"{longest} tokens exceed the model's context of {self.lm.context}; give a shorter text"
                )
            with torch.no_grad(), ExitStack() as stack:
                causal = stack.enter_context(self.lm.active())
                stack.enter_context(evaluating(causal))
                stack.enter_context(decoding(causal))
                (self._grow if self._shares else self._whole)(causal, missing)
        return [self._said[h] for h in histories]

    def keep(self, histories: Iterable[History]) -> None:
        """Forget what was said after other histories than these (and the empty one), and the cache of what is neither
        one of these nor on the way to one of them. What was forgotten may be asked again, and is computed again."""
        known = {(), *histories}
        self._said = {h: said for h, said in self._said.items() if h in known}
        ways = {h[:k] for h in known for k in range(1, len(h) + 1)}
        rows = sorted((place, h) for h, place in self._place.items() if h in ways)
        self._place = {h: place for place, h in rows}
        start = len(self.context)
        if self._cache is not None and self._width - start - len(rows) >= _SLACK:
            index = torch.tensor([*range(start), *(place for place, _ in rows)], device=self.lm.device)
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
            self._width = len(index)
            self._place = {h: start + k for k, (_, h) in enumerate(rows)}

    def _grow(self, causal: Any, missing: list[History]) -> None:
        device, dtype, start = self.lm.device, next(causal.parameters()).dtype, len(self.context)
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=causal.config)
            hidden = self._forward(causal, torch.tensor([self.context], device=device), cache=self._cache)
            self._width = start
            self._record(causal, hidden[0, -1:], [()])
        wanted = set(missing)
        ways = dict.fromkeys(h[: k + 1] for h in missing for k in range(len(h)))
        new = sorted((h for h in ways if h not in self._place or h in wanted), key=len)
        if not new:
            return
        first = self._width
        self._place |= {h: first + k for k, h in enumerate(new)}
        self._width += len(new)
        mask = torch.full((len(new), self._width), torch.finfo(dtype).min, dtype=dtype)
        mask[:, :start] = 0
        for row, h in enumerate(new):
            mask[row, [self._place[h[: k + 1]] for k in range(len(h))]] = 0
        hidden = self._forward(
            causal,
            torch.tensor([[h[-1] for h in new]], device=device),
            position_ids=torch.tensor([[start + len(h) - 1 for h in new]], device=device),
            attention_mask=mask[None, None].to(device),
            cache=self._cache,
        )
        self._record(causal, hidden[0], new)

    def _whole(self, causal: Any, missing: list[History]) -> None:
        width = max(map(len, missing)) + len(self.context)
        rows = [[*self.context, *h] for h in missing]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.lm.device)
        hidden = self._forward(causal, ids)  # padding on the right is invisible to what stands before it
        ends = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        self._record(causal, hidden[torch.arange(len(rows), device=hidden.device), ends], missing)

    def _forward(self, causal: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
        self.forwards += 1
        self.computed += ids.numel()
        return causal.base_model(input_ids=ids, use_cache="cache" in how, **how).last_hidden_state

    def _record(self, causal: Any, hidden: torch.Tensor, histories: list[History]) -> None:
        said = Head(causal)(hidden).double().log_softmax(-1).cpu().numpy()
        self._said |= dict(zip(histories, said, strict=True))
