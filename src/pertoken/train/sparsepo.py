"""SparsePO — Controlling Preference Alignment of LLMs via Sparse Token Masks.

Christopoulou, Cardenas, Lampouras, Bou-Ammar, Wang (Huawei Noah's Ark), Findings of EMNLP 2025, arXiv 2410.05102. Each
token of a response has its own weight for reward and for KL, learnt and driven to exact zeros:

    u(y) = sum_t M_u,t ( log pi(y_t|.) - log pi_ref(y_t|.) )      d(y) = sum_t M_d,t KL( pi_ref(.|y_<t) || pi(.|y_<t) )
    L = -log sigmoid( beta [ (u(y_w) - u(y_l)) - (d(y_l) - d(y_w)) ] )
        + l1_u ( |M_u(y_w)|_1 + |M_u(y_l)|_1 ) + l1_d ( |M_d(y_w)|_1 + |M_d(y_l)|_1 ),   mean over pairs
    h_l = Dropout(ReLU(w_l . LN(x_l) + b_l)),   M = Dropout(ReLU(sum_l a_l h_l))         l = 1..L, x_l of the reference

In nats, over emitted tokens. `common`: one network for both masks; then both l1 are halved, as the same norm counts
twice (not so if only one mask is on). `independent`: two networks. With all masks 1 it is TDPO1. The network is used in
training only (`mapo` takes its masks from activations instead, and trains none).

The weight of a token comes from the state one position BEFORE it: the network sees its left context and never the token
itself, so that a map drawn from it says "a token that matters is expected here". `LearnedMask` reads it as credit.

Differs from the authors' code: mixer weights start at 1/L, where negative ones may make a network that is 0 for ever;
unweighted KLs leave prompt and padding out; `random` masks are 0.5 in evaluation; the inner dropout of `ml_*` is 0.1 as
there, all others are `mask_dropout`. The LayerNorm's scale is without weight decay, as all biases are: as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..core.checkpoint import saved_state
from ..core.credit import Credit
from ..core.lm import LM
from ..core.protocols import Batch, Loss
from ..core.run import completions_stats
from ..core.stats import Stats, masked_mean, masked_sum
from ..core.trace import Trace
from ._mask_nets import Kind, MaskNet, MaskNets
from ._preference import LOGP
from ._token_masks import KL, READS, mask_metrics, masked_loss

_TOGETHER = 64  # traces whose hidden states exist together
_SIDES = {"reward": "u", "kl": "d"}
_EPS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_eps", "norm_epsilon")


def mean_one(weights_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Weights divided by their mean over each completion's emitted tokens; a mask of zeros stays one."""
    mean_N = masked_mean(weights_NT, mask_NT)[:, None]
    return weights_NT / torch.where(mean_N > 0, mean_N, torch.ones_like(mean_N))


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the mask networks are trained (names are flags of the command line, beside the policy's)."""

    mask_dropout: float = 0.01
    """Dropout after each ReLU."""
    mask_lr_factor: float = 1.0
    """Multiple of the policy's learning rate."""
    mask_weight_decay: float = 0.01
    """Weight decay, of weights alone."""
    patience: int = 50
    """Updates in a row without a single weight above 0 after which training stops with an error; 0: never."""


@dataclass(frozen=True, kw_only=True)
class SparsePO:
    """Options of SparsePO."""

    beta: float = 0.1
    """beta: 0.1 for dialogue, 0.8 for sentiment and summaries. The mean weight multiplies it."""
    mask: Kind = "simple_all"
    """Which network: over all layers or the last; ml: two linear maps. Ablations: binary (fixed: no gradient passes a
    sign) and random (uniform, redrawn each update)."""
    sharing: Literal["common", "independent"] = "common"
    """One network for M_u and M_d, or one each."""
    mask_on_reward: bool = True
    """Off: M_u = 1."""
    mask_on_kl: bool = True
    """Off: M_d = 1."""
    l1_u: float = 0.0
    """Weight of |M_u|_1; 0.001 for dialogue with common masks."""
    l1_d: float = 0.0
    """Weight of |M_d|_1."""
    normalize_mask: Literal["off", "mean1"] = "off"
    """mean1: weights of each response have mean 1, so that beta keeps its scale (not in the paper; l1 sees them as they
    were)."""
    network: Network = field(default_factory=Network)
    """Dropout and optimizer of the networks."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        known = {"mask": get_args(Kind), "sharing": ("common", "independent"), "normalize_mask": ("off", "mean1")}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not (self.l1_u >= 0 and self.l1_d >= 0):
            raise ValueError(f"l1_u={self.l1_u} and l1_d={self.l1_d} must not be negative, which would reward weight")
        own = self.network
        if not (0 <= own.mask_dropout < 1 and own.mask_lr_factor > 0 and own.mask_weight_decay >= 0):
            raise ValueError("0 <= mask_dropout < 1, mask_lr_factor > 0 and mask_weight_decay >= 0 are needed")

    @property
    def sides(self) -> tuple[str, ...]:
        """Which of u and d have a mask."""
        return ("u",) * self.mask_on_reward + ("d",) * self.mask_on_kl

    @property
    def reads(self) -> str:
        """The reference's statistic that the networks read, if any."""
        return {"all": "hidden_all", "last": "hidden"}.get(self.mask.partition("_")[2] if self.sides else "", "")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models, the KL from the reference to the policy, the reference's hidden states."""
        return {"policy": LOGP | {KL}, "reference": LOGP | ({self.reads} if self.reads else set())}

    def init_state(self, config: Any) -> MaskNets | None:
        """The mask networks for a model of this transformers config; None with both masks off."""
        text = config.get_text_config()
        eps = next((float(getattr(text, name)) for name in _EPS if getattr(text, name, None)), 1e-5)
        names = ("both",) if self.sharing == "common" and len(self.sides) == 2 else self.sides
        own = self.network
        make = lambda: MaskNet(self.mask, text.num_hidden_layers, text.hidden_size, eps, own.mask_dropout)
        nets = {name: make() for name in names}
        return MaskNets(nets, own.mask_lr_factor, own.mask_weight_decay, own.patience) if nets else None

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs.

        Raises:
            ValueError: a network that has given every token the weight 0 for `network.patience` updates.
        """
        policy, mask_NT = stats["policy"], stats["policy"].mask_NT
        weights: dict[str, Tensor] = {}
        if self.sides:
            assert isinstance(state, MaskNets), "a mask without its network: pass what init_state made"
            hidden = stats["reference"].extra[self.reads] if self.reads else None
            weights = state(self.sides, hidden, policy.logp_NT.detach())
            if state.training and torch.is_grad_enabled():
                state.watch(weights, mask_NT)
        penalty: Tensor | float = 0.0
        share = 0.5 if self.sharing == "common" and len(self.sides) == 2 else 1.0
        for side, coefficient in (("u", self.l1_u), ("d", self.l1_d)):
            if side in weights and coefficient:
                norm_N = masked_sum(weights[side].abs(), mask_NT)
                penalty = penalty + share * coefficient * (norm_N[batch.chosen] + norm_N[batch.rejected])
        used = weights
        if self.normalize_mask == "mean1":
            used = {side: mean_one(m_NT, mask_NT) for side, m_NT in weights.items()}
        result = masked_loss(stats, batch, used, self.beta, penalty)
        result.metrics.update(mask_metrics(weights, mask_NT, batch))
        return result


def _each(reference: LM, traces: Sequence[Trace], wants: frozenset[str]) -> Iterator[tuple[Trace, dict[str, Any]]]:
    """Traces with their statistics, some at a time: the states of all layers are large."""
    for start in range(0, len(traces), _TOGETHER):
        some = traces[start : start + _TOGETHER]
        yield from zip(some, completions_stats(reference, some, wants), strict=True)


def mask_credit(
    objective: SparsePO, state: MaskNets, reference: LM, traces: Sequence[Trace], side: str = "reward"
) -> list[Credit]:
    """The weights that mask networks give to the tokens of traces, as credit of kind ``weight``, one a trace.

    Each weight comes from the state before its token. ``side`` is ``reward`` (M_u) or ``kl`` (M_d).

    Raises:
        ValueError: a side whose mask is off or that is not known; traces of another tokenizer.
    """
    if _SIDES.get(side) not in objective.sides:
        raise ValueError(f"there is no mask on side={side!r}; it is reward or kl, and not switched off")
    wants = frozenset({objective.reads}) if objective.reads else LOGP
    for i, trace in enumerate(traces):
        if trace.tokenizer != reference.view.fingerprint:
            raise ValueError(f"trace {i} is of another tokenizer than the reference; encode its text with lm.trace")
    was, credits = state.training, []
    state.eval()
    for trace, stats in _each(reference, traces, wants):
        like_NT = torch.zeros((1, len(trace)), dtype=torch.float64, device=reference.device)
        hidden = torch.from_numpy(stats[objective.reads])[None].to(reference.device) if objective.reads else None
        with torch.no_grad():
            weights = state(objective.sides, hidden, like_NT)[_SIDES[side]][0].cpu().numpy()
        values = np.where(trace.mask, weights, 0.0)
        meta = {"side": side, "reads": READS, "reference": reference.name}
        credits.append(Credit(trace=trace, values=values, kind="weight", method="sparsepo", meta=meta))
    state.train(was)
    return credits


@dataclass(frozen=True, kw_only=True)
class LearnedMask:
    """A scorer: what the masks of a finished run weigh. A weight comes from the state BEFORE its token."""

    run: str | Path
    """Folder of the run, or of one of its checkpoints."""
    reference: LM
    """The reference of that run: the model that it started from, unless it was given another."""
    side: Literal["reward", "kl"] = "reward"
    """M_u or M_d."""

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind weight over the completion of each trace, in order.

        Raises:
            ValueError: a folder without a run of SparsePO; another reference than the run's; a mask that is off.
        """
        made, tensors = saved_state(self.run)
        if made["method"] != "sparsepo":
            raise ValueError(f"{self.run} is a run of {made['method']}, which learns no mask; name one of sparsepo")
        theirs = made["reference"]
        if theirs["weights"] != self.reference.identity()["weights"]:
            raise ValueError(
                f"the masks of {self.run} read the states of {theirs['name']!r} as it was before that run; load it anew"
            )
        plain = {k: v for k, v in made["options"].items() if k not in ("type", "network")}
        own = {k: v for k, v in made["options"]["network"].items() if k != "type"}
        objective = SparsePO(**plain, network=Network(**own))
        state = objective.init_state(self.reference.causal.config)
        assert state is not None
        state.load_state_dict(tensors)
        return mask_credit(objective, state.to(self.reference.device), self.reference, items, self.side)
