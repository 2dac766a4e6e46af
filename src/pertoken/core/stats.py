"""What a model says of tokens, without ever making a `[B, T, V]` tensor.

Only positions that predict a completion token reach the LM head, a chunk of positions at a time; the backward pass
computes each chunk's logits again. So memory is ``chunk x V`` (one buffer) whatever the batch. All statistics that a run
needs come from one pass (`Needs`), and whatever mixes several models' distributions at one position (a KL, a
distillation target) is a `joint` function that runs inside the same chunk.

Of the built-in statistics ``logp`` and the KLs carry gradients; the others describe and are detached. A method that
wants gradients through another function of the logits gives it as its `joint`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .packing import Pack

if TYPE_CHECKING:
    from .lm import LM

Joint = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]

DESCRIPTIVE = ("entropy", "top1", "top1_logp", "rank", "sumsq")
STATISTICS = ("logp", *DESCRIPTIVE, "hidden", "hidden_all")
_CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MB in float32


@dataclass
class Stats:
    """What one model says of N completions of at most T tokens; 0 beyond a completion's end.

    Attributes:
        mask_NT: True on tokens that the policy emitted. present_NT: True on real tokens, tool outputs too.
        logp_NT: log-prob of each token, natural log, float32 or better.
        extra: other statistics by name, each of shape (N, T) or (N, T, ...): ``entropy`` (nats), ``top1`` (id),
            ``top1_logp``, ``rank`` (0 is the likeliest), ``sumsq`` (sum of squared probabilities), ``hidden`` (N, T, H),
            ``hidden_all`` (N, T, L+1, H), ``kl_forward`` = KL(other || this), ``kl_reverse`` = KL(this || other),
            ``value``, captured modules by their name, and whatever the objective's joint returned.
    """

    mask_NT: Tensor
    logp_NT: Tensor
    present_NT: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        extra = self.__dict__.get("extra", {})
        key = name.removesuffix("_NTLH").removesuffix("_NTH").removesuffix("_NT")
        if key in extra:
            return extra[key]
        raise AttributeError(f"no statistic {name!r}; asked for were: logp, {', '.join(extra) or 'nothing else'}")

    def sums(self) -> Tensor:
        """Log-prob of each completion: sum over emitted tokens, shape (N,)."""
        return masked_sum(self.logp_NT, self.mask_NT)

    def lengths(self) -> Tensor:
        """Emitted tokens of each completion, shape (N,)."""
        return self.mask_NT.sum(1)


@dataclass(frozen=True)
class Needs:
    """What is wanted of each model in one pass.

    Attributes:
        stats: model name -> statistics. ``kl_forward:reference`` on the policy is KL(reference || policy);
            ``kl_reverse:reference`` is KL(policy || reference); ``module:NAME`` captures a module's output.
        joints: functions of several models' logits at one position, by name of who asked.
    """

    stats: Mapping[str, frozenset[str]]
    joints: Mapping[str, Joint] = field(default_factory=dict)

    @classmethod
    def union(cls, needs: Sequence[Needs]) -> Needs:
        """One pass for all of them."""
        names = sorted({name for n in needs for name in n.stats})
        stats = {name: frozenset().union(*(n.stats.get(name, frozenset()) for n in needs)) for name in names}
        joints: dict[str, Joint] = {}
        for n in needs:
            for name, joint in n.joints.items():
                if joints.setdefault(name, joint) is not joint:
                    raise ValueError(f"two different joint functions are called {name!r}; give each its own name")
        return cls(stats, joints)


def masked_sum(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Sum over tokens where the mask holds; what stands elsewhere, NaN even, does not count. Shape (N,)."""
    return torch.where(mask_NT, values_NT, torch.zeros((), dtype=values_NT.dtype, device=values_NT.device)).sum(1)


def masked_mean(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean over tokens where the mask holds; 0 for an empty completion. Shape (N,)."""
    return masked_sum(values_NT, mask_NT) / mask_NT.sum(1).clamp(min=1)


class Head:
    """The map from hidden state to logits of a causal LM, with the scalings that some architectures add after it.

    Raises:
        ValueError: the architecture does something else to its logits (checked once, on four tokens).
    """

    def __init__(self, causal: Any):
        config = causal.config.get_text_config()
        self.module = causal.get_output_embeddings()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        self.scale = float(scale) if scale else 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
        plain = type(self.module) is nn.Linear and not self.softcap and type(self.module.weight) is nn.Parameter
        self.fused = plain and self.scale == 1.0
        if causal not in _checked_heads:
            ids = torch.arange(4, device=self.module.weight.device)[None] % config.vocab_size
            with torch.no_grad():
                ours = self(causal.base_model(input_ids=ids, use_cache=False).last_hidden_state)
                theirs = causal(input_ids=ids, use_cache=False).logits.to(ours.dtype)
            if not torch.allclose(ours, theirs, atol=1e-2, rtol=1e-2):
                raise ValueError(f"{type(causal).__name__} changes its logits after the head in a way not known here")
            _checked_heads[causal] = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits in float32 or better, shape (..., V)."""
        logits = _at_least_float32(self.module(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


_checked_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TokenStats(nn.Module):
    """One pass over a pack: the module that training wraps (DDP, FSDP), so that its forward is the model's.

    Args:
        lm: the model whose parameters are trained or read.
        name: its name among the needs, ``policy`` by default.
    """

    def __init__(self, lm: LM, name: str = "policy"):
        super().__init__()
        self.model = lm.model
        self._lm = [lm]  # in a list, so that torch does not look for modules inside
        self.name = name

    def forward(
        self, pack: Pack, needs: Needs, others: Mapping[str, LM] | None = None, chunk_tokens: int | None = None
    ) -> dict[str, Stats]:
        """Statistics of every model that `needs` names; `others` run without gradients."""
        return token_stats({self.name: self._lm[0], **(others or {})}, pack, needs, chunk_tokens, trained=self.name)


def token_stats(
    models: Mapping[str, LM],
    pack: Pack,
    needs: Needs,
    chunk_tokens: int | None = None,
    *,
    trained: str | None = None,
) -> dict[str, Stats]:
    """Statistics of each model on one pack.

    Args:
        models: by name; all those that `needs` names.
        pack: the laid-out completions, N of at most T tokens.
        needs: what is wanted.
        chunk_tokens: positions that reach the LM head together; default: 64 MB of float32 logits.
        trained: the one model whose gradients are kept (if autograd is on); None keeps those of all.

    Returns:
        Stats by model name. A joint's values stand in the `extra` of every model it was asked beside (the first name).
    """
    missing = set(needs.stats) - set(models)
    if missing:
        raise ValueError(f"statistics of {', '.join(sorted(missing))} are needed, but no such model was given")
    device = next(iter(models.values())).device
    pack = pack.to(device)
    where = pack.present_NT
    ids_M = pack.ids_NT[where]
    hidden, heads, extras = {}, {}, {name: {} for name in needs.stats}
    for name in needs.stats:
        lm = models[name]
        with lm.active() as causal, _gradients(trained in (None, name)):
            heads[name] = Head(causal)
            hidden[name], extras[name] = _forward(causal, pack, pack.predict_NT[where], needs.stats[name])
    chunked = _chunks(hidden, heads, models, ids_M, needs, chunk_tokens)
    out = {}
    for name in needs.stats:
        flat = chunked[name]
        full = {key: _scatter(value, where) for key, value in (flat | extras[name]).items()}
        logp = full.pop("logp", None)
        out[name] = Stats(pack.mask_NT, torch.zeros(()) if logp is None else logp, where, full)
    return out


def _forward(causal: Any, pack: Pack, predict_M: Tensor, wants: frozenset[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states at the predicting positions, and what else the layers said there, gathered while they run."""
    taken: dict[str, Tensor] = {}

    def gather(output: Any) -> Tensor:
        tensor = output[0] if isinstance(output, tuple) else output
        return tensor.flatten(0, 1)[predict_M]

    modules = {w.removeprefix("module:"): w for w in wants if w.startswith("module:")}
    with contextlib.ExitStack() as stack:
        for path, key in modules.items():
            try:
                module = causal.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"the model has no module {path!r}; print(model) lists their names") from error

            def keep(_m: nn.Module, _i: Any, output: Any, key: str = key) -> None:
                taken[key.removeprefix("module:")] = gather(output)

            stack.callback(module.register_forward_hook(keep).remove)
        layers: list[Tensor] = []
        if "hidden_all" in wants:
            for layer in _layers(causal):

                def before(_m: nn.Module, args: Any, kwargs: Any) -> None:
                    layers.append(gather(args[0] if args else kwargs["hidden_states"]))

                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        last = causal.base_model(**pack.inputs(causal)).last_hidden_state.flatten(0, 1)[predict_M]
    if "hidden_all" in wants:
        taken["hidden_all"] = torch.stack([*layers, last], dim=1)  # embeddings, layers 1..L-1, normed last: (M, L+1, H)
    if "hidden" in wants:
        taken["hidden"] = last
    return last, taken


def _chunks(
    hidden: dict[str, Tensor],
    heads: dict[str, Head],
    models: Mapping[str, LM],
    ids_M: Tensor,
    needs: Needs,
    chunk_tokens: int | None,
) -> dict[str, dict[str, Tensor]]:
    """Everything that needs logits, chunk after chunk. Values by model name and statistic, shape (M,)."""
    names = list(needs.stats)
    between = {name: [w for w in needs.stats[name] if w.startswith("kl_")] for name in names}
    others = {w.partition(":")[2] for name in names for w in between[name]}
    if others - set(names):
        raise ValueError(f"a KL to {', '.join(sorted(others - set(names)))} is wanted; name that model's stats too")
    # Models whose whole distribution meets another's go through one checkpointed function; the rest are separate.
    together = sorted(set(names) if needs.joints else others | {n for n in names if between[n]}, key=names.index)
    out: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name in names:
        if name in together or not needs.stats[name] & {"logp", *DESCRIPTIVE}:
            continue
        step = chunk_tokens or _default_chunk(heads[name])
        wants = tuple(sorted(needs.stats[name] & set(DESCRIPTIVE)))
        with models[name].active():
            parts = [
                _one_model(h, ids, heads[name], wants)
                for h, ids in zip(hidden[name].split(step), ids_M.split(step), strict=True)
            ]
        out[name] = _cat(parts)
    if together:
        step = chunk_tokens or max(1, min(_default_chunk(heads[n]) for n in together) // len(together))

        def chunk(ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            with contextlib.ExitStack() as stack:
                logits = {}
                for n, h in zip(together, states, strict=True):
                    with models[n].active():
                        logits[n] = heads[n](h)
                del stack
            values = _together(logits, ids, needs, between)
            keys.clear()
            keys.extend(values)
            return tuple(values.values())

        keys: list[tuple[str, str]] = []
        rows = []
        splits = zip(ids_M.split(step), *(hidden[n].split(step) for n in together), strict=True)
        for ids, *states in splits:
            rows.append(checkpoint(chunk, ids, *states, use_reentrant=False) if torch.is_grad_enabled() else chunk(ids, *states))
        for k, (name, key) in enumerate(keys):
            out[name][key] = torch.cat([row[k] for row in rows])
    return out


def _together(
    logits: dict[str, Tensor], ids: Tensor, needs: Needs, between: dict[str, list[str]]
) -> dict[tuple[str, str], Tensor]:
    """Statistics of one chunk of several models: logits (chunk, V) each."""
    values: dict[tuple[str, str], Tensor] = {}
    logps = {n: torch.log_softmax(x, -1) for n, x in logits.items()}
    for n, logp in logps.items():
        values[n, "logp"] = logp.gather(-1, ids[:, None])[:, 0]
        wants = needs.stats[n] & set(DESCRIPTIVE)
        if wants:
            with torch.no_grad():
                for key, value in _describe(logp, ids, tuple(sorted(wants))).items():
                    values[n, key] = value
        for want in between.get(n, []):
            direction, _, other = want.partition(":")
            p, q = (logps[other], logp) if direction == "kl_forward" else (logp, logps[other])
            values[n, want] = kl_divergence(p, q)
    for joint in needs.joints.values():
        for key, value in joint(logits, ids).items():
            values[next(iter(logits)), key] = value
    return values


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis, from log-probs; 0 log 0 = 0, and infinite where q lacks p's support."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), torch.zeros_like(p)).sum(-1)


def _one_model(hidden: Tensor, ids: Tensor, head: Head, wants: tuple[str, ...]) -> dict[str, Tensor]:
    if head.fused:
        values = _FusedLogProb.apply(hidden, head.module.weight, head.module.bias, ids, wants)
        return dict(zip(("logp", *wants), values, strict=True))

    def chunk(h: Tensor) -> tuple[Tensor, ...]:
        logp = torch.log_softmax(head(h), -1)
        with torch.no_grad():
            described = _describe(logp, ids, wants)
        return (logp.gather(-1, ids[:, None])[:, 0], *(described[w] for w in wants))

    values = checkpoint(chunk, hidden, use_reentrant=False) if torch.is_grad_enabled() else chunk(hidden)
    return dict(zip(("logp", *wants), values, strict=True))


def _describe(logp: Tensor, ids: Tensor, wants: tuple[str, ...]) -> dict[str, Tensor]:
    """Descriptive statistics of log-probs (chunk, V) at the drawn `ids` (chunk,)."""
    out: dict[str, Tensor] = {}
    chosen = logp.gather(-1, ids[:, None])
    for want in wants:
        if want == "entropy":
            out[want] = -torch.where(logp > -torch.inf, logp * logp.exp(), 0.0).sum(-1)
        elif want == "rank":
            out[want] = (logp > chosen).sum(-1)
        elif want == "sumsq":
            out[want] = (2 * logp).exp().sum(-1)
        elif want == "top1":
            out[want] = logp.argmax(-1)
        elif want == "top1_logp":
            out[want] = logp.amax(-1)
    return out


class _FusedLogProb(torch.autograd.Function):
    """log softmax(h W^T + b)[ids] with one (chunk, V) buffer in each direction.

    The gradient of a token's log-prob with respect to its logits is ``onehot(id) - softmax``; the backward pass makes
    the logits again and turns that one buffer into it in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, wants: tuple[str, ...]):
        logits = _at_least_float32(F.linear(hidden, weight, bias))
        lse = torch.logsumexp(logits, -1)
        logp = logits.gather(-1, ids[:, None])[:, 0] - lse
        described = _describe(logits.sub_(lse[:, None]), ids, wants) if wants else {}
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        values = tuple(described[w] for w in wants)
        ctx.mark_non_differentiable(*values)
        return (logp, *values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_described: Tensor):
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        delta = _at_least_float32(F.linear(hidden, weight, bias)).sub_(lse[:, None]).exp_()
        delta.mul_(-grad[:, None])
        delta.scatter_add_(-1, ids[:, None], grad[:, None].to(delta.dtype))
        delta = delta.to(hidden.dtype)
        needs = ctx.needs_input_grad
        d_hidden = delta @ weight if needs[0] else None
        d_weight = delta.T @ hidden if needs[1] else None
        d_bias = delta.sum(0) if bias is not None and needs[2] else None
        return d_hidden, d_weight, d_bias, None, None


def _default_chunk(head: Head) -> int:
    return max(16, _CHUNK_ELEMENTS // head.module.weight.shape[0])


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}


def _scatter(flat: Tensor, where: Tensor) -> Tensor:
    """(M, ...) values back to (N, T, ...), zeros elsewhere."""
    full = flat.new_zeros((*where.shape, *flat.shape[1:]))
    return full.index_put((where.nonzero(as_tuple=True)), flat)


def _layers(causal: Any) -> Iterator[nn.Module]:
    """The decoder layers: the one ModuleList of the backbone that is as long as the model is deep."""
    depth = causal.config.get_text_config().num_hidden_layers
    for module in causal.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return iter(module)
    raise ValueError(f"{type(causal).__name__} has no list of {depth} layers; ask for module:NAME instead")


def _gradients(on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.enable_grad() if on and torch.is_grad_enabled() else torch.no_grad()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
