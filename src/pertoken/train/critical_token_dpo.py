"""cDPO — critical-token DPO: only the tokens that derail a wrong answer are pushed down.

Lin, Liang, Xu, Lin, Wang, Luo, Shi, Li, Yang, Tu, "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances
LLM's Reasoning Capability", ICML 2025, arXiv 2411.19943. NOT the "conservative DPO" that is called cDPO elsewhere: that
one is DPO with label smoothing (2403.00409), here `dpo --label-smoothing`. With l_t = log pi(y_t|.)/pi_ref(y_t|.):

    phi_w = sum_t l_t(y_w)               only_neg=False: sum_t s_t l_t(y_w)
    phi_l = sum_t (1 - s_t) l_t(y_l)
    L = -log sigmoid( beta (phi_w - phi_l) ), mean over pairs

s_t in [0, 1] is a constant, the scorer `contrastive-estimation`: two LoRA copies of the base are fine-tuned, p on
correct and q on incorrect responses, and s_t = softmax((1 + b) z_p - b z_q)[y_t] is near 0 at tokens that q likes and p
does not. The terminator weighs 1 on both sides (its s counts as 1 on the chosen, as 0 on the rejected one). s = 0 on
all rejected tokens is DPO; s = 1 leaves that side without gradient, so mean(1 - s) is reported. Log-probs in nats.

p and q learn from `startup` (`_startup_data.startup_data` chooses it from many samples a question); without it, from
the chosen and the rejected responses of the training pairs. `scorer` puts any other token score in their place.

reduction="position" is the release's loss: -log sigmoid of the difference at each position i, chosen token i against
rejected token i, the shorter response (and what is masked) standing there with 0, so that padding adds log 2; the mean
is over pairs x positions of the longest response in the batch, which couples the rows of a batch.

Differs from the authors' code: the default sums over tokens, as the paper's equations do; the release does not.
Positions are the responses' (the release's are the prompts' too, each with the constant log 2); the adapters of p and q
are on all linear layers and without dropout (there the MLP's, 0.1); s of the ids themselves, so that the release's
branch for tokenizers without BOS is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.credit import Credit
from ..core.protocols import Batch, Loss, Preparation, as_scorer
from ..core.stats import Stats, masked_sum
from ..core.trace import Trace
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss
from ._startup_data import StartupData, sides_of

COLUMN = "contrastive_s"
INERT = 0.02  # mean(1 - s) on rejected tokens below which next to nothing is pushed down


def with_terminator(s: np.ndarray, tokens: int, *, ended: bool, rejected: bool) -> np.ndarray:
    """s of a response (tokens,), with the terminator's own: its multiplier is 1, so s is 0 on the rejected side, where
    tokens weigh 1 - s, and 1 on the chosen one.

    Raises:
        ValueError: another number of values than of tokens; a value that is no probability.
    """
    s = np.array(s, np.float64)
    if s.shape != (tokens,):
        raise ValueError(
            f"s has {len(s)} values and the response {tokens} tokens; score the very ids that are trained on"
        )
    if not ((s >= 0) & (s <= 1)).all():
        raise ValueError(f"s lies between {s.min()} and {s.max()}; give probabilities, from 0 (critical) to 1")
    if ended and tokens:
        s[-1] = 0.0 if rejected else 1.0
    return s


def token_weights(s_NT: Tensor, rejected_N: Tensor, only_neg: bool = True) -> Tensor:
    """Multipliers (N, T), without gradient: 1 - s on rejected responses, 1 (or s, without only_neg) on chosen ones."""
    s_NT = s_NT.detach()
    return torch.where(rejected_N[:, None], 1 - s_NT, torch.ones_like(s_NT) if only_neg else s_NT)


def critical_token_losses(
    chosen_BT: Tensor, rejected_BT: Tensor, beta: float = 0.1, reduction: str = "sequence"
) -> Tensor:
    """Losses from weighted log-ratios (B, T) in nats, 0 on what is masked or beyond the end.

    Returns:
        (B,) of pairs with ``sequence``; (B, T) of positions, log 2 where both are 0, with ``position``.
    """
    if reduction == "position":
        return log_sigmoid_loss(beta * (chosen_BT - rejected_BT))
    return log_sigmoid_loss(beta * (chosen_BT.sum(1) - rejected_BT.sum(1)))


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """The two models p and q, and their contrast (ce: contrastive estimation, the release's name for these models)."""

    contrast: float = 1.0
    """b."""
    ce_lora: int = 8
    """Rank of the adapters (alpha twice that); 0 trains all weights."""
    ce_lr: float = 3e-4
    """Peak learning rate, cosine."""
    ce_epochs: float = 1.0
    """Passes over the startup data."""
    ce_batch_size: int = 6
    """Responses an update."""
    ce_warmup_steps: int = 100
    """Updates in which the rate rises; too many for small data, where p and q then hardly learn."""

    def __post_init__(self) -> None:
        if not (0 <= self.contrast < np.inf and self.ce_lora >= 0 and self.ce_lr > 0 and self.ce_epochs > 0):
            raise ValueError(f"{self}: contrast and ce_lora at least 0, ce_lr and ce_epochs above 0 are needed")
        if not (self.ce_batch_size >= 1 and self.ce_warmup_steps >= 0):
            raise ValueError(f"{self}: ce_batch_size at least 1 and ce_warmup_steps at least 0 are needed")

    def loop(self, n: int) -> dict[str, Any]:
        """What differs in the loop of a model that learns from n responses."""
        total = int(np.ceil(self.ce_epochs * -(-n // self.ce_batch_size)))
        warmup = min(1.0, (self.ce_warmup_steps + 0.5) / total) if self.ce_warmup_steps else 0.0
        own = {"lr": self.ce_lr, "epochs": self.ce_epochs, "batch_size": self.ce_batch_size, "warmup": warmup}
        return own | {"steps": None, "schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class CriticalTokenDPO:
    """Options of cDPO."""

    beta: float = 0.1
    """beta, strength of the constraint to the reference."""
    only_neg: bool = True
    """Weigh the rejected response's tokens only; off: the chosen one's too, by their own s."""
    reduction: Literal["sequence", "position"] = "sequence"
    """sequence: the paper's sums over tokens; position: the release's mean over positions."""
    estimation: Estimation = field(default_factory=Estimation)
    """The two models behind s."""
    startup: Any = None
    """From Python: `StartupData` for the two models; default: the two sides of the training pairs."""
    scorer: Any = None
    """From Python: any scorer of s, or a callable from a trace to one probability a token, for the two models."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if not 0 < self.beta < np.inf:
            raise ValueError(f"beta={self.beta} must be above 0 and finite")
        if self.reduction not in ("sequence", "position"):
            raise ValueError(f"reduction={self.reduction!r} is not one of sequence, position")
        if self.startup is not None and not isinstance(self.startup, StartupData):
            raise ValueError(f"startup is a {type(self.startup).__name__}; make it with startup_data(samples, ...)")

    @property
    def batch_coupled(self) -> bool:
        """Whether a batch is more than its pairs: positions are counted up to its longest response."""
        return self.reduction == "position"

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def prepare(self, run: Preparation) -> None:
        """Give every group the column ``contrastive_s``, one value a completion token, and report mean(1 - s).

        Raises:
            ValueError: values that are no probabilities, or of other tokens; no startup data for one of the models.
        """
        scorer = self._models(run) if self.scorer is None else as_scorer(self.scorer, on="trace", kind="probability")
        for group, values in zip(run.every, run.credits("contrastive-s", _Aligned(scorer)), strict=True):
            sides = enumerate(zip(values, group.traces, strict=True))
            s = [with_terminator(v, len(t), ended=t.ended, rejected=k == 1) for k, (v, t) in sides]
            group.add_column(COLUMN, s)
        _report(run, self.only_neg)

    def _models(self, run: Preparation) -> Any:
        """The scorer of p and q, trained on the startup data."""
        given = self.startup
        sides = sides_of(run.groups) if given is None else (given.positive, given.negative)
        models = []
        for name, side in zip(("positive", "negative"), sides, strict=True):
            if not side:
                raise ValueError(f"the startup data has no {name} response to learn from; sample more of each question")
            loop = self.estimation.loop(len(side))
            if loop["warmup"] == 1.0:
                run.report(
                    f"cdpo: warning: the {name} model's {len(side)} responses make fewer updates than its "
                    f"{self.estimation.ce_warmup_steps} of warm-up; lower ce_warmup_steps"
                )
            models.append(run.train("sft", on=side, lora=self.estimation.ce_lora or None, config=loop))
        if given is not None:
            run.report("cdpo: startup data: " + ", ".join(f"{v} {k}" for k, v in given.counts.items()))
        p, q = models
        return run.scorer("contrastive-estimation", policy=p, reference=q, contrast=self.estimation.contrast)

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.from_numpy(rng.uniform(0.0, 1.0, tuple(mask_NT.shape))) * mask_NT}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs, or over pairs x positions.

        Raises:
            ValueError: there is no column ``contrastive_s``.
        """
        if COLUMN not in batch.columns:
            raise ValueError(f"cDPO needs the column {COLUMN!r}, which is not there; run prepare, or add it")
        policy, w, l = stats["policy"], batch.chosen, batch.rejected
        rejected_N = torch.zeros(len(policy.mask_NT), dtype=torch.bool, device=w.device).index_fill(0, l, True)
        weight_NT = token_weights(batch.columns[COLUMN].to(policy.logp_NT), rejected_N, self.only_neg)
        zero = torch.zeros_like(policy.logp_NT)
        ratio_NT = torch.where(policy.mask_NT, policy.logp_NT - stats["reference"].logp_NT, zero)
        phi_NT = torch.where(policy.mask_NT, weight_NT, zero) * ratio_NT
        losses = critical_token_losses(phi_NT[w], phi_NT[l], self.beta, self.reduction)
        result = pair_loss(losses, implicit_rewards(stats, self.beta), stats, batch)
        with torch.no_grad():
            phi_N, pushed_N = phi_NT.detach().sum(1), masked_sum(weight_NT, policy.mask_NT)
            pairs, lengths_N = float(len(w)), policy.lengths()
            result.metrics["weight/rejected"] = (pushed_N[l].sum(), lengths_N[l].sum())
            result.metrics["weight/chosen"] = (pushed_N[w].sum(), lengths_N[w].sum())
            result.metrics["rewards/weighted_margins"] = (self.beta * (phi_N[w] - phi_N[l]).sum(), pairs)
        return Loss(result.sum, float(losses.numel()), result.metrics)


@dataclass(frozen=True)
class _Aligned:
    """A scorer whose credits are checked to stand on the very ids that were scored."""

    scorer: Any

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        credits = self.scorer.score(items)
        for trace, credit in zip(items, credits, strict=True):
            if credit.trace.completion_ids != trace.completion_ids or credit.trace.tokenizer != trace.tokenizer:
                raise ValueError(
                    f"s stands on {len(credit.trace)} tokens of tokenizer {credit.trace.tokenizer} and the response "
                    f"has {len(trace)} of {trace.tokenizer}; score its own ids, or move the credit with Credit.to"
                )
        return credits


def _report(run: Preparation, only_neg: bool) -> None:
    """Say how much is pushed down, terminators left out."""

    def mean(side: int) -> float:
        listed = [
            (g.traces[side], g.columns[COLUMN][side], len(g.traces[side]) - g.traces[side].ended) for g in run.every
        ]
        values = np.concatenate([np.zeros(0), *(s[:n][t.mask[:n]] for t, s, n in listed)])
        return float(values.mean()) if len(values) else 1.0

    pushed, also = 1 - mean(1), "" if only_neg else f"; mean s {mean(0):.4f} on chosen tokens"
    run.report(f"cdpo: mean(1 - s) {pushed:.4f} on rejected tokens{also}")
    if pushed < INERT:
        run.report(f"cdpo: warning: mean(1 - s) is below {INERT}: nothing in the rejected answers looks critical")
