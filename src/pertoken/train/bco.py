"""BCO — Binary Classifier Optimization: thumbs up and thumbs down, one response a row, no pairs.

Jung, Han, Nam, On (Kakao Brain), ACL 2025, arXiv 2404.04656. With s the sigmoid, D+ the thumbs up, D- the thumbs down:

    r(x,y) = beta sum_t log pi(y_t|.) - log pi_ref(y_t|.)                      over the tokens of y, in nats times beta
    delta  = ( E_{D+}[r] + E_{D-}[r] ) / 2, a moving estimate, no gradient                         reward shift
    w(x)   = clip( p(1|x) / (1 - p(1|x) + 1e-8), 0.5, 10 )                        underlying distribution matching
    L      = -log s(r - delta) on D+;  -w(x) log s(-(r - delta)) on D-;  mean over all rows

For any shift d, -log s(r_w - r_l) < -log s(r_w - d) - log s(-(r_l - d)): a classifier's loss bounds DPO's, tightest at
d = (r_w + r_l)/2. p(1|x) is the probability that a prompt is one of a thumb up, from a logistic regression with
balanced classes on frozen embeddings of the prompts, so that p/(1-p) is the ratio of the two densities of prompts.

delta is updated with the batch (of all processes) before its loss, in training alone; evaluation takes the stored one.
`class_balanced_ema`: m_c begins as the first batch mean of class c, then m_c <- decay m_c + (1 - decay) batch mean; a
class that is not in the batch keeps m_c, one that was never seen counts as 0, where rewards begin. `running_mean`: the
mean of all rewards seen so far, whatever their class (TRL's).

Differs from the authors' code: nothing known of it. TRL's trainer (until 0.24) differs in the shift, and draws the
prompts that its classifier sees with repetition. A public summary divides by 4 in delta; the bound says 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.describe import describe
from ..core.distributed import summed
from ..core.embed import MINILM, TextEncoder
from ..core.examples import said_by
from ..core.protocols import Batch, Loss, Preparation
from ..core.stages import load_ragged, save_ragged
from ..core.stats import Stats
from ._preference import LOGP, implicit_rewards, label_metrics

COLUMN = "prompt_weight"
SATURATED = 50.0  # |r| from which a float32 sigmoid is 0 or 1 to its last digit


def bco_loss(rewards_N: Tensor, label_N: Tensor, delta: Tensor | float = 0.0, weight_N: Tensor | None = None) -> Tensor:
    """Losses (N,) from rewards r (N,), labels (N,), True for thumbs up, and weights (N,) of the thumbs down."""
    shifted_N = rewards_N - delta
    losses_N = -F.logsigmoid(torch.where(label_N, shifted_N, -shifted_N))
    return losses_N if weight_N is None else torch.where(label_N, losses_N, weight_N.detach() * losses_N)


def density_ratio(probability_N: np.ndarray, least: float = 0.5, most: float = 10.0) -> np.ndarray:
    """w (N,): the odds of probabilities (N,) in [0, 1], clipped."""
    p = np.asarray(probability_N, np.float64)
    return np.clip(p / (1.0 - p + 1e-8), least, most)


def desirable_probability(up_NH: np.ndarray, down_NH: np.ndarray, prompts_NH: np.ndarray) -> np.ndarray:
    """p(1|x) (N,) of prompts by a logistic regression with balanced classes on the embeddings `up_NH` and `down_NH`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "matching prompts needs scikit-learn: pip install 'pertoken[classifiers]', or choose udm=False"
        ) from error
    label = np.repeat([1, 0], [len(up_NH), len(down_NH)])
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(np.concatenate([up_NH, down_NH]), label)
    return fitted.predict_proba(prompts_NH)[:, 1]


class Shift(nn.Module):
    """The moving estimate of delta: means and counts of the rewards of thumbs down (0) and up (1), as buffers."""

    mean_C: Tensor
    count_C: Tensor

    def __init__(self, kind: str = "class_balanced_ema", decay: float = 0.9):
        super().__init__()
        self.kind, self.decay = kind, decay
        self.register_buffer("mean_C", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count_C", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rewards_N: Tensor, label_N: Tensor, counts: bool = True) -> None:
        """Take in the rewards (N,) of a batch, with those of all other processes; those of a process that does not
        count are left out, and a batch with a reward that is not finite changes nothing."""
        member_CN = torch.stack([~label_N, label_N]) & counts
        total_C = torch.where(member_CN, rewards_N.double(), 0.0).sum(1)
        total_C, n_C = summed(total_C, member_CN.sum(1).double())
        if not torch.isfinite(total_C).all():
            return
        here_C, seen_C = total_C / n_C.clamp(min=1), self.count_C > 0
        if self.kind == "running_mean":
            rate_C = n_C / (self.count_C + n_C).clamp(min=1)
        else:
            rate_C = torch.where(seen_C, torch.full_like(here_C, 1.0 - self.decay), torch.ones_like(here_C))
        self.mean_C += torch.where(n_C > 0, rate_C * (here_C - self.mean_C), 0.0)
        self.count_C += n_C

    def delta(self) -> Tensor:
        """The shift, a scalar without gradient; 0 before the first batch."""
        if self.kind == "running_mean":
            return (self.count_C * self.mean_C).sum() / self.count_C.sum().clamp(min=1)
        return self.mean_C.sum() / 2


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How the distributions of prompts are matched."""

    encoder: str = MINILM
    """Frozen encoder of the prompts: all-minilm, a folder, or a Hub id."""
    prompt_sample_size: int = 1024
    """Prompts of each label that the classifier is fitted on, at most."""
    min_density_ratio: float = 0.5
    """Lower clip of w."""
    max_density_ratio: float = 10.0
    """Upper clip of w."""
    prompt_sample_seed: int = 0
    """Which prompts, where there are more."""


@dataclass(frozen=True, kw_only=True)
class BCO:
    """Options of BCO."""

    beta: float = 0.1
    """beta, strength of the constraint to the reference."""
    shift: Literal["class_balanced_ema", "running_mean", "none"] = "class_balanced_ema"
    """delta: moving average of the two classes' means, mean of all rewards so far (TRL), or 0."""
    decay: float = 0.9
    """How much of a class's mean the moving average keeps a batch."""
    udm: bool = True
    """Underlying distribution matching: weigh thumbs down by w(x)."""
    matching: Matching = field(default_factory=Matching)
    """How w is made."""
    encode: Any = None
    """From Python: a callable from N texts to vectors (N, H), in place of the encoder."""

    data: ClassVar[str] = "unpaired"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.shift not in ("class_balanced_ema", "running_mean", "none"):
            raise ValueError(f"shift={self.shift!r} is not one of class_balanced_ema, running_mean, none")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1")
        if not (
            0 <= self.matching.min_density_ratio <= self.matching.max_density_ratio
            and self.matching.prompt_sample_size >= 1
        ):
            raise ValueError("0 <= min_density_ratio <= max_density_ratio and prompt_sample_size >= 1 are needed")

    @property
    def batch_coupled(self) -> bool:
        """Whether a row's loss depends on the others', through delta."""
        return self.shift != "none"

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def init_state(self, config: Any) -> nn.Module | None:
        """What keeps delta."""
        return Shift(self.shift, self.decay) if self.batch_coupled else None

    def prepare(self, run: Preparation) -> None:
        """Give every row the column ``prompt_weight`` (w for thumbs down, 1 for thumbs up) and report what it is like.

        Raises:
            ValueError: all rows have one label, or the encoder is missing.
            ImportError: scikit-learn is not installed.
        """
        label = np.array([bool(g.example.label) for g in run.groups])
        if label.all() or not label.any():
            which, other = ("up", "down") if label.all() else ("down", "up")
            raise ValueError(
                f"BCO tells thumbs up from thumbs down, but all {len(label)} training rows are thumbs {which}; "
                f"add rows that are thumbs {other}"
            )
        if not self.udm:
            return
        how, n = self.matching, len(label)
        encode = self.encode or TextEncoder(how.encoder)

        def make(folder: Path) -> None:
            vectors_NH = encode(["\n".join(said_by("user", g.example.prompt)) for g in run.every])
            rng, train_NH, most = np.random.default_rng(how.prompt_sample_seed), vectors_NH[:n], how.prompt_sample_size
            some = [rng.permutation(np.flatnonzero(label == up))[:most] for up in (True, False)]
            save_ragged(folder / "p.npz", [desirable_probability(*(train_NH[i] for i in some), vectors_NH)])

        inputs = {"encoder": describe(encode), "matching": describe(how), "data": run.data_key()}
        (probability_N,) = load_ragged(run.stage("bco-matching", inputs, make) / "p.npz")
        ratio_N = density_ratio(probability_N, how.min_density_ratio, how.max_density_ratio)
        for group, ratio in zip(run.every, ratio_N, strict=True):
            group.add_column(COLUMN, 1.0 if group.example.label else float(ratio))
        self._report(run, ratio_N[:n][~label], label)

    def _report(self, run: Preparation, weight_D: np.ndarray, label: np.ndarray) -> None:
        """Say what the weights of the thumbs down are like, and that they say nothing where all are clipped."""
        least, most = self.matching.min_density_ratio, self.matching.max_density_ratio
        low, high = (weight_D <= least).mean(), (weight_D >= most).mean()
        run.report(
            f"bco: {label.sum()} thumbs up, {(~label).sum()} thumbs down weighing {weight_D.mean():.2f} on average; "
            f"{low:.0%} at the clip of {least}, {high:.0%} at {most}"
        )
        if low + high >= 1:
            run.report(
                "bco: warning: every thumb down lies at the clip: the embedding separates the two kinds of prompts, so "
                "that their ratio is a guess; do not rely on matching (udm=False), or give prompts that overlap"
            )

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.tensor(rng.uniform(0.5, 10.0))}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over rows.

        Raises:
            ValueError: data without labels, or without the weights that matching wants.
        """
        if batch.label_N is None:
            raise ValueError("BCO learns from labels; give unpaired data: prompt, completion and label")
        if self.udm and COLUMN not in batch.columns:
            raise ValueError(f"BCO needs the column {COLUMN!r}, which is not there; run prepare, or choose udm=False")
        rewards_N, label_N = implicit_rewards(stats, self.beta), batch.label_N
        weight_N = batch.columns[COLUMN] if self.udm else None
        metrics = label_metrics(rewards_N, stats["policy"].sums(), label_N)
        metrics["rewards/saturated"] = (float((rewards_N.detach().abs() > SATURATED).sum()), float(len(rewards_N)))
        delta: Tensor | float = 0.0
        if self.batch_coupled:
            assert isinstance(state, Shift), "init_state makes it"
            if state.training:
                state.update(rewards_N, label_N, batch.counts)
            delta = state.delta().to(rewards_N)
            metrics["delta"] = (delta, 1.0)
        losses_N = bco_loss(rewards_N, label_N, delta, weight_N)
        return Loss(losses_N.sum(), float(len(losses_N)), metrics)
