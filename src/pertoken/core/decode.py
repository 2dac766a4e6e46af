"""Decoding one token at a time: guides give next-token log-weights, samplers draw from them, traces remember how.

A `Guide` owns its prompt, its temperature and its KV cache, and follows its sequences when rows are dropped, doubled or
reordered (particles). `LMGuide` is a language model; `Product` multiplies guides, each to its own power:

    log w(v) = sum_k alpha_k log p_k(v | x_k, y_<t)

Draws depend on the seed and on the place of prompt and sample, not on what else is in the batch (as `rollout.sample`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .credit import Credit
from .head import Head
from .lm import LM, Prompt, same_vocabulary
from .packing import evaluating
from .rollout import Sampling, decoding, inverse_cdf
from .trace import Trace


@runtime_checkable
class Guide(Protocol):
    """Next-token log-weights of N sequences that grow together."""

    vocabulary: int
    """V: ids below it have a weight."""

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


@dataclass
class _Parts:
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

    def start(self, prompts: Sequence[Any]) -> _Parts:
        """States of all that are used."""
        return _Parts([g.start(prompts) for g, _ in self._used()], [])

    def step(self, state: _Parts, last_ids: Tensor | None) -> Tensor:
        """Sum of the powers' log-weights, not normalised; what has weight 0 in one guide has none."""
        used, v = self._used(), self.vocabulary
        state.said = [g.step(s, last_ids)[:, :v] for (g, _), s in zip(used, state.states, strict=True)]
        if not used:
            raise ValueError("all powers are 0, so nothing says what comes next; give one guide a power")
        total = torch.zeros_like(state.said[0], dtype=torch.promote_types(state.said[0].dtype, torch.float32))
        for (_, power), said in zip(used, state.said, strict=True):
            total = total + (said if power == 1 else power * said)
        impossible = torch.stack([said == -torch.inf for said in state.said]).any(0)
        return total.masked_fill(impossible, -torch.inf)

    def reorder(self, state: _Parts, index: Tensor) -> None:
        """All of them."""
        for (g, _), s in zip(self._used(), state.states, strict=True):
            g.reorder(s, index)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One continuation of a prompt.

    Attributes:
        trace: the continuation; ``sampled_logps`` under what it was drawn from, ``policy_logps`` under the base model.
        logw: its log-weight (0 where all weigh alike; -inf: dead). credit: what guided it, token by token, if any.
        meta: figures of the draw, JSON values.
    """

    trace: Trace
    logw: float = 0.0
    credit: Credit | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """A token, as it is drawn: of which prompt and sample, its id, its bytes, whether the sequence ends here."""

    prompt: int
    sample: int
    token: int
    piece: bytes
    ended: bool


Stream = Callable[[Streamed], None]


class Decoder(Protocol):
    """A method of the room `generate`: n continuations of each prompt. What it needs besides the model (an
    autoregressive reward, a constraint, a verifier) are its options."""

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """n draws a prompt, in order. `stream` is called with each token as it comes, by the methods that draw left to
        right (particles cannot: their past changes)."""
        ...


def generators(seed: int, prompt: int, n: int) -> list[np.random.Generator]:
    """One counter-based generator a sample of a prompt: the same draws whatever else is in the batch.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    return [np.random.Generator(np.random.Philox(key=[seed, (prompt << 32) + i])) for i in range(n)]


@torch.no_grad()
def decode(
    lm: LM,
    guide: Guide,
    prompts: Sequence[Any],
    *,
    n: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    stream: Stream | None = None,
    base: Callable[[Any], Tensor | None] | None = None,
    batch: int = 64,
    meta: Mapping[str, Any] | None = None,
) -> list[list[Trace]]:
    """Draw from a guide, left to right.

    Args:
        lm: whose tokens these are: pieces, stop ids, the prompt of the traces.
        guide: the (composed) guide; its log-weights are normalised, then `sampling` is applied.
        base: state -> what the base model said last, (N, V) log-probs, for ``policy_logps``; default: a `Product`'s
            first guide if it is used, else what the guide said.
        batch: sequences computed together. meta: put into each trace's ``sampling``.

    Returns:
        n traces a prompt.

    Raises:
        ValueError: log-weights with NaN, or none above -inf; a setting out of range.
    """
    sampling = sampling or Sampling()
    if n < 1 or batch < 1:
        raise ValueError(f"n={n}, batch={batch}: give 1 or more")
    ids = [LMGuide(lm=lm).ids(p) for p in prompts]
    out: list[list[Trace]] = [[] for _ in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    together = max(1, batch // n)
    for start in range(0, len(order), together):
        part = order[start : start + together]
        state = guide.start([prompts[i] for i in part for _ in range(n)])
        draws = [g for i in part for g in generators(seed, i, n)]
        if isinstance(guide, Placed):
            guide.placed(state, [(i, k) for i in part for k in range(n)], seed)
        rows, last = np.arange(len(draws)), None
        tokens: list[list[int]] = [[] for _ in draws]
        logps: list[tuple[list[float], list[float]]] = [([], []) for _ in draws]
        ended = [False] * len(draws)
        while len(rows):
            logw = guide.step(state, last)
            logits = logw.log_softmax(-1)
            first = base(state) if base is not None else _first(state)
            policy = logits if first is None else first
            stops = [s for s in lm.stop_ids if s < logits.shape[-1]]
            if len(tokens[rows[0]]) < sampling.min_new_tokens:
                logits = logits.index_fill(-1, torch.tensor(stops, dtype=torch.long, device=logits.device), -torch.inf)
            drawn = sampling.logps(logits)
            uniform = torch.tensor([draws[r].random() for r in rows], dtype=torch.float64, device=drawn.device)
            token = inverse_cdf(drawn, uniform)
            record = torch.stack([x.gather(1, token[:, None])[:, 0].double() for x in (drawn, policy)]).cpu().numpy()
            if not np.isfinite(record[0]).all():
                row = int(rows[~np.isfinite(record[0])][0])
                raise ValueError(f"prompt {part[row // n]}: no next token has a finite weight; look at the guides")
            keep = []
            for k, (row, t) in enumerate(zip(rows, token.tolist(), strict=True)):
                tokens[row].append(t)
                for place, value in zip(logps[row], record[:, k], strict=True):
                    place.append(float(value))
                ended[row] = t in lm.stop_ids
                full = len(tokens[row]) >= sampling.max_new_tokens
                full |= len(ids[part[row // n]]) + len(tokens[row]) >= lm.context
                if stream:
                    stream(Streamed(part[row // n], int(row % n), t, lm.view.piece(t), ended[row] or full))
                if not ended[row] and not full:
                    keep.append(k)
            kept = torch.tensor(keep, dtype=torch.long, device=token.device)
            if 0 < len(keep) < len(rows):
                guide.reorder(state, kept)
            rows, last = rows[keep], token[kept]
        how = dataclasses.asdict(sampling) | {"model": lm.name, "seed": seed} | dict(meta or {})
        for row in range(len(draws)):
            i = part[row // n]
            asked = {} if isinstance(prompts[i], tuple) and isinstance(prompts[i][0], int) else {"prompt": prompts[i]}
            out[i].append(
                lm.trace_of_ids(
                    ids[i],
                    tokens[row],
                    ended=ended[row],
                    sampled_logps=np.array(logps[row][0]),
                    policy_logps=np.array(logps[row][1]),
                    sampling=how | {"place": [i, row % n]},
                    meta=asked,
                )
            )
    return out


def _first(state: Any) -> Tensor | None:
    return state.said[0] if isinstance(state, _Parts) and state.said else None


def guidance(trace: Trace, method: str, version: int = 1) -> Credit:
    """What the guides did to each token: log-prob under what it was drawn from less that under the base model."""
    assert trace.sampled_logps is not None and trace.policy_logps is not None
    values = np.asarray(trace.sampled_logps) - np.asarray(trace.policy_logps)
    return Credit(trace=trace, values=values, kind="logratio", method=method, version=version)
