"""MaPO — Mask Preference Optimization, SparsePO's masks read off the reference's activations instead of learnt.

Christopoulou, Cardenas, Lampouras, Bou-Ammar, Wang (Huawei Noah's Ark), Findings of EMNLP 2025, arXiv 2410.05102. With
a_t the mean over features of one tensor of the reference at the position that predicts token t:

    m_t = ( a_t - min_s a_s ) / ( max_s a_s - min_s a_s )     over the response's emitted tokens s; 1 if all a are equal
    M_t = mean over types of the mean over a type's tensors of m_t          detached, one mask for both u and d
    L = -log sigmoid( beta [ (u(y_w) - u(y_l)) - (d(y_l) - d(y_w)) ] ), mean over pairs      (u, d: see `sparsepo`)

The paper z-normalises before it rescales; min-max undoes that, so it is left out. Types and their tensors, of names
like Llama's, Qwen's or GPT-2's (`Modules` for others): `mlp`, after the activation; `attn`, q, k, v, rotated q and k,
and what goes into the output projection; `resid`, in every layer its input, the attention's norm, the attention's
output, the stream after it, the MLP's norm, the MLP's output, the layer's output; beside them the embedding and the
final norm; `logits`. All of the paper's are covered; what a model lacks is passed over. In float32 or better.

A hook stands on the state that PREDICTS token t, as the release's shift has it: the weight of a token comes from the
state one position before it. `uniform` is TDPO1.

Differs from the authors' code: float32 for its float16; constant activations weigh 1 where it has 0/0, and means that
are rounding count as 0; its modelling files leave out some tensors or hook them elsewhere (GPT-2: no q, k, v under
eager attention). Its mapping `layernorm` cannot run, and over features its mean would be 0: here it is over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.capture import reduce_features
from ..core.credit import Credit
from ..core.lm import LM
from ..core.packing import Cost, pack
from ..core.protocols import Batch, Loss
from ..core.stats import Needs, Stats, token_stats
from ..core.trace import Trace
from ._preference import LOGP
from ._token_masks import KL, READS, mask_metrics, masked_loss

TYPES = ("mlp", "attn", "resid", "logits")
LOGITS = "mapo_logits"
_CONSTANT = 1e-6  # of the greatest value: activations that differ by less are one


def min_max(values_NTK: Tensor, mask_NT: Tensor) -> Tensor:
    """Each of K series rescaled to [0, 1] over each completion's emitted tokens; 1 where it is constant there (a single
    token, too), 0 on other tokens. Float32 or better; (N, T, K)."""
    values, where = _at_least_float32(values_NTK), mask_NT[..., None]
    if not values.shape[1]:
        return values
    low = torch.where(where, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(where, values, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    varies = torch.isfinite(spread) & (spread > _CONSTANT * torch.maximum(low.abs(), high.abs()))
    scaled = (values - torch.where(varies, low, 0.0)) / torch.where(varies, spread, 1.0)
    return torch.where(where, torch.where(varies, scaled, 1.0), 0.0)


def over_tokens(values_NTK: Tensor, mask_NT: Tensor) -> Tensor:
    """Each series less its mean, over its standard deviation, over each completion's emitted tokens: a LayerNorm."""
    values, where = _at_least_float32(values_NTK), mask_NT[..., None]
    count = where.sum(1, keepdim=True).clamp(min=1)
    centred = values - torch.where(where, values, 0.0).sum(1, keepdim=True) / count
    variance = torch.where(where, centred**2, 0.0).sum(1, keepdim=True) / count
    return torch.where(where, centred * torch.rsqrt(variance + 1e-5), 0.0)


def activation_mask(by_type: Mapping[str, Tensor], mask_NT: Tensor, mapping: str = "minmax") -> Tensor:
    """M, (N, T), without gradient.

    Args:
        by_type: the reduced tensors of each type, (N, T, K) each.
        mapping: ``minmax``, ``layernorm`` (over tokens) or ``sigmoid`` (means of sigmoids, taken as they are).
    """
    change = {"minmax": min_max, "layernorm": over_tokens}.get(mapping)
    each = [(change(x, mask_NT) if change else x).mean(-1) for x in by_type.values()]
    return torch.where(mask_NT, torch.stack(each, -1).mean(-1), 0.0).detach()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Which modules make a type: their names as `core.capture` reads them."""

    mlp: str = "mlp.act_fn|mlp.act"
    """After the MLP's activation function."""
    attn: str = "self_attn.[qkv]_proj|attn.c_attn/3|@rotary|<self_attn.o_proj|<attn.c_proj"
    """q, k, v, rotated q and k, and the input of the output projection."""
    resid: str = (
        "<input_layernorm|input_layernorm|self_attn|<post_attention_layernorm|post_attention_layernorm|layers.*.mlp"
        "|layers.*|embed_tokens|model.norm|<ln_1|ln_1|h.*.attn|<ln_2|ln_2|h.*.mlp|h.*|transformer.drop|ln_f"
    )
    """Seven points of each layer, the embedding, the final norm."""


@dataclass(frozen=True, kw_only=True)
class MaPO:
    """Options of MaPO."""

    beta: float = 0.1
    """beta: 0.1 for dialogue, 0.8 for sentiment and summaries."""
    activations: str = "all"
    """Types that make the mask: all, uniform (all ones), or some of mlp, attn, resid, logits, as mlp+attn."""
    mapping: Literal["minmax", "layernorm", "sigmoid"] = "minmax"
    """How a tensor's means become weights; minmax is the paper's z-norm and rescaling."""
    modules: Modules = field(default_factory=Modules)
    """Names of the modules, for other architectures."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not set(self.types) <= set(TYPES):
            raise ValueError(f"activations={self.activations!r} is not all, uniform, or some of {'+'.join(TYPES)}")
        if self.mapping not in ("minmax", "layernorm", "sigmoid"):
            raise ValueError(f"mapping={self.mapping!r} is not one of minmax, layernorm, sigmoid")

    @property
    def types(self) -> tuple[str, ...]:
        """The types that make the mask; none if it is uniform."""
        named = {"all": TYPES, "uniform": ()}
        return named[self.activations] if self.activations in named else tuple(self.activations.split("+"))

    @property
    def _how(self) -> str:
        return "sigmoid" if self.mapping == "sigmoid" else "mean"

    @property
    def _wants(self) -> dict[str, str]:
        return {t: f"{self._how}:{getattr(self.modules, t)}" for t in self.types if t != "logits"}

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models, the KL from the reference to the policy, the reference's reduced activations."""
        return {"policy": LOGP | {KL}, "reference": LOGP | set(self._wants.values())}

    def token_stats(self, logits: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """The reference's logits, reduced inside the chunk."""
        return {LOGITS: reduce_features(logits["reference"], self._how)} if "logits" in self.types else {}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs."""
        policy = stats["policy"]
        m_NT = self.mask(stats).to(policy.logp_NT.dtype)
        result = masked_loss(stats, batch, {"u": m_NT, "d": m_NT}, self.beta)
        result.metrics.update(mask_metrics({"u": m_NT}, policy.mask_NT, batch))
        return result

    def mask(self, stats: Mapping[str, Stats]) -> Tensor:
        """M, (N, T), from the reference's statistics; 0 on tokens that were not emitted."""
        reference = stats["reference"]
        by_type = {name: reference.extra[want] for name, want in self._wants.items()}
        if "logits" in self.types:
            by_type["logits"] = reference.extra[LOGITS][..., None]
        if not by_type:
            return reference.mask_NT.to(reference.logp_NT.dtype)
        return activation_mask(by_type, reference.mask_NT, self.mapping)


def mask_credit(objective: MaPO, reference: LM, traces: Sequence[Trace]) -> list[Credit]:
    """The weights of the tokens of traces, as credit of kind ``weight``, one a trace, each from the state before its
    token.

    Raises:
        ValueError: traces of another tokenizer.
    """
    for i, trace in enumerate(traces):
        if trace.tokenizer != reference.view.fingerprint:
            raise ValueError(f"trace {i} is of another tokenizer than the reference; encode its text with lm.trace")
    needs = Needs({"reference": objective.stats["reference"]}, {"MaPO": objective.token_stats})
    credits: list[Credit | None] = [None] * len(traces)
    for packed in pack([[t] for t in traces], cost=Cost.of(reference.causal)):
        with torch.no_grad():
            stats = token_stats({"reference": reference}, packed, needs)
        m_NT = objective.mask(stats)
        for row, (i, _) in enumerate(packed.order):
            values = m_NT[row, : len(traces[i])].double().cpu().numpy()
            credits[i] = Credit(trace=traces[i], values=values, kind="weight", method="mapo", meta={"reads": READS})
    return [credit for credit in credits if credit is not None]
