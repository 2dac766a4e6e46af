"""From hidden states to log-probs: the LM head, and what a chunk of its logits says. `stats` feeds it chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .packing import evaluating

DESCRIPTIVE = ("entropy", "top1", "top1_logp", "margin", "rank", "quantile", "mass", "sumsq")


class Head:
    """The map from hidden state to logits of a causal LM, with the scalings that some architectures add after it.

    Attributes:
        module: the output embedding; `plain` if it is an ordinary linear layer, which no adapter has wrapped.
        vocabulary: V.

    Raises:
        ValueError: the architecture does something else to its logits (checked once, on four tokens).
    """

    def __init__(self, causal: Any):
        config = causal.config.get_text_config()
        self.module = causal.get_output_embeddings()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        self.scale = float(scale) if scale else 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
        self.plain = type(self.module) is nn.Linear and type(self.module.weight) is nn.Parameter
        self.fused = self.plain and not self.softcap and self.scale == 1.0
        self.vocabulary = int(self.module.weight.shape[0])
        if causal not in _checked_heads:
            self._check(causal, config.vocab_size)
            _checked_heads[causal] = True

    def _check(self, causal: Any, vocabulary: int) -> None:
        if causal.base_model is causal:
            raise ValueError(f"{type(causal).__name__} has no backbone that runs without its head")
        ids = torch.arange(4, device=self.module.weight.device)[None] % vocabulary
        with torch.no_grad(), evaluating(causal):
            ours = self(causal.base_model(input_ids=ids, use_cache=False).last_hidden_state)
            theirs = causal(input_ids=ids, use_cache=False).logits.to(ours.dtype)
        if not bool((ours - theirs).abs().max() <= 1e-2 * theirs.abs().max()):
            raise ValueError(f"{type(causal).__name__} changes its logits after the head in a way not known here")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits in float32 or better, shape (..., V)."""
        return self.finished(at_least_float32(self.module(hidden)))

    def finished(self, logits: Tensor) -> Tensor:
        """What the architecture makes of the products with output rows: scaled, capped."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


_checked_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def log_probs(
    hidden: Tensor,
    ids: Tensor,
    head: Head,
    wants: tuple[str, ...],
    ready: Callable[[], AbstractContextManager[None]],
    step: int,
) -> dict[str, Tensor]:
    """``logp`` and the descriptive statistics `wants` of one model.

    Args:
        hidden, ids: of M positions, (M, H) and (M,).
        ready: entered whenever the head runs, in backward too.
        step: positions whose logits exist together.

    Returns:
        (M,) each.
    """
    if head.fused:
        values = _FusedLogProb.apply(hidden, head.module.weight, head.module.bias, ids, wants, step)
        return dict(zip(("logp", *wants), values, strict=True))

    def chunk(h: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        with ready():
            logp = torch.log_softmax(head(h), -1)
        with torch.no_grad():
            described = describe(logp, i, wants)
        return (logp.gather(-1, i[:, None])[:, 0], *(described[w] for w in wants))

    rows = []
    for h, i in zip(hidden.split(step), ids.split(step), strict=True):
        rows.append(checkpoint(chunk, h, i, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, i))
    return dict(zip(("logp", *wants), map(torch.cat, zip(*rows, strict=True)), strict=True))


def describe(logp: Tensor, ids: Tensor, wants: tuple[str, ...]) -> dict[str, Tensor]:
    """Descriptive statistics of log-probs (chunk, V) at the drawn `ids` (chunk,)."""
    out: dict[str, Tensor] = {}
    chosen = logp.gather(-1, ids[:, None])
    for want in wants:
        if want == "entropy":
            out[want] = -torch.where(logp > -torch.inf, logp * logp.exp(), 0.0).sum(-1)
        elif want == "rank":
            out[want] = (logp > chosen).sum(-1)
        elif want == "quantile":
            out[want] = (logp >= chosen).sum(-1).to(logp) / logp.shape[-1]
        elif want == "mass":
            out[want] = torch.where(logp >= chosen, logp.exp(), 0.0).sum(-1)
        elif want == "sumsq":
            out[want] = (2 * logp).exp().sum(-1)
        elif want == "top1":
            out[want] = logp.argmax(-1)
        elif want == "top1_logp":
            out[want] = logp.amax(-1)
        elif want == "margin":
            best = logp.topk(2, -1).values
            out[want] = best[:, 0] - best[:, 1]
    return out


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis, from log-probs; 0 log 0 = 0, and infinite where q lacks p's support."""
    p = logp.exp()
    # the difference is chosen, not the product: the gradient of 0 * inf would be NaN
    return (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)


class _FusedLogProb(torch.autograd.Function):
    """log softmax(h W^T + b)[ids], a chunk of (step, V) at a time.

    With p the probabilities and g what comes from above, the gradients of a token's log-prob are

        dh = g (W[id] - p W),    dW = (onehot(id) - p)^T (g h),    db = g (onehot(id) - p).

    The p of the last chunk are kept for backward, which needs such a buffer anyway; those of the others are made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, wants: tuple[str, ...], step: int
    ):
        rows, sums, logp = [], [], hidden
        for h, i in zip(hidden.split(step), ids.split(step), strict=True):
            logits = at_least_float32(F.linear(h, weight, bias))
            sums.append(torch.logsumexp(logits, -1, keepdim=True))
            logp = logits.sub_(sums[-1])
            described = describe(logp, i, wants) if wants else {}
            rows.append((logp.gather(-1, i[:, None])[:, 0], *(described[w] for w in wants)))
        ctx.save_for_backward(hidden, weight, bias, ids, torch.cat(sums), logp.exp_())
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        ctx.step = step
        values = tuple(map(torch.cat, zip(*rows, strict=True)))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_described: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("no second derivative through the LM head; compute what needs it in a joint")
        hidden, weight, bias, ids, sums, last = ctx.saved_tensors
        needs, d_hidden = ctx.needs_input_grad, []
        d_weight = torch.empty_like(weight) if needs[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        chunks = list(zip(*(x.split(ctx.step) for x in (hidden, ids, sums, grad[:, None])), strict=True))
        for n, (h, i, z, g) in enumerate(chunks):
            p = last
            if n < len(chunks) - 1:
                with torch.autocast(h.device.type, enabled=ctx.autocast[0], dtype=ctx.autocast[1]):  # as forward was
                    p = F.linear(h, weight, bias)
                p = at_least_float32(p).sub_(z).exp_()
            p = p.to(weight.dtype)
            if needs[0]:
                d_hidden.append((g * (weight[i] - p @ weight)).to(h.dtype))
            if d_weight is not None:
                gh = (g * h).to(weight.dtype)
                d_weight.addmm_(p.T, gh, beta=min(n, 1), alpha=-1).index_add_(0, i, gh)
            if d_bias is not None:
                g = g[:, 0].to(p.dtype)
                d_bias.sub_(p.T @ g).index_add_(0, i, g)
        return torch.cat(d_hidden) if needs[0] else None, d_weight, d_bias, None, None, None


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, in float32 if it had less."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
