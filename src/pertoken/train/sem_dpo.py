"""Sem-DPO — DPO for prompt rewriters, weighted by how much of the prompt's meaning the chosen rewrite keeps.

Mohamed, Khan, Wang, Khan, Ge, Khan, Ahmad, Anwar, 2025, arXiv 2507.20133. x is the user's prompt, e a frozen encoder of
texts, u(y) = log pi(y|x)/pi_ref(y|x) summed over tokens, in nats:

    d_cos = 1 - cos( e(x), e(y_w) ) in [0, 2]        W_a(x, y_w) = exp( -a d_cos ) in (0, 1]
    L = -E[ W_a(x, y_w) log sigmoid( beta (u(y_w) - u(y_l)) ) ]

W is a constant, computed once before training from the prompt and the CHOSEN response alone. It multiplies the loss,
and the mean is over pairs: weights are not renormalised, so that small ones train less (`normalize="mean1"` divides by
their mean over the training pairs, which is not the paper's loss). Texts are the data's words, never decoded ids. A
prompt of several turns is represented by its last user turn.

Drift: a pair's gradient is at most W beta (|grad log pi(y_w)| + |grad log pi(y_l)|). If the policy puts mass on chosen
responses in proportion to their weight, its expected distance is E[W d]/E[W] <= E[d], since exp(-a d) falls with d
(`weighted_mean_distance`, decreasing in a). The paper's theorem was not to hand; this is the part that can be checked.
Pairs of a rewriter's samples, by any scorer: `choose_pairs`.

Differs from the authors' code: none is released. The weight's form is from a write-up; beta and a = 1 are choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.describe import describe
from ..core.embed import MINILM, TextEncoder, cosines
from ..core.examples import one_of, said_by
from ..core.protocols import Batch, Loss, Preparation
from ..core.record import read_json, write_json
from ..core.stages import load_ragged, save_ragged
from ..core.stats import Stats
from ._pairs import Choice as Choice
from ._pairs import choose_pairs as choose_pairs
from ._preference import LOGP, implicit_rewards, log_sigmoid_loss, pair_loss

COLUMN = "semantic_weight"
FEW = 0.1  # effective pairs, or mean weight, below which training all but stops


def distance_of_similarity(similarity_N: np.ndarray) -> np.ndarray:
    """d = 1 - cos (N,) in [0, 2] of cosines (N,); NaN, which is a cosine that is not defined, stays.

    Raises:
        ValueError: a similarity that is no cosine.
    """
    s = np.asarray(similarity_N, np.float64)
    if (np.abs(s) > 1 + 1e-6).any():
        raise ValueError(f"a similarity of {s[np.nanargmax(np.abs(s))]:.4g} is no cosine; give distances as distance=")
    return 1.0 - np.clip(s, -1.0, 1.0)


def semantic_weights(distance_N: np.ndarray, a: float = 1.0) -> np.ndarray:
    """W = exp(-a d) (N,) of distances (N,), 0 where the distance is NaN.

    Raises:
        ValueError: a negative distance.
    """
    d = np.asarray(distance_N, np.float64)
    if (d < 0).any():
        raise ValueError(f"a distance of {np.nanmin(d):.4g} is negative; give similarities as similarity=")
    return np.where(np.isnan(d), 0.0, np.exp(-a * np.nan_to_num(d)))


def effective_sample_size(weight_N: np.ndarray) -> float:
    """(sum W)^2 / sum W^2, at most N; 0 if all weights are."""
    w = np.asarray(weight_N, np.float64)
    return float(w.sum() ** 2 / (w**2).sum()) if w.any() else 0.0


def mean_distance(distance_N: np.ndarray) -> float:
    """E[d] over the pairs whose distance is defined."""
    return weighted_mean_distance(distance_N, 0.0)


def weighted_mean_distance(distance_N: np.ndarray, a: float) -> float:
    """E[W d] / E[W] over the pairs whose distance is defined: at most E[d], and falling in a."""
    d = np.asarray(distance_N, np.float64)
    d = d[~np.isnan(d)]
    w = np.exp(-a * (d - d.min())) if len(d) else d  # a common factor cancels, and does not underflow
    return float((w * d).sum() / w.sum()) if len(d) else math.nan


def sem_dpo_loss(margin_B: Tensor, weight_B: Tensor) -> Tensor:
    """Losses (B,) from margins beta (u(y_w) - u(y_l)) and weights (B,), which get no gradient."""
    return weight_B.detach() * log_sigmoid_loss(margin_B)


@dataclass(frozen=True, kw_only=True)
class SemDPO:
    """Options of Sem-DPO."""

    a: float = 1.0
    """a, how fast a weight falls with the distance (0 is DPO); sweep 0.5, 1, 2, 4."""
    beta: float = 0.1
    """beta of DPO."""
    normalize: Literal["none", "mean1"] = "none"
    """none (the paper), or divide the weights by their mean over the training pairs."""
    encoder: str = MINILM
    """e: all-minilm, a folder, or a Hub id."""
    long: Literal["chunk", "truncate"] = "chunk"
    """Texts beyond the encoder's window: average their windows, or judge them by the first."""
    turns: Literal["last", "all"] = "last"
    """What stands for a prompt of several turns: the last user turn, or all of them."""
    encode: Any = None
    """From Python: a callable from N texts to vectors (N, H), in place of the encoder."""
    similarity: Any = None
    """From Python: a callable from N prompts and N chosen responses to cosines (N,), in place of both."""
    distance: Any = None
    """From Python: the same, to distances (N,) of at least 0, such as 1 - cos."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("none", "mean1"))
        one_of("long", self.long, ("chunk", "truncate"))
        one_of("turns", self.turns, ("last", "all"))
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.a < math.inf:
            raise ValueError(f"a={self.a} must not be negative, which would reward drift")
        if sum(given is not None for given in (self.encode, self.similarity, self.distance)) > 1:
            raise ValueError("give one of encode, similarity and distance")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of both models."""
        return {"policy": LOGP, "reference": LOGP}

    def _measure(self) -> Any:
        """What turns texts into distances; made once a run, as an encoder takes time to load."""
        return self.similarity or self.distance or self.encode or TextEncoder(self.encoder, long=self.long)

    def distances(self, prompts: Sequence[str], chosen: Sequence[str], measure: Any = None) -> np.ndarray:
        """d (N,) of N prompts and chosen responses; NaN where it is not defined: no words, or a vector of zeros."""
        measure = measure or self._measure()
        if self.similarity is not None:
            d = distance_of_similarity(measure(prompts, chosen))
        elif self.distance is not None:
            d = np.asarray(measure(prompts, chosen), np.float64)
        else:
            vectors = np.asarray(measure([*prompts, *chosen]))
            d = distance_of_similarity(cosines(vectors[: len(prompts)], vectors[len(prompts) :]))
        words = [bool(x.strip() and y.strip()) for x, y in zip(prompts, chosen, strict=True)]
        return np.where(words, d, np.nan)

    def weights(self, prompts: Sequence[str], chosen: Sequence[str]) -> np.ndarray:
        """W (N,) in [0, 1] of N prompts and chosen responses: a weight for any pairwise loss."""
        return semantic_weights(self.distances(prompts, chosen), self.a)

    def prepare(self, run: Preparation) -> None:
        """Give every pair the column ``semantic_weight`` and report mean weight and effective sample size."""
        if self.a == 0:
            return
        measure = self._measure()
        turns = [said_by("user", g.example.prompt) for g in run.every]
        prompts = [(t[-1] if t else "") if self.turns == "last" else "\n".join(t) for t in turns]
        chosen = ["\n".join(said_by("assistant", g.example.responses[0])) for g in run.every]

        def make(folder: Path) -> None:
            save_ragged(folder / "distances.npz", [self.distances(prompts, chosen, measure)])
            too_long = getattr(measure, "too_long", None)
            write_json(folder / "texts.json", {"too long": too_long(prompts + chosen) if too_long else 0})

        kind = "similarity" if self.similarity else "distance" if self.distance else "encode"
        inputs = {kind: describe(measure), "turns": self.turns, "data": run.data_key()}
        folder = run.stage("semantic-distances", inputs, make)
        (distance_N,) = load_ragged(folder / "distances.npz")
        weight_N, n = semantic_weights(distance_N, self.a), len(run.groups)
        mean = float(weight_N[:n].mean()) if n else 0.0
        if self.normalize == "mean1" and mean > 0:
            weight_N = weight_N / mean
        for group, weight in zip(run.every, weight_N, strict=True):
            group.add_column(COLUMN, float(weight))
        self._report(run, distance_N, weight_N[:n], mean, read_json(folder / "texts.json")["too long"])

    def _report(self, run: Preparation, distance_N: np.ndarray, weight_N: np.ndarray, mean: float, long: int) -> None:
        """Say what is trained on, and warn where it is next to nothing."""
        n, size = len(weight_N), effective_sample_size(weight_N)
        d = distance_N[:n]
        run.report(
            f"sem-dpo: mean weight {mean:.4f}, effective pairs {size:.1f} of {n}; mean distance of the chosen "
            f"{mean_distance(d):.4f}, weighted {weighted_mean_distance(d, self.a):.4f}"
        )
        if size < FEW * n:
            run.report(f"sem-dpo: warning: fewer than {FEW:.0%} of the pairs are effective; lower a={self.a}")
        if mean < FEW and self.normalize == "none":
            run.report(
                f"sem-dpo: warning: the mean weight is below {FEW}, so that little is trained; lower a={self.a}, look "
                "at the encoder, or choose normalize='mean1'"
            )
        if undefined := int(np.isnan(distance_N).sum()):
            run.report(f"sem-dpo: warning: {undefined} pairs have no direction (no words, or zeros) and weigh 0")
        if long:
            what = "are averaged over windows" if self.long == "chunk" else "are judged by their beginning alone"
            run.report(f"sem-dpo: warning: {long} texts lie beyond the encoder's window and {what}")

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: torch.tensor(rng.uniform(0.0, 1.0))}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs, of which each counts as one whatever its weight.

        Raises:
            ValueError: there is no column ``semantic_weight``.
        """
        rewards_N = implicit_rewards(stats, self.beta)
        margin_B = rewards_N[batch.chosen] - rewards_N[batch.rejected]
        if self.a == 0:
            return pair_loss(log_sigmoid_loss(margin_B), rewards_N, stats, batch)
        if COLUMN not in batch.columns:
            raise ValueError(f"Sem-DPO needs the column {COLUMN!r}, which is not there; run prepare, or choose a=0")
        weight_B = batch.columns[COLUMN][batch.chosen]
        result = pair_loss(sem_dpo_loss(margin_B, weight_B), rewards_N, stats, batch)
        result.metrics["weight/mean"] = (weight_B.sum(), float(len(weight_B)))
        return result
