"""What a model says of tokens, without ever making a `[B, T, V]` tensor.

Only positions that predict a completion token reach the LM head, a chunk of positions at a time; the backward pass
computes each chunk's logits again. So memory is ``chunk x V`` (one buffer) whatever the batch. All statistics that a
run needs come from one pass (`Needs`), and whatever mixes several models' distributions at one position (a KL, a
distillation target) is a `joint` function that runs inside the same chunk.

Of the built-in statistics ``logp`` and the KLs carry gradients; the others describe and are detached. A method that
wants gradients through another function of the logits gives it as its `joint`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .capture import HOW, Captures
from .head import DESCRIPTIVE, Head, log_probs
from .joint import Joint, compare, joint_values
from .packing import Pack

if TYPE_CHECKING:
    from .lm import LM

PER_COMPLETION = ("hidden_prompt", "hidden_end")
STATISTICS = ("logp", *DESCRIPTIVE, "hidden", "hidden_all", *PER_COMPLETION)
_PREFIXES = ("module:", "kl_forward:", "kl_reverse:", *(f"{how}:" for how in HOW))
_CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MB in float32


@dataclass
class Stats:
    """What one model says of N completions of at most T tokens; 0 beyond a completion's end.

    Attributes:
        mask_NT: True on tokens that the policy emitted. present_NT: True on real tokens, tool outputs too.
        logp_NT: log-prob of each token, natural log, float32 or better; NaN if nothing was wanted that needs it.
        extra: other statistics by name, each of shape (N, T) or (N, T, ...): ``entropy`` (nats), ``top1`` (id),
            ``top1_logp``, ``margin`` (log-prob of the likeliest less that of the second), ``rank`` (0 is the
            likeliest), ``sumsq`` (sum of squared probabilities), ``hidden`` (N, T, H), ``hidden_all`` (N, T, L+1, H),
            ``kl_forward:OTHER`` = KL(other || this), ``kl_reverse:OTHER`` = KL(this || other), captured modules by
            their name, ``mean:NAMES`` and ``sigmoid:NAMES`` (N, T, K), one number of each of K modules (`capture`), and
            whatever the objectives' joints returned. ``hidden`` stands at the position that predicts a token. Of each
            completion, (N, H): ``hidden_prompt`` at the prompt's last token and ``hidden_end`` at the completion's own
            last one (the prompt's, if it is empty).
            ``stats.entropy_NT`` is ``stats.extra["entropy"]``; so with _NTH, _NTLH and _NH.
    """

    mask_NT: Tensor
    logp_NT: Tensor
    present_NT: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        extra = self.__dict__.get("extra", {})
        for key in (name, *(name.removesuffix(suffix) for suffix in ("_NT", "_NTH", "_NTLH", "_NH"))):
            if key in extra:
                return extra[key]
        raise AttributeError(f"no statistic {name!r}; there are: logp_NT, {', '.join(extra) or 'nothing else'}")

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
            ``kl_reverse:reference`` is KL(policy || reference); ``module:NAME`` captures a module's output;
            ``mean:NAMES`` that of many, reduced over features (`capture`; also ``sigmoid:NAMES``; no gradients).
        joints: functions of several models' logits at one position, by name of who asked: {model: (chunk, V)} and ids
            (chunk,) -> {statistic: (chunk,)}. They see the logits of every model in `stats`.

    Raises:
        ValueError: a statistic that is not known.
    """

    stats: Mapping[str, frozenset[str]]
    joints: Mapping[str, Joint] = field(default_factory=dict)

    def __post_init__(self):
        for name, wants in self.stats.items():
            odd = [w for w in wants if w not in STATISTICS and not w.startswith(_PREFIXES)]
            if odd:
                raise ValueError(
                    f"{', '.join(sorted(odd))} wanted of {name}: not one of {', '.join(STATISTICS)}, kl_forward:MODEL, "
                    "kl_reverse:MODEL, module:NAME, mean:NAMES, sigmoid:NAMES"
                )

    @property
    def ends(self) -> bool:
        """Whether a completion's last token must be fed, too (`packing.pack`)."""
        return any("hidden_end" in wants for wants in self.stats.values())

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
        trained: the one model whose gradients are kept (if autograd is on); None keeps those of all. A view with
            adapters off (`LM.reference` under LoRA) never has any.

    Returns:
        Stats by model name. A joint's values stand in the `extra` of every model.

    Raises:
        ValueError: a model that is needed but not given; vocabularies of two sizes that are to be compared; a module
            that does not exist or did not run; ``hidden_end`` of a pack made without `ends`.
    """
    missing = set(needs.stats) - set(models)
    if missing:
        raise ValueError(f"statistics of {', '.join(sorted(missing))} are needed, but no such model was given")
    device = next(iter(models.values())).device
    pack = pack.to(device)
    where = pack.present_NT
    hidden, parts, extras = {}, {}, {}
    for name in needs.stats:
        lm = models[name]
        learns = trained in (None, name) and not lm.adapter_off
        with lm.active() as causal, _gradients(learns):
            parts[name] = _Part(lm, Head(causal), learns)
            hidden[name], extras[name] = _forward(causal, pack, where, needs.stats[name])
    chunked = _chunks(hidden, parts, pack.ids_NT[where], needs, chunk_tokens, trained is not None)
    out = {}
    for name in needs.stats:
        values = (chunked[name] | extras[name]).items()
        full = {key: value if key in PER_COMPLETION else _scatter(value, where) for key, value in values}
        unknown = torch.full(where.shape, torch.nan, device=device)
        out[name] = Stats(pack.mask_NT, full.pop("logp", unknown), where, full)
    return out


@dataclass(frozen=True)
class _Part:
    """What a model brings to the chunks."""

    lm: LM
    head: Head
    learns: bool

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block, its head may run: without gradients unless it learns, adapters in the head as they should
        be. A checkpoint runs its function again, in backward, so the block has to be inside of that function."""
        with _gradients(self.learns), contextlib.nullcontext() if self.head.plain else self.lm.active():
            yield


def _forward(causal: Any, pack: Pack, where_NT: Tensor, wants: frozenset[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states at the predicting positions, and what else the layers said there."""
    predict_M = pack.predict_NT[where_NT]
    whole = {"hidden_prompt": pack.prompt_N, "hidden_end": pack.end_N}
    single = {key: index for key, index in whole.items() if key in wants}
    if any(index is None for index in single.values()):
        raise ValueError("hidden_end is wanted, but the last tokens are not laid out; pack(..., ends=True)")
    taken: dict[str, Tensor] = {}
    inputs = pack.inputs(causal)  # before there are hooks: it may try the model
    # Gathered while the layers run, to hold little; with autograd on afterwards, because a layer that is checkpointed
    # runs again in backward, and then without the gathering (and its output is kept for backward anyway).
    early = not torch.is_grad_enabled()

    def gather(output: Tensor) -> Tensor:
        return output.flatten(0, 1)[predict_M]

    def take(output: Any) -> Tensor:
        tensor = output[0] if isinstance(output, tuple) else output
        return gather(tensor) if early else tensor

    modules = {w.removeprefix("module:"): w for w in wants if w.startswith("module:")}
    with contextlib.ExitStack() as stack:
        for path, key in modules.items():
            try:
                module = causal.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"the model has no module {path!r}; print(model) lists their names") from error

            def keep(_m: nn.Module, _i: Any, output: Any, key: str = key) -> None:
                taken[key.removeprefix("module:")] = take(output)

            stack.callback(module.register_forward_hook(keep).remove)
        layers: list[Tensor] = []
        if "hidden_all" in wants:
            for layer in layers_of(causal):

                def before(_m: nn.Module, args: Any, kwargs: Any) -> None:
                    layers.append(take(args[0] if args else kwargs["hidden_states"]))

                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        reduced = [w for w in sorted(wants) if w.partition(":")[0] in HOW]
        captures = Captures(causal, reduced, pack.input_ids_RC.shape, gather, stack)
        states = causal.base_model(**inputs).last_hidden_state
        last = gather(states)
    if not early:
        taken, layers = {path: gather(output) for path, output in taken.items()}, [gather(x) for x in layers]
    idle = [key for path, key in modules.items() if path not in taken]
    if idle:
        raise ValueError(f"{', '.join(idle)} did not run in the backbone; ask for a module inside of it")
    taken |= captures.values()
    if "hidden_all" in wants:
        taken["hidden_all"] = torch.stack([*layers, last], dim=1)  # embeddings, layers 1..L-1, normed last: (M, L+1, H)
    if "hidden" in wants:
        taken["hidden"] = last
    return last, taken | {key: states.flatten(0, 1)[index] for key, index in single.items()}


def _chunks(
    hidden: dict[str, Tensor],
    parts: dict[str, _Part],
    ids_M: Tensor,
    needs: Needs,
    chunk_tokens: int | None,
    once: bool,
) -> dict[str, dict[str, Tensor]]:
    """Everything that needs logits, chunk after chunk. Values by model name and statistic, shape (M,). `once`: a single
    model is trained, and nobody asks for second derivatives."""
    names = list(needs.stats)
    compared = {name: {w.partition(":")[2] for w in needs.stats[name] if w.startswith("kl_")} for name in names}
    others = set().union(*compared.values())
    if others - set(names):
        raise ValueError(f"a KL to {', '.join(sorted(others - set(names)))} is wanted; name that model's stats too")
    # Models whose whole distribution meets another's go through one checkpointed function; the rest are separate.
    together = [n for n in names if needs.joints or n in others or compared[n]]
    out: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name in names:
        if name in together or not needs.stats[name] & {"logp", *DESCRIPTIVE}:
            continue
        step = chunk_tokens or _default_chunk(parts[name].head)
        wants = tuple(sorted(needs.stats[name] & set(DESCRIPTIVE)))
        with _gradients(parts[name].learns):
            out[name] = log_probs(hidden[name], ids_M, parts[name].head, wants, parts[name].ready, step)
    if not together:
        return out
    sizes = {n: parts[n].head.vocabulary for n in together}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"distributions over vocabularies of different sizes cannot be compared: {sizes}")
    # A divergence and its gradient hold some four buffers a model at once, a single model's log-probs only one.
    step = chunk_tokens or max(32, min(_default_chunk(parts[n].head) for n in together) // (4 * len(together)))
    learners = [n for n in together if parts[n].learns]
    values = joint_values(
        {n: hidden[n] for n in together},
        {n: parts[n].head for n in together},
        {n: parts[n].ready for n in together},
        ids_M,
        lambda logits, ids: compare(logits, ids, needs.stats, needs.joints, STATISTICS),
        step,
        learners[0] if once and len(learners) == 1 else None,
    )
    for (name, key), value in values.items():
        for n in [name] if name else names:
            out[n][key] = value
    return out


def _default_chunk(head: Head) -> int:
    return max(16, _CHUNK_ELEMENTS // head.vocabulary)


def _scatter(flat: Tensor, where: Tensor) -> Tensor:
    """(M, ...) values back to (N, T, ...), zeros elsewhere."""
    full = flat.new_zeros((*where.shape, *flat.shape[1:]))
    return full.index_put((where.nonzero(as_tuple=True)), flat)


def layers_of(causal: Any) -> Iterator[nn.Module]:
    """The decoder layers: the one ModuleList of the backbone that is as long as the model is deep."""
    depth = causal.config.get_text_config().num_hidden_layers
    for module in causal.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return iter(module)
    raise ValueError(f"{type(causal).__name__} has no list of {depth} layers; ask for module:NAME instead")


def _gradients(on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.enable_grad() if on and torch.is_grad_enabled() else torch.no_grad()
