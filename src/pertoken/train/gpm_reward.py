"""GPM reward training — preference embeddings (or a Bradley-Terry reward) trained together with their backbone.

Zhang, Zhang, Wu, Xu, Gu, "Beyond Bradley-Terry Models", ICML 2025, arXiv 2410.02197 (the scorer `gpm` says how a
trained one is used: its `folder` is this run's output folder). With h the last hidden state at the terminator:

    v = H h(x, y) (divided by its length if normalised);  Bradley-Terry: v = (r, 1)
    s = sum_l lambda_l ( v_w,2l-1 v_l,2l - v_w,2l v_l,2l-1 )            lambda = softmax(G h(x)), or 1
    L = (1 - c) L_pref + c L_sft, mean over pairs                       L_pref = -log sigmoid( (s - margin) / tau )

H and G begin normal with standard deviation 1 / (hidden + 1). L_sft is a regulariser on the chosen response y_w:
-log pi(y_w|x), summed over its tokens, or the release's -log sigmoid(beta log pi(y_w|x)). The best models of the paper
have none (c = 0). Units: margins as s, log-probs in nats. A single response has no reward: ``rewards/chosen`` of a pair
is s / 2 and ``rewards/rejected`` -s / 2, so that ``rewards/margins`` is s. ``score/max`` is the largest |s|, which may
explode where embeddings are not normalised.

Differs from the authors' code: a terminator is part of every response here (the release overwrites the last token with
EOS); its second gate names an undefined variable, ours (``scaled``) does not; its logged probability subtracts the
margin (``compat="reference"``). That L_sft sums over tokens outside of its log-sigmoid, too, is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.pairwise import HeadOptions, PreferenceHead, skew_score
from ..core.protocols import Batch, Loss, Preparation
from ..core.stats import Stats
from ._preference import pair_loss

MARGIN = "margin"


@dataclass(frozen=True, kw_only=True)
class Regularizer:
    """The language-model regulariser on chosen responses."""

    c: float = 0.0
    """c, its weight in (1 - c) L_pref + c L_sft: 0.01 to 0.1; 0 is off."""
    form: Literal["nll", "logsigmoid"] = "nll"
    """nll: -log pi(y_w|x); logsigmoid: the release's -log sigmoid(beta log pi(y_w|x))."""
    beta: float = 0.1
    """beta inside of the release's log-sigmoid."""

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ValueError(f"c={self.c} is a share: from 0 to below 1, 0.01 to 0.1 in the paper")
        if self.form not in ("nll", "logsigmoid"):
            raise ValueError(f"form={self.form!r} is not one of nll, logsigmoid")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")


def regularized(losses_B: Tensor, chosen_logp_B: Tensor, options: Regularizer) -> Tensor:
    """(1 - c) L_pref + c L_sft, one a pair, from the preference losses and log pi(y_w|x) in nats; c = 0: untouched."""
    if options.c == 0:
        return losses_B
    sft_B = -chosen_logp_B if options.form == "nll" else -F.logsigmoid(options.beta * chosen_logp_B)
    return (1 - options.c) * losses_B + options.c * sft_B.to(losses_B.dtype)


@dataclass(frozen=True, kw_only=True)
class GPMReward:
    """Options of GPM reward training."""

    head: Literal["gpm", "bt"] = "gpm"
    """gpm: embeddings of `dim`; bt: one reward (neither normalised nor gated; try tau 1 and 0.1 on a dev split)."""
    dim: int = 2
    """2k, dimensions of the embedding: 2, 4, 6 or 8 in the released models."""
    normalize: bool = True
    """Divide embeddings by their length: |s| <= 1."""
    gate: Literal["none", "softmax", "scaled"] = "none"
    """lambda of the prompt: none, softmax(G h), or k softmax(G h / sqrt(hidden))."""
    tau: float = 0.1
    """tau, the temperature of s."""
    learn_tau: bool = False
    """tau = max(softplus(t), 0.01), t trained from -2.25."""
    loss_form: Literal["preference", "regression"] = "preference"
    """-log sigmoid((s - margin) / tau), or 0.5 (s / tau - 10)^2."""
    margin: str = ""
    """Column of the data with each pair's margin, in units of s (release: margin); empty: none."""
    regularizer: Regularizer = field(default_factory=Regularizer)
    """L_sft and its weight c."""
    compat: Literal["paper", "reference"] = "paper"
    """reference: the logged probability subtracts the margin."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.compat not in ("paper", "reference"):
            raise ValueError(f"compat={self.compat!r} is not one of paper, reference")
        if self.margin and self.loss_form == "regression":
            raise ValueError("the regression loss has no margin; leave margin out, or take loss_form='preference'")
        self.options()

    def options(self) -> HeadOptions:
        """What the heads are."""
        return HeadOptions(
            form=self.head,
            dim=self.dim,
            normalize=self.normalize,
            gate=self.gate,
            tau=self.tau,
            learn_tau=self.learn_tau,
            loss=self.loss_form,
        )

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs (for the regulariser and the log), and the states that the heads read."""
        gated = {"hidden_prompt"} if self.gate != "none" else set()
        return {"policy": frozenset({"logp", "hidden_end"} | gated)}

    def init_state(self, config: Any) -> PreferenceHead:
        """The heads, trained and kept with the policy."""
        return PreferenceHead(int(config.get_text_config().hidden_size), self.options())

    def prepare(self, run: Preparation) -> None:
        """Take the margins from the data.

        Raises:
            ValueError: a row without the column that `margin` names.
        """
        for group in run.every if self.margin else ():
            value = group.example.extra.get(self.margin)
            if not isinstance(value, int | float):
                raise ValueError(
                    f"row {group.example.row} has no number in column {self.margin!r}; add it, or margin=''"
                )
            group.add_column(MARGIN, float(value))

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs; the pair's prompt, and so lambda, is the chosen one's.

        Raises:
            ValueError: no heads, or a margin that `prepare` did not bring.
        """
        if not isinstance(state, PreferenceHead):
            raise ValueError("gpm-reward trains heads; give the module that init_state made")
        policy, w, l = stats["policy"], batch.chosen, batch.rejected
        v_ND = state(policy.extra["hidden_end"])
        gate = state.gates(policy.extra["hidden_prompt"][w]) if self.gate != "none" else None
        s_B, margin_B = skew_score(v_ND[w], v_ND[l], gate), None
        if self.margin:
            if MARGIN not in batch.columns:
                raise ValueError(f"the margins of column {self.margin!r} are not there; run prepare, or add {MARGIN!r}")
            margin_B = batch.columns[MARGIN][w].to(s_B.dtype)
        losses_B = regularized(state.losses(s_B, margin_B), policy.sums()[w], self.regularizer)
        half_N = torch.zeros_like(v_ND[:, 0]).detach()
        half_N[w], half_N[l] = s_B.detach() / 2, -s_B.detach() / 2
        result = pair_loss(losses_B, half_N, stats, batch)
        with torch.no_grad():
            shown_B = s_B - margin_B if self.compat == "reference" and margin_B is not None else s_B
            pairs = float(len(s_B))
            result.metrics["probability"] = (torch.sigmoid(shown_B / state.tau).sum(), pairs)
            result.metrics["tau"] = (state.tau * pairs, pairs)
            result.metrics["score/abs"] = (s_B.abs().sum(), pairs)
            result.metrics["score/max"] = (s_B.abs().max(), 1.0)
        return result
