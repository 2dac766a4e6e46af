"""Guides: what says the log-weights of the next token of sequences that grow together.

A `Guide` owns its prompt, its temperature and its KV cache, and follows its sequences when rows are dropped, doubled or
reordered (particles). `LMGuide` is a language model; `Product` multiplies guides, each to its own power:

    log w(v) = sum_k alpha_k log p_k(v | x_k, y_<t)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .head import Head
from .lm import LM, same_vocabulary
from .packing import evaluating
from .rollout import decoding


@runtime_checkable
class Guide(Protocol):
    """Next-token log-weights of N sequences that grow together."""

    @property
    def vocabulary(self) -> int:
        """V: ids below it have a weight."""
        ...

    def start(self, prompts: Sequence[Any]) -> Any:
        """State of N sequences that have only their prompts, of text, messages or ids."""
        ...

    def step(self, state: Any, last_ids: Tensor | None) -> Tensor:
        """Log-weights (N, V), float32 or better, after the sequences grew by `last_ids` (N,) (None: by nothing, the
        first time). The state moves on."""
        ...

    def reorder(self, state: Any, index: Tensor) -> None:
        """Row i of the state becomes what row ``index[i]`` was; `index` may be shorter, and name a row twice."""
        ...


@runtime_checkable
class Placed(Guide, Protocol):
    """A guide that draws random numbers of its own (look-ahead), or keeps figures of each sequence."""

    def placed(self, state: Any, places: Sequence[tuple[int, int]], seed: int) -> None:
        """Told once, after `start`: the prompt and the sample of each row, which with the seed decide its draws
        (``generators(seed, prompt, n)[sample]``, jumped, so that they are not the draws of the tokens)."""
        ...


@dataclass
class _Sequences:
    """Rows of a model's cache."""

    cache: Any
    attention: Tensor
    position: Tensor
    logits: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LMGuide:
    """A language model as a guide: its log-probs at a temperature."""

    lm: LM
    temperature: float = 1.0
    """Divides its logits."""
    prompt: Callable[[Any], Any] | None = None
    """What it reads instead of the prompt that is asked (a template of its own): prompt -> prompt."""
    system: str | None = None
    """A system turn put before text prompts."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature={self.temperature} of a guide must be above 0; argmax is the sampler's")

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head."""
        return Head(self.lm.causal).vocabulary

    def ids(self, prompt: Any) -> tuple[int, ...]:
        """Ids of a prompt as this model reads it.

        Raises:
            ValueError: it leaves no room for a token.
        """
        asked = prompt if self.prompt is None else self.prompt(prompt)
        if isinstance(asked, tuple) and asked and isinstance(asked[0], int):
            found = asked
        else:
            found = self.lm.encode_prompt(asked, self.system)
        if len(found) >= self.lm.context:
            raise ValueError(f"a prompt has {len(found)} of {self.lm.context} positions; cut it from the left")
        return found

    def start(self, prompts: Sequence[Any]) -> _Sequences:
        """Prompts are computed once each, however often they occur."""
        from transformers import DynamicCache

        known = [self.ids(p) for p in prompts]
        once = list(dict.fromkeys(known))
        width, device = max(map(len, once)), self.lm.device
        ids = torch.zeros(len(once), width, dtype=torch.long)
        attention = torch.zeros(len(once), width, dtype=torch.long)
        for row, prompt in enumerate(once):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        ids, attention = ids.to(device), attention.to(device)
        with self._running() as causal:
            cache = DynamicCache(config=causal.config)
            hidden = causal.base_model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                cache=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            state = _Sequences(cache, attention, attention.sum(1), Head(causal)(hidden))
        place = {prompt: i for i, prompt in enumerate(once)}
        self.reorder(state, torch.tensor([place[p] for p in known], device=device))
        return state

    def step(self, state: _Sequences, last_ids: Tensor | None) -> Tensor:
        """Log-probs (N, V)."""
        if last_ids is not None:
            last_ids = last_ids.to(self.lm.device)
            with self._running() as causal:
                state.attention = torch.cat([state.attention, state.attention.new_ones(len(last_ids), 1)], 1)
                hidden = causal.base_model(
                    input_ids=last_ids[:, None],
                    attention_mask=state.attention,
                    position_ids=state.position[:, None],
                    cache=state.cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                state.position = state.position + 1
                state.logits = Head(causal)(hidden)
        assert state.logits is not None
        return (state.logits / self.temperature).log_softmax(-1)

    def reorder(self, state: _Sequences, index: Tensor) -> None:
        """Select rows of the cache."""
        index = index.to(state.attention.device)
        if len(index) == len(state.attention) and bool((index == torch.arange(len(index), device=index.device)).all()):
            return
        state.cache.batch_select_indices(index)
        state.attention, state.position = state.attention[index], state.position[index]
        state.logits = None if state.logits is None else state.logits[index]

    def branch(self, state: _Sequences, index: Tensor) -> _Sequences:
        """A state of its own whose row i is row ``index[i]``; the given one stays as it is (look-ahead)."""
        cache = copy.copy(state.cache)
        cache.layers = [copy.copy(layer) for layer in state.cache.layers]  # layers put new tensors in place of old ones
        cache.batch_select_indices(index)
        logits = None if state.logits is None else state.logits[index]
        return _Sequences(cache, state.attention[index], state.position[index], logits)

    @contextmanager
    def _running(self) -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            causal = stack.enter_context(self.lm.active())
            stack.enter_context(evaluating(causal))
            stack.enter_context(decoding(causal))
            yield causal


def weighted(said: Sequence[Tensor], powers: Sequence[float | Tensor]) -> Tensor:
    """sum_k alpha_k log p_k of log-weights (N, V): not normalised, float32 or better. A power is a number, or one a row
    (N,). What has weight 0 in one guide has none, whatever the power; but a power of 0 leaves a guide out."""
    total = torch.zeros_like(said[0], dtype=torch.promote_types(said[0].dtype, torch.float32))
    impossible = torch.zeros_like(total, dtype=torch.bool)
    for logw, power in zip(said, powers, strict=True):
        alpha = torch.as_tensor(power, dtype=total.dtype, device=total.device)
        alpha = alpha[:, None] if alpha.ndim else alpha
        total = total + torch.where(alpha == 0, 0.0, alpha * logw)
        impossible |= (logw == -torch.inf) & (alpha != 0)
    return total.masked_fill(impossible, -torch.inf)


@dataclass
class Parts:
    """States of the guides of a product, and what each said last."""

    states: list[Any]
    said: list[Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """Several guides, each to its own power. A power of 0 leaves a guide out (it is not even computed).

    Raises:
        ValueError: no guide; powers that are not finite; language models of different vocabularies.
    """

    guides: Sequence[Guide]
    powers: Sequence[float]

    def __post_init__(self) -> None:
        if not self.guides or len(self.guides) != len(self.powers) or not np.isfinite(self.powers).all():
            raise ValueError(f"{len(self.guides)} guides with powers {tuple(self.powers)}: give each a finite number")
        models = [g.lm for g in self.guides if isinstance(g, LMGuide)]
        for other in models[1:]:
            same_vocabulary(models[0], other)

    @property
    def vocabulary(self) -> int:
        """The ids that all have (a head may be padded to a multiple)."""
        return min(g.vocabulary for g in self.guides)

    def _used(self) -> list[tuple[Guide, float]]:
        return [(g, p) for g, p in zip(self.guides, self.powers, strict=True) if p != 0]

    def start(self, prompts: Sequence[Any]) -> Parts:
        """States of all that are used."""
        return Parts([g.start(prompts) for g, _ in self._used()], [])

    def step(self, state: Parts, last_ids: Tensor | None) -> Tensor:
        """Sum of the powers' log-weights, not normalised; what has weight 0 in one guide has none."""
        used, v = self._used(), self.vocabulary
        state.said = [g.step(s, last_ids)[:, :v] for (g, _), s in zip(used, state.states, strict=True)]
        if not used:
            raise ValueError("all powers are 0, so nothing says what comes next; give one guide a power")
        return weighted(state.said, [power for _, power in used])

    def reorder(self, state: Parts, index: Tensor) -> None:
        """All of them."""
        for (g, _), s in zip(self._used(), state.states, strict=True):
            g.reorder(s, index)
