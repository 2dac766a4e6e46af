"""LSC — log-sigmoid centred rewards, and their sum as "good in all of them".

Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models", ICML 2024, arXiv 2402.00742. For
rewards r_i on the Bradley-Terry scale and references r_ref,i(x) of a prompt:

    u(x, y) = sum_i log sigmoid( r_i(x, y) - r_ref,i(x) ),        du / dr = sigmoid( r_ref - r )

exp(u) is the probability that y is at least as good as the reference in every property, if those are independent given
x and y; where E[u] - gamma KL(pi || pi_0) is maximal, pi = pi_0 exp(u / gamma) / Z. The slope is 1 far below the
reference and 0 far above it, so a reward cannot be bought by being very good at one thing. The reference is the
q-quantile (0.85) of the rewards of the frozen base policy's samples for the prompt, or a canned answer's reward, or a
constant, or a given one; it is made once and kept by prompt.

The transform acts on a sequence's reward, before any KL penalty and normalisation. GRPO's division by the group's
deviation partly undoes the centring: there it matters through the curvature alone. For one reward it does not change
which of n samples is best. As credit, u stands where the rewards stood: each reward's share of u in proportion to its
own token credit where that has one sign, else on the last token.

Differs from the authors' code: none is public. ``mode="any"`` (log of 1 - prod(1 - sigmoid)) is ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from ..core.credit import Credit
from ..core.options import known_values
from ..core.protocols import Scorer, as_scorer
from ..core.trace import Trace

_LOGIT = "bradley-terry logit"
_FEWEST = 5


def lsc(reward: np.ndarray | float, reference: np.ndarray | float) -> np.ndarray:
    """log sigmoid(reward - reference), finite however far they are apart."""
    return -np.logaddexp(0.0, np.asarray(reference, np.float64) - np.asarray(reward, np.float64))


def conjunction(rewards_IN: np.ndarray, references_IN: np.ndarray) -> np.ndarray:
    """Sum over I properties of their LSC: (N,)."""
    return lsc(rewards_IN, references_IN).sum(0)


def disjunction(rewards_IN: np.ndarray, references_IN: np.ndarray) -> np.ndarray:
    """log(1 - prod_i (1 - sigmoid(r_i - ref_i))): at least one property holds. (N,)."""
    missed_N = lsc(references_IN, rewards_IN).sum(0)  # log of the product of 1 - sigmoid
    far_N = missed_N > -1e-12  # so far below that 1 - product is the sum
    near_N = np.log(-np.expm1(np.where(far_N, -1.0, missed_N)))
    return np.where(far_N, np.logaddexp.reduce(lsc(rewards_IN, references_IN), 0), near_N)


def quantile_reference(rewards: Sequence[float], q: float = 0.85, *, gaussian: bool = False) -> float:
    """The q-quantile of samples' rewards, by linear interpolation, or of a Gaussian with their mean and population std.

    Fewer than 5 samples fall back to the Gaussian, with a warning.

    Raises:
        ValueError: no sample, or a reward that is not finite.
    """
    x = np.asarray(rewards, np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"a reference needs finite rewards of samples, not {list(rewards)[:5]}")
    if np.ptp(x) == 0:
        return float(x[0])
    if len(x) < _FEWEST and not gaussian:
        warnings.warn(f"the quantile of {len(x)} samples says little; a Gaussian's is taken", stacklevel=2)
        gaussian = True
    return float(x.mean() + NormalDist().inv_cdf(q) * x.std() if gaussian else np.quantile(x, q))


def tilted(utility_NK: np.ndarray, gamma: float) -> np.ndarray:
    """pi_0 exp(u / gamma) / Z over K candidates of each prompt, pi_0 uniform: (N, K)."""
    x = utility_NK / gamma
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl_from_uniform(policy_NK: np.ndarray) -> np.ndarray:
    """KL(pi || uniform) in nats: (N,)."""
    return (policy_NK * np.log(np.clip(policy_NK, 1e-300, None))).sum(-1) + math.log(policy_NK.shape[-1])


def gamma_of_kl(utility_NK: np.ndarray, kl: float, tolerance: float = 1e-4) -> float:
    """The gamma at which the tilted policy is `kl` nats from uniform on average, by bisection.

    Raises:
        ValueError: more than any gamma gives.
    """
    low, high = 1e-6, 1e6
    if kl_from_uniform(tilted(utility_NK, low)).mean() < kl:
        raise ValueError(f"no gamma reaches {kl} nats with {utility_NK.shape[-1]} candidates; ask for less")
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kl_from_uniform(tilted(utility_NK, middle)).mean() > kl else (low, middle)
    return math.sqrt(low * high)


@dataclass
class References:
    """References of prompts, made once: prompt -> one number a reward.

    Attributes:
        values: by key of the prompt (`key`).
        default: for every prompt, where the reference is a constant.
    """

    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    default: tuple[float, ...] | None = None

    @staticmethod
    def key(prompt: Any) -> str:
        """Of a prompt: text or messages."""
        return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]

    def of(self, trace: Trace) -> tuple[float, ...]:
        """Of a completion's prompt.

        Raises:
            ValueError: it was never made.
        """
        found = self.values.get(self.key(trace.meta.get("prompt", trace.prompt_text)), self.default)
        if found is None or any(map(math.isnan, found)):
            row = trace.meta.get("row", "?")
            raise ValueError(f"row {row}: its prompt has no reference; make them with RewardTransform.refer(samples)")
        return found


@dataclass(frozen=True, kw_only=True)
class RewardTransform:
    """Scorer that transforms and combines others."""

    rewards: Any = None
    """From Python: a scorer, or several, on the Bradley-Terry scale."""
    references: References = field(default_factory=References)
    """References of prompts; `refer` fills them."""
    q: float = 0.85
    """Quantile of the base policy's samples that is the reference."""
    gaussian: bool = False
    """The quantile of a Gaussian with the samples' mean and std, instead of the samples' own."""
    mode: Literal["all", "any", "raw", "centred"] = "all"
    """all: sum of LSC; any: at least one property; raw: weighted sum; centred: weighted sum less the references."""
    weights: tuple[float, ...] = ()
    """Of raw and centred sums (default: 1)."""
    floor: float | None = None
    """Least value of each transformed reward: an outlier far below would rule a group's deviation."""

    def __post_init__(self) -> None:
        known_values(self)
        if not 0 < self.q < 1:
            raise ValueError(f"q={self.q} is a quantile, between 0 and 1")

    @staticmethod
    def example_options() -> dict[str, Any]:
        """A reward and its reference, for tests."""
        return {"rewards": [lambda text: len(text) / 10.0], "references": References(default=(2.0,))}

    @property
    def scorers(self) -> list[Scorer]:
        """The rewards.

        Raises:
            ValueError: there are none.
        """
        some = self.rewards if isinstance(self.rewards, (list, tuple)) else [self.rewards] * (self.rewards is not None)
        if not some:
            raise ValueError("reward-transform transforms other rewards; give rewards=[SCORER, ...] from Python")
        if self.weights and len(self.weights) != len(some):
            raise ValueError(f"{len(self.weights)} weights for {len(some)} rewards; give one each")
        return [as_scorer(s) for s in some]

    def refer(self, samples: Sequence[Sequence[Trace]], of: Sequence[int] = (), mean: bool = False) -> RewardTransform:
        """Make the reference of each prompt from completions by the frozen base policy, `samples` of each prompt.

        Args:
            of: for these rewards alone (the others keep theirs), or all. mean: of canned answers, not the quantile.
        """
        q, gaussian = (0.5, True) if mean else (self.q, self.gaussian)
        for group in samples:
            key = References.key(group[0].meta.get("prompt", group[0].prompt_text))
            found = list(self.references.values.get(key, (math.nan,) * len(self.scorers)))
            for i in of or range(len(found)):
                row = [c.reduce() for c in self.scorers[i].score(group)]
                found[i] = quantile_reference(row, q, gaussian=gaussian)
            self.references.values[key] = tuple(found)
        return self

    def score(self, items: Sequence[Trace]) -> list[Credit]:
        """Credit of kind reward; ``meta["parts"]`` has each reward's transformed share.

        Raises:
            ValueError: no reward, or a prompt without a reference.
        """
        scorers = self.scorers
        credits = [s.score(items) for s in scorers]
        for s, some in zip(scorers, credits, strict=True) if self.mode in ("all", "any") else ():
            _check_scale(s, some)
        if not items:
            return []
        rewards_IN = np.array([[c.reduce() for c in some] for some in credits])
        if self.mode == "raw":
            references_IN = np.zeros_like(rewards_IN)
        else:
            references_IN = np.array([self.references.of(t) for t in items]).T
        if len(references_IN) != len(scorers):
            raise ValueError(f"{len(references_IN)} references for {len(scorers)} rewards; make them again with refer")
        parts_IN = self._parts(rewards_IN, references_IN)
        return [self._credit(t, [some[n] for some in credits], parts_IN[:, n]) for n, t in enumerate(items)]

    def _parts(self, rewards_IN: np.ndarray, references_IN: np.ndarray) -> np.ndarray:
        """What each reward adds to the utility: (I, N)."""
        if self.mode == "any":  # one number for all; shared equally
            whole_N = disjunction(rewards_IN, references_IN)
            return np.broadcast_to(whole_N / len(rewards_IN), rewards_IN.shape)
        if self.mode == "all":
            parts = lsc(rewards_IN, references_IN)
        else:
            weights = np.array(self.weights or (1.0,) * len(rewards_IN))[:, None]
            parts = weights * (rewards_IN - references_IN)
        return parts if self.floor is None else np.maximum(parts, self.floor)

    def _credit(self, trace: Trace, credits: Sequence[Credit], parts: np.ndarray) -> Credit:
        values = np.zeros(len(trace))
        for credit, part in zip(credits, parts, strict=True):
            own = credit.values
            one_sign = own.any() and (np.all(own >= 0) or np.all(own <= 0))
            values += part * own / own.sum() if one_sign else Credit.of_sequence(trace, float(part)).values
        names = {f"{i}:{c.method or 'reward'}": float(p) for i, (c, p) in enumerate(zip(credits, parts, strict=True))}
        meta = {"parts": names, "scale": "log-probability, at most 0" if self.mode in ("all", "any") else "raw sum"}
        return Credit(trace=trace, values=values, kind="reward", method="reward-transform", version=1, meta=meta)


def _check_scale(scorer: Scorer, credits: Sequence[Credit]) -> None:
    scale = str(credits[0].meta.get("scale", "")) if credits else _LOGIT
    if "logit" not in scale and "bradley" not in scale.lower():
        name = credits[0].method or type(scorer).__name__
        warnings.warn(
            f"{name} declares {f'the scale {scale!r}' if scale else 'no scale'}: LSC is for Bradley-Terry logits; "
            "map a probability by its logit, or fit the score to pairs first",
            stacklevel=4,
        )
