"""One real pass of tiny models over pairs, and the gradient of an objective's loss, for the tests of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pertoken.core.lm import LM
from pertoken.core.packing import Cost, pack
from pertoken.core.protocols import Batch
from pertoken.core.stats import Needs, Stats, token_stats
from pertoken.core.trace import Trace
from tests import tiny


def exact_lm(seed: int = 0) -> LM:
    """A random two-layer GPT-2 of width 32: float64 throughout, where Llama's norms compute in float32, so that
    identities of gradients hold to 1e-9."""
    config = GPT2Config(
        vocab_size=len(tiny.tokenizer()),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(GPT2LMHeadModel(config).double().eval(), tiny.tokenizer(), name=f"exact-{seed}")


def pair_stats(
    objective: Any, models: Mapping[str, LM], groups: Sequence[Sequence[Trace]], chunk_tokens: int | None = None
) -> tuple[dict[str, Stats], Batch]:
    """Statistics that the objective asks for, gradients of the policy kept, and the batch of (chosen, rejected)."""
    needs = Needs(objective.stats)
    (one,) = pack(groups, cost=Cost(linear=1, attention=1, launch=1e12), max_tokens=1 << 20, ends=needs.ends)
    stats = token_stats(models, one, needs, chunk_tokens, trained="policy")
    place = {o: i for i, o in enumerate(one.order)}
    pairs = torch.tensor([[place[g, 0], place[g, 1]] for g in range(len(groups))])
    return stats, Batch(pairs, rows=tuple(g for g, _ in one.order))


def gradient(value: Tensor, lm: LM) -> Tensor:
    """Gradient with respect to every parameter of the model, as one vector."""
    parameters = list(lm.model.parameters())
    parts = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros(p.numel()).to(p) if g is None else g.flatten() for g, p in zip(parts, parameters)])


def means(loss: Any) -> dict[str, float]:
    """The metrics as they are shown."""
    return {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
