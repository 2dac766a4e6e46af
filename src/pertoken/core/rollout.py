"""Sampling that knows what it did: the prompt is computed once a group, and every draw is recorded with its log-prob
under the distribution it was really drawn from *and* under the model's own (temperature 1, nothing cut off).

A draw depends only on the seed, the prompt's place and the sample's place (one counter-based generator a sequence), not
on what else is in the batch or on when others stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .head import Head
from .lm import LM, Prompt
from .packing import Cost, evaluating, pack
from .stats import Needs, token_stats
from .trace import Trace


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: longest completion, the terminator included.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: smallest set of likeliest tokens that holds this probability (1: all).
        top_k: this many likeliest tokens (0: all).
        min_new_tokens: the terminator is not drawn before this many tokens.

    Raises:
        ValueError: a setting out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0

    def __post_init__(self):
        if not (
            self.max_new_tokens >= 1 and 0 <= self.temperature < np.inf and 0 < self.top_p <= 1 and self.top_k >= 0
        ):
            raise ValueError(f"{self}: max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are needed")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(f"{self}: min_new_tokens must lie between 0 and max_new_tokens")

    def logps(self, logits: Tensor) -> Tensor:
        """Log-probs (..., V) of what is drawn from: temperature, then top-k, then top-p; renormalised."""
        if self.temperature == 0:
            best = torch.full_like(logits, -torch.inf)
            return best.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        # the likeliest token is put at 0, so that a very low temperature does not overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k:
            floor = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[..., -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(cut, -torch.inf)
        return logits.log_softmax(-1)


@torch.no_grad()
def sample(
    lm: LM,
    prompts: Sequence[Prompt | tuple[int, ...]],
    n: int = 1,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    system: str | None = None,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[Trace]]:
    """Draw n completions of each prompt.

    Args:
        lm: the model.
        prompts: texts, messages, or ids that are encoded already.
        n: completions a prompt (G).
        sampling: how; default temperature 1, at most 64 tokens.
        seed: with the place of the prompt and of the sample, decides every draw.
        system: a system turn put before text prompts.
        batch: sequences computed together; those of one prompt always are.
        progress: called with the number of completions that were just finished.

    Returns:
        n traces a prompt. Each has its recorded log-probs, `sampling` and, where the prompt was words,
        ``meta["prompt"]``.

    Raises:
        ValueError: a prompt that leaves no room for a single token; no sample or a negative seed asked for; a model
            whose log-probs are not finite.
    """
    sampling = sampling or Sampling()
    if n < 1 or batch < 1 or seed < 0:
        raise ValueError(f"n={n}, batch={batch}, seed={seed}: n >= 1, batch >= 1 and seed >= 0 are needed")
    ids: list[tuple[int, ...]]
    ids = [p if isinstance(p, tuple) and p and isinstance(p[0], int) else lm.encode_prompt(p, system) for p in prompts]  # type: ignore[arg-type]
    for i, prompt in enumerate(ids):
        if len(prompt) >= lm.context:
            raise ValueError(f"prompt {i} has {len(prompt)} of {lm.context} positions; cut it from the left")
    out: list[list[Trace]] = [[] for _ in prompts]
    # Prompts of like length are computed together, so that left padding is short.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    together = max(1, batch // n)
    for start in range(0, len(order), together):
        chosen = order[start : start + together]
        for i, traces in zip(
            chosen, _sample_batch(lm, [ids[i] for i in chosen], chosen, n, sampling, seed), strict=True
        ):
            words = {"prompt": prompts[i]} if ids[i] is not prompts[i] else {}
            out[i] = [dataclasses.replace(t, meta=t.meta | words) for t in traces]
        if progress:
            progress(len(chosen) * n)
    return out


@dataclass
class _Running:
    """The sequences that have not ended: their rows in the cache shrink as others stop."""

    rows: np.ndarray
    attention: Tensor
    last: Tensor
    position: Tensor


@contextlib.contextmanager
def decoding(causal: Any) -> Iterator[None]:
    """FlexAttention is for packed rows; one query against a cache that grows would have it compiled anew each token."""
    was = causal.config._attn_implementation
    if was != "flex_attention":
        yield
        return
    causal.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        causal.set_attn_implementation(was)


def _sample_batch(
    lm: LM, prompts: list[tuple[int, ...]], places: list[int], n: int, sampling: Sampling, seed: int
) -> Iterator[list[Trace]]:
    from transformers import DynamicCache

    device, total = lm.device, len(prompts) * n
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    ids, attention = ids.to(device), attention.to(device)
    draws = [np.random.Generator(np.random.Philox(key=[seed, (places[r // n] << 32) + r % n])) for r in range(total)]
    tokens: list[list[int]] = [[] for _ in range(total)]
    logps = [([], []) for _ in range(total)]  # under the sampling distribution, under the policy
    ended = [False] * total
    with lm.active() as causal, evaluating(causal), decoding(causal):
        head, cache = Head(causal), DynamicCache(config=causal.config)
        stops = [i for i in lm.stop_ids if i < head.vocabulary]  # a generation config may name ids that are not there
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        hidden = causal.base_model(
            input_ids=ids, attention_mask=attention, position_ids=positions, cache=cache, use_cache=True
        ).last_hidden_state[:, -1]
        cache.batch_repeat_interleave(n)
        attention, lengths = attention.repeat_interleave(n, 0), [len(prompts[r // n]) for r in range(total)]
        running = _Running(np.arange(total), attention, ids[:, -1], attention.sum(1))
        logits = head(hidden).repeat_interleave(n, 0)
        while True:
            policy = logits.log_softmax(-1)
            if len(tokens[running.rows[0]]) < sampling.min_new_tokens:
                logits[:, stops] = -torch.inf
            drawn = sampling.logps(logits)
            uniform = torch.tensor([draws[r].random() for r in running.rows], dtype=torch.float64, device=device)
            token = inverse_cdf(drawn, uniform)
            at = token[:, None]
            record = torch.stack([drawn.gather(1, at)[:, 0], policy.gather(1, at)[:, 0]]).double().cpu().numpy()
            if not np.isfinite(record).all():
                bad = int(running.rows[~np.isfinite(record).all(0)][0])
                raise ValueError(
                    f"log-probs after prompt {places[bad // n]} are not finite; look at the model's weights"
                )
            keep = []
            for k, (row, t) in enumerate(zip(running.rows, token.tolist(), strict=True)):
                tokens[row].append(t)
                logps[row][0].append(record[0, k])
                logps[row][1].append(record[1, k])
                ended[row] = t in lm.stop_ids
                room = len(tokens[row]) < sampling.max_new_tokens and lengths[row] + len(tokens[row]) < lm.context
                if not ended[row] and room:
                    keep.append(k)
            if not keep:
                break
            if len(keep) < len(running.rows):
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                running = _Running(running.rows[keep], running.attention[kept], token[kept], running.position[kept])
            else:
                running = dataclasses.replace(running, last=token)
            running.attention = torch.cat([running.attention, running.attention.new_ones(len(running.rows), 1)], 1)
            hidden = causal.base_model(
                input_ids=running.last[:, None],
                attention_mask=running.attention,
                position_ids=running.position[:, None],
                cache=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            running.position = running.position + 1
            logits = head(hidden)
    how = dataclasses.asdict(sampling) | {"model": lm.name, "seed": seed}
    for g in range(len(prompts)):
        yield [
            lm.trace_of_ids(
                prompts[g],
                tokens[r],
                ended=ended[r],
                sampled_logps=np.array(logps[r][0]),
                policy_logps=np.array(logps[r][1]),
                sampling=how | {"place": [places[g], r - g * n]},
            )
            for r in range(g * n, (g + 1) * n)
        ]


def inverse_cdf(logps: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulative probability passes `uniform`: (N, V) log-probs, (N,) in [0, 1) -> (N,) ids.

    Sums in float64, so that rounding over a large vocabulary never picks a token of probability 0.
    """
    cumulative = logps.double().exp().cumsum(-1)
    target = uniform.to(cumulative) * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logps.shape[-1] - 1)


def check_logprobs(lm: LM, traces: Sequence[Trace], max_tokens: int = 4096) -> dict[str, float]:
    """Compare recorded log-probs with those of a fresh, packed forward.

    Returns:
        ``max_difference`` and ``mean_difference`` (nats, absolute) of the temperature-1 log-probs, ``tokens``, and the
        ``bound`` that the model's dtype promises: 1e-4 in float32, 0.25 in bfloat16, 0.05 in float16 (whose rounding of
        one logit, at magnitude 32, is 2^-3 and 2^-6).

    Raises:
        ValueError: no traces, or one without recorded log-probs.
    """
    if not traces:
        raise ValueError("no traces to check; sample some first")
    groups: dict[tuple[int, ...], list[Trace]] = {}
    for i, trace in enumerate(traces):
        if trace.policy_logps is None:
            raise ValueError(f"trace {i} has no recorded log-probs; sample it with pertoken")
        groups.setdefault(trace.prompt_ids, []).append(trace)
    listed = list(groups.values())
    differences = []
    for packed in pack(listed, cost=Cost.of(lm.causal), max_tokens=max_tokens):
        with torch.no_grad():
            stats = token_stats({"policy": lm}, packed, Needs({"policy": frozenset({"logp"})}))["policy"]
        for row, (g, k) in enumerate(packed.order):
            trace = listed[g][k]
            again = stats.logp_NT[row, : len(trace)].double().cpu().numpy()
            differences.append(np.abs(again - trace.policy_logps))
    every = np.concatenate(differences)
    dtype = next(lm.model.parameters()).dtype
    bound = {torch.bfloat16: 0.25, torch.float16: 0.05}.get(dtype, 1e-4)
    return {
        "max_difference": float(every.max()),
        "mean_difference": float(every.mean()),
        "tokens": float(len(every)),
        "bound": bound,
    }
