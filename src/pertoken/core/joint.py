"""Statistics that several models' whole distributions make at one position: KLs, and the objectives' own functions.

They are made a chunk of positions at a time. Where one model learns and its head is a plain linear map, `_Fused` makes
each chunk again in backward and adds the head's gradient up in one buffer; elsewhere checkpoints do the same, at the
price of one more tensor of the head's size a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .head import DESCRIPTIVE, Head, at_least_float32, describe, kl_divergence

Joint = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
Key = tuple[str, str]  # model ("" for what belongs to no single one) and statistic
Together = Callable[[dict[str, Tensor], Tensor], dict[Key, Tensor]]


def joint_values(
    hidden: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    ready: Mapping[str, Callable[[], contextlib.AbstractContextManager[None]]],
    ids_M: Tensor,
    together: Together,
    step: int,
    learner: str | None,
) -> dict[Key, Tensor]:
    """What `together` says of M positions, `step` of them at a time: (M,) a key.

    Args:
        hidden: states (M, H) of each model. heads, ready: its head, and a context that the head runs in.
        ids_M: the drawn tokens.
        together: {model: logits (chunk, V)} and ids (chunk,) -> values (chunk,).
        learner: the only model with gradients, if they are wanted once and its head can be fused.
    """
    names = list(hidden)
    again = torch.is_grad_enabled()
    if again and learner is not None and heads[learner].fused and not torch.is_autocast_enabled(ids_M.device.type):
        return _fused(hidden, heads, ready, ids_M, together, step, learner)
    keys: list[Key] = []

    def chunk(ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        logits = {}
        for n, h in zip(names, states, strict=True):
            with ready[n]():
                logits[n] = heads[n](h)
        values = together(logits, ids)
        keys[:] = values
        return tuple(values.values())

    rows = []
    for ids, *states in zip(ids_M.split(step), *(hidden[n].split(step) for n in names), strict=True):
        rows.append(checkpoint(chunk, ids, *states, use_reentrant=False) if again else chunk(ids, *states))
    return dict(zip(keys, map(torch.cat, zip(*rows, strict=True)), strict=True)) if rows else {}


def _fused(
    hidden: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    ready: Mapping[str, Callable[[], contextlib.AbstractContextManager[None]]],
    ids_M: Tensor,
    together: Together,
    step: int,
    learner: str,
) -> dict[Key, Tensor]:
    others = [n for n in hidden if n != learner]

    def values(own: Tensor, ids: Tensor, states: Sequence[Tensor]) -> dict[Key, Tensor]:
        logits = {learner: own}
        with torch.no_grad():
            for n, h in zip(others, states, strict=True):
                with ready[n]():
                    logits[n] = heads[n](h)
        return together({n: logits[n] for n in hidden}, ids)

    # One position says which values there are, and which of them have a gradient.
    with torch.enable_grad():
        one = heads[learner](hidden[learner][:1].detach()).detach().requires_grad_()
        found = values(one, ids_M[:1], [hidden[n][:1] for n in others])
    learns = tuple(v.requires_grad for v in found.values())
    module = heads[learner].module
    rows = _Fused.apply(
        hidden[learner], module.weight, module.bias, ids_M, values, learns, step, *(hidden[n] for n in others)
    )
    return dict(zip(found, rows, strict=True))


class _Fused(torch.autograd.Function):
    """Values of M positions from the learner's states, a chunk at a time, in forward and again in backward.

    With G the gradient of a chunk's values by the learner's logits: dh = G W, dW = sum over chunks of G^T h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        values: Callable[[Tensor, Tensor, Sequence[Tensor]], dict[Key, Tensor]],
        learns: tuple[bool, ...],
        step: int,
        *others: Tensor,
    ):
        ctx.save_for_backward(hidden, weight, bias, ids, *others)
        ctx.values, ctx.learns, ctx.step = values, learns, step
        rows = []
        for h, i, *states in zip(*(x.split(step) for x in (hidden, ids, *others)), strict=True):
            rows.append(tuple(values(at_least_float32(F.linear(h, weight, bias)), i, states).values()))
        out = tuple(map(torch.cat, zip(*rows, strict=True)))
        ctx.mark_non_differentiable(*(v for v, has in zip(out, learns, strict=True) if not has))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("no second derivative through a trained model's head; ask token_stats without `trained`")
        hidden, weight, bias, ids, *others = ctx.saved_tensors
        needs, d_hidden = ctx.needs_input_grad, []
        d_weight = torch.zeros_like(weight) if needs[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        wanted = [k for k, has in enumerate(ctx.learns) if has]
        chunks = zip(*(x.split(ctx.step) for x in (hidden, ids, *(grads[k] for k in wanted), *others)), strict=True)
        for h, i, *rest in chunks:
            given, states = rest[: len(wanted)], rest[len(wanted) :]
            with torch.enable_grad():
                own = at_least_float32(F.linear(h, weight, bias)).detach().requires_grad_()
                made = list(ctx.values(own, i, states).values())
                (g,) = torch.autograd.grad([made[k] for k in wanted], [own], given)
            del own, made
            g = g.to(weight.dtype)
            if needs[0]:
                d_hidden.append((g @ weight).to(h.dtype))
            if d_weight is not None:
                d_weight.addmm_(g.T, h.to(weight.dtype))
            if d_bias is not None:
                d_bias.add_(g.sum(0))
        return (torch.cat(d_hidden) if needs[0] else None, d_weight, d_bias, *[None] * (4 + len(others)))


def compare(
    logits: dict[str, Tensor],
    ids: Tensor,
    stats: Mapping[str, frozenset[str]],
    joints: Mapping[str, Joint],
    reserved: Sequence[str],
) -> dict[Key, Tensor]:
    """Statistics of one chunk of several models: logits (chunk, V) each. Those of joints belong to no single model.

    Args:
        stats: what is wanted of each. joints: the objectives' own functions. reserved: names that they may not take.
    """
    values: dict[Key, Tensor] = {}
    logps = {n: torch.log_softmax(x, -1) for n, x in logits.items()}
    for n, logp in logps.items():
        values[n, "logp"] = logp.gather(-1, ids[:, None])[:, 0]
        with torch.no_grad():
            described = describe(logp, ids, tuple(sorted(stats[n] & set(DESCRIPTIVE))))
        values |= {(n, key): value for key, value in described.items()}
        for want in sorted(w for w in stats[n] if w.startswith("kl_")):
            direction, _, other = want.partition(":")
            p, q = (logps[other], logp) if direction == "kl_forward" else (logp, logps[other])
            values[n, want] = kl_divergence(p, q)
    for name, joint in joints.items():
        for key, value in joint(logits, ids).items():
            if key in reserved or ("", key) in values:
                raise ValueError(f"{name} calls a statistic {key!r}, which exists already; give it a name of its own")
            values["", key] = value
    return values
