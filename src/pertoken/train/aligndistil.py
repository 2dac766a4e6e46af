"""AlignDistil — token-level alignment as adaptive policy distillation.

S. Zhang, X. Zhang, T. Zhang, Hu, Chen, Xu, ACL 2025, arXiv 2503.02832. At every position the student pi is distilled
into a teacher made of the logits of a DPO model (z_d) and of a third model (z_r): DPO on swapped pairs, or the plain
reference. No critic, and no sampling noise in the reward, which is r = beta log(pi_dpo/pi_r) of the whole vocabulary:

    L = mean_y [ (1/|y|) sum_t b_t KL( pi(.|s_t) || softmax(z*_t / T) ) ]          T divides the student's logits, too

    mode                 z*_t                        w_t                    b_t
    aligndistil          z_d + w_t (z_d - z_r)       beta2 D_t + 1e-3       beta / w_t
    theorem1_adaptive    w_t z_d + (1 - w_t) z_r     beta2 D_t + 1e-3       beta / w_t
    theorem1             w z_d + (1 - w) z_r         w = beta / beta2       beta2
    theorem1_contrast    z_d + w (z_d - z_r)         w = beta / beta2       beta2
    gkd                  z_d                         -                      1
    D_t = sum_v |p_dpo(v|s_t) - p_r(v|s_t)|, in [0, 2] (twice the total variation)

In the adaptive modes beta2 is a multiplier, in the constant ones the coefficient of KL(pi || pi_ref): the minimiser of
theorem1 is optimal for E[r] - beta2 KL at every single position, and for whole responses only where w = 1.

Stages: DPO on the pairs, DPO on the swapped pairs, then distillation on the chosen responses alone (off-policy), or on
one response a prompt sampled from the policy for each batch (on-policy). Held-out pairs stay pairs, for their
``rewards/accuracies``: beta (log pi - log pi_r). KLs in nats; of D_t, w_t and r, T is 1.

Differs from the authors' code: the L distributions that predict the L response tokens are distilled (off-policy the
release trains those after each of them, on-policy it leaves the first out); kd_temperature divides the student in both
modes (the release: on-policy only; compat="reference"); differences of logits are clamped at +-1e4; models with
vocabularies of different sizes raise (the release trims two of the three); a response without tokens has loss 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.data import Group
from ..core.head import kl_divergence
from ..core.lm import load
from ..core.protocols import Batch, Loss, Preparation
from ..core.rollout import Sampling
from ..core.stats import Stats, masked_mean, masked_sum
from ._preference import LOGP, pair_metrics

EQUAL = 1e-3  # D_t below which the two models say the same, and b_t is at its greatest
LARGEST = 1e4  # of a difference of log-probs
_THIRD = {
    "aligndistil": "reverse",
    "theorem1": "reference",
    "theorem1_contrast": "reverse",
    "theorem1_adaptive": "reference",
    "gkd": "",
}


def weights(
    l1: Tensor, mode: str, beta: float, beta2: float, w_floor: float = 1e-3
) -> tuple[Tensor | float, Tensor | float]:
    """(w_t, b_t) of positions with the distance D_t = `l1`: of its shape, or numbers where the mode has constants."""
    if mode == "gkd":
        return 1.0, 1.0  # theorem1 with w = 1, without its coefficient
    if mode in ("theorem1", "theorem1_contrast"):
        return beta / beta2, beta2
    w = beta2 * l1 + w_floor
    return w, beta / w


def teacher_logits(logp_dpo: Tensor, logp_third: Tensor, w: Tensor | float, mode: str) -> Tensor:
    """z* up to a constant, of shape (..., V), from log-probs of that shape and w of shape (...) or a number.

    Both forms are z_d + e (z_d - z_r), with e = w or w - 1. A token that both exclude stays excluded.
    """
    factor = (w if mode in ("aligndistil", "theorem1_contrast") else w - 1.0) * torch.ones_like(logp_dpo[..., 0])
    neither = torch.isneginf(logp_dpo) & torch.isneginf(logp_third)
    difference = torch.where(neither, 0.0, logp_dpo - logp_third).clamp(-LARGEST, LARGEST)
    return logp_dpo + (factor[..., None] * difference).clamp(-LARGEST, LARGEST)


def swapped(group: Group) -> Group:
    """A pair with chosen and rejected exchanged, scores and aspects with them; without columns."""
    was = group.example
    example = replace(
        was,
        responses=was.responses[::-1],
        scores=was.scores and was.scores[::-1],
        aspects={name: scores[::-1] for name, scores in was.aspects.items()},
    )
    return replace(group, example=example, traces=group.traces[::-1], columns={})


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """The models that make the teacher, and how stages a and b train them."""

    third: Literal["auto", "reverse", "reference"] = "auto"
    """pi_r: DPO on swapped pairs or the reference; auto: the reference in the theorem1 modes of one DPO model."""
    dpo: str = ""
    """Folder or Hub id of a DPO model that is trained already (with this beta), in place of stage a."""
    reverse: str = ""
    """The same for stage b."""
    stage_lr: float | None = None
    """Learning rate of both stages (default: the run's, as in the paper)."""
    stage_steps: int | None = None
    """Updates of each stage (default: as many as the run's)."""


@dataclass(frozen=True, kw_only=True)
class AlignDistil:
    """Options of AlignDistil."""

    mode: Literal["aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive", "gkd"] = "aligndistil"
    """How the teacher is made; gkd is plain reverse-KL distillation into the DPO model."""
    beta: float = 0.1
    """beta of DPO in both stages, and of the reward."""
    beta2: float | None = None
    """Multiplier of D_t (default 10, on-policy 15); in the constant modes the KL coefficient (default: beta)."""
    w_floor: float = 1e-3
    """Least w_t: b_t is at most beta / w_floor, where the two models agree."""
    kd_temperature: float = 1.0
    """T of the distillation."""
    reward_len_norm: bool = True
    """Divide each response's sum by its tokens."""
    on_policy: bool = False
    """Distil on responses sampled from the policy (temperature 1, top-p 1) instead of the chosen ones."""
    max_new_tokens: int = 1024
    """Longest sampled response."""
    compat: Literal["none", "reference"] = "none"
    """reference: off-policy, kd_temperature divides the teacher's logits only, as in the release."""
    teachers: Teachers = field(default_factory=Teachers)
    """The DPO model and the third model."""

    data: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        known = {"mode": tuple(_THIRD), "compat": ("none", "reference")}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.teachers.third not in ("auto", "reverse", "reference"):
            raise ValueError(f"teachers.third={self.teachers.third!r} is not one of auto, reverse, reference")
        for name in ("beta", "beta2", "w_floor", "kd_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give 1 or more")

    @property
    def third(self) -> str:
        """``reverse`` or ``reference``; empty for gkd, which has no third model."""
        auto = self.mode == "gkd" or self.teachers.third == "auto"
        return _THIRD[self.mode] if auto else self.teachers.third

    @property
    def models(self) -> tuple[str, ...]:
        """The DPO model and the third one."""
        return ("dpo", self.third) if self.third else ("dpo",)

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of all models; what needs whole distributions is in `token_stats`."""
        return {name: LOGP for name in ("policy", *self.models)}

    @property
    def rollout(self) -> Sampling | None:
        """How the policy answers each batch, if it does."""
        return Sampling(max_new_tokens=self.max_new_tokens) if self.on_policy else None

    def _weights(self, l1: Tensor) -> tuple[Tensor | float, Tensor | float]:
        adaptive = self.mode in ("aligndistil", "theorem1_adaptive")
        default = (15.0 if self.on_policy else 10.0) if adaptive else self.beta
        return weights(l1, self.mode, self.beta, default if self.beta2 is None else self.beta2, self.w_floor)

    def prepare(self, run: Preparation) -> None:
        """Train (or load) the DPO model and the third one; keep the chosen response of every training pair."""
        ours = self.teachers
        config = {
            name: value for name, value in (("lr", ours.stage_lr), ("steps", ours.stage_steps)) if value is not None
        }
        was = run.policy.identity()
        alike: dict[str, Any] = {"device": str(run.policy.device), "template": run.policy.template}
        alike |= {"dtype": was["dtype"], "attention": was["attention"]}
        for name, path in (("dpo", ours.dpo), ("reverse", ours.reverse)):
            if name not in self.models:
                continue
            on = [swapped(group) for group in run.groups] if name == "reverse" else None
            lm = load(path, **alike) if path else run.train("dpo", on=on, config=config, beta=self.beta)
            run.give(name, lm)
        if self.mode == "theorem1" and self._weights(torch.zeros(()))[0] == 1.0:
            run.report(
                "aligndistil: with beta2 = beta the teacher is the DPO model itself; a smaller beta2 goes beyond"
            )
        run.groups = [replace(group, traces=group.traces[:1], columns={}) for group in run.groups]

    def token_stats(self, logits: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """Of every position: ``distil_kl`` (the one with a gradient, the student's), ``l1`` (D_t), and KLs of the
        student to the two models. Logits (chunk, V), values (chunk,)."""
        divide = 1.0 if self.compat == "reference" and not self.on_policy else self.kd_temperature
        student = torch.log_softmax(logits["policy"] / divide, -1)
        with torch.no_grad():
            logp = torch.log_softmax(logits["policy"], -1) if divide != 1.0 else student
            dpo = target = torch.log_softmax(logits["dpo"], -1)
            out = {"kl_dpo": kl_divergence(logp, dpo)}
            if self.third:
                third = torch.log_softmax(logits[self.third], -1)
                l1 = (dpo.exp() - third.exp()).abs().sum(-1)
                target = teacher_logits(dpo, third, self._weights(l1)[0], self.mode)
                out |= {"kl_third": kl_divergence(logp, third), "l1": l1}
            # what the teacher excludes has a large loss, not an infinite one, whose gradient would be NaN
            target = torch.log_softmax(target / self.kd_temperature, -1).clamp(min=-LARGEST)
        return out | {"distil_kl": kl_divergence(student, target)}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over responses; of pairs, over the chosen ones."""
        policy, mask_NT = stats["policy"], stats["policy"].mask_NT
        zeros_NT = torch.zeros_like(policy.extra["distil_kl"])
        l1_NT = torch.where(mask_NT, policy.extra["l1"], zeros_NT) if self.third else zeros_NT
        w, b = self._weights(l1_NT)
        losses_NT = b * policy.extra["distil_kl"]
        per_response = masked_mean if self.reward_len_norm else masked_sum
        rows_B = torch.arange(len(mask_NT), device=mask_NT.device) if batch.pairs_B2 is None else batch.chosen
        count, losses_B = float(len(rows_B)), per_response(losses_NT, mask_NT)[rows_B]
        loss = Loss(losses_B.sum(), count)
        with torch.no_grad():
            for name in ("kl_dpo", "kl_third") if self.third else ("kl_dpo",):
                label, values_NT = name.removeprefix("kl_"), policy.extra[name]
                loss.metrics[f"kl/{label}"] = (masked_sum(values_NT, mask_NT)[rows_B].sum(), count)
                loss.metrics[f"kl_token/{label}"] = (masked_mean(values_NT, mask_NT)[rows_B].sum(), count)
            if self.third:
                # sum_v p (log p_dpo - log p_r) is the difference of the two KLs
                expected = self.beta * (loss.metrics["kl/third"][0] - loss.metrics["kl/dpo"][0])
                mean_w = masked_mean(w, mask_NT)[rows_B].sum() if isinstance(w, Tensor) else w * count
                shares_NT = losses_NT.detach().clamp(min=0)
                near = per_response(torch.where(l1_NT < EQUAL, shares_NT, zeros_NT), mask_NT)[rows_B].sum()
                loss.metrics["rewards/expected"] = (expected, count)
                loss.metrics["teacher/weight"] = (mean_w, count)
                loss.metrics["teacher/l1"] = (masked_mean(l1_NT, mask_NT)[rows_B].sum(), count)
                loss.metrics["loss_share/equal_teachers"] = (near, per_response(shares_NT, mask_NT)[rows_B].sum())
            if batch.pairs_B2 is not None:
                base_N = stats[self.third].sums() if self.third else 0.0
                loss.metrics.update(pair_metrics(self.beta * (policy.sums() - base_N), stats, batch))
        return loss
