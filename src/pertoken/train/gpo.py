"""GPO — General Preference Optimization: rounds on the policy's own samples, scored by a preference model.

Zhang, Zhang, Wu, Xu, Gu, "Beyond Bradley-Terry Models", ICML 2025, arXiv 2410.02197. With s in units of s / tau (the
logit of P(y > y')) and pi_t the policy that the round starts from, which is its reference, too:

    s(y > pi_t | x) = mean over K samples y' of pi_t, y itself included (0), of s(y > y' | x)
    max_pi E[ s(y > pi_t) ] - beta KL(pi || pi_t)      is solved by      pi = pi_t exp( s / beta ) / Z
    L = ( log pi(y|x) - log pi_t(y|x) - s(y > pi_t | x) / beta )^2

for the sample with the best and the one with the worst score of each prompt (the first of equals); the two squares are
averaged, pairs too; log-probs are sums over tokens. SPPO (``target="sppo"``; Wu et al., arXiv 2405.00675) has the win
probability less 1/2 in the place of s. log Z is taken as 0, which holds to first order only: scores of an antisymmetric
model have mean 0, so by Jensen log Z >= 0. What it measures on the samples is reported, without the clamp.

The data's responses are not looked at, only its prompts; prompts whose samples all agree, or all score alike, are
dropped and counted. The loop's options hold for each of the rounds.
Units: beta as the release's 0.001, halved, because its scores are twice s / tau; `clamp` bounds |s / beta| in nats.

Differs from the authors' code: only the number 1000 of `clamp` was exported there; that it bounds |s / beta| is our
reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.credit import Credit
from ..core.data import Example, Group
from ..core.describe import describe
from ..core.protocols import Batch, Loss, Preparation
from ..core.record import read_json, write_json
from ..core.rollout import Sampling, sample
from ..core.stats import Stats, masked_sum
from ..core.trace import Trace
from ._preference import LOGP, implicit_rewards, pair_loss

COLUMN = "policy_score"  # on the last emitted token, as sequence-level credit
_SURE, _TOLERANCE = 1e-9, 1e-4  # a probability nearer to 0 or 1 has no logit worth the name; P + P.T = 1 within this


def policy_scores(table_KK: np.ndarray, target: str = "gpo") -> np.ndarray:
    """What each of K samples scores against all of them, itself included, (K,): the mean of s / tau, or (``sppo``) the
    mean win probability less 1/2. `table_KK` is s(row > column) / tau."""
    values_KK = 0.5 * np.tanh(0.5 * table_KK) if target == "sppo" else table_KK
    return values_KK.mean(1)


def log_partition(scores_K: np.ndarray, beta: float) -> float:
    """log of the mean of exp(s / beta) over samples of pi_t, in nats: what the loss takes to be 0."""
    x = np.asarray(scores_K, np.float64) / beta
    return float(x.max() + np.log(np.exp(x - x.max()).mean()))


def gpo_loss(logratio_N: Tensor, score_N: Tensor, beta: float, clamp: float) -> Tensor:
    """(log pi - log pi_t - s / beta)^2 of each completion, |s / beta| at most `clamp`; scores have no gradient."""
    return (logratio_N - (score_N.detach() / beta).clamp(-clamp, clamp)) ** 2


@dataclass(frozen=True, kw_only=True)
class GPO:
    """Options of GPO."""

    beta: float = 0.0005
    """beta, the price of a nat of KL in units of s / tau (of probability, for sppo)."""
    target: Literal["gpo", "sppo"] = "gpo"
    """What is aimed at: the mean score s, or SPPO's win probability less 1/2."""
    samples: int = 5
    """K, samples a prompt, at least 2."""
    rounds: int = 3
    """Rounds; each starts from the last one's policy and samples from it."""
    clamp: float = 1000.0
    """Bound on |s / beta|, nats."""
    preference: str = ""
    """Folder of a saved GPM, or of a finished gpm-reward run: the preference model."""
    scorer: Any = None
    """From Python, in its place: a scorer with pairwise_table(traces) (s / tau) or prefer(traces) (probabilities)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How samples are drawn (to be pi_t's own: at temperature 1, nothing cut off)."""

    data: ClassVar[str] = "pairs"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.target not in ("gpo", "sppo"):
            raise ValueError(f"target={self.target!r} is not one of gpo, sppo")
        if not (self.beta > 0 and self.clamp > 0):
            raise ValueError(f"beta={self.beta} and clamp={self.clamp} must be above 0")
        if self.samples < 2:
            raise ValueError(
                f"samples={self.samples}: a sample is scored against the others; take 2 or more (paper: 5)"
            )
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}; give 1 or more")

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        """Log-probs of the policy and of pi_t."""
        return {"policy": LOGP, "reference": LOGP}

    def prepare(self, run: Preparation) -> None:
        """Train the earlier rounds, then put pairs of the policy's own samples in the place of the data's.

        Raises:
            ValueError: no preference model, one that is not antisymmetric, no prompt that gives a pair, several rounds
                of an adapter.
        """
        if self.scorer is None and not self.preference:
            raise ValueError("GPO needs a preference model: preference=FOLDER of a GPM, or scorer=... from Python")
        scorer = self.scorer
        if scorer is None:  # on a copy: rounds train the policy's own weights, and the judge must stay what it is
            scorer = run.scorer("gpm", folder=self.preference, lm=run.policy.reference())
        judge_lm = getattr(scorer, "lm", None)
        if self.rounds > 1 and judge_lm is not None and judge_lm.model is run.policy.model:
            raise ValueError("the preference model reads the policy's own weights, which rounds change; give it a copy")
        if "reference" in run.given:
            raise ValueError("GPO's reference is the policy that a round starts from; do not give it another one")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options |= {"rounds": 1, "scorer": scorer, "preference": ""}
        seed = run.config.seed
        if self.rounds > 1 and hasattr(run.policy.model, "disable_adapter"):
            raise ValueError("an adapter's reference is its base, not pi_t; train all weights, or one round: rounds=1")
        for before in range(1, self.rounds):  # with draws and an order of its own each
            run.start_from(run.train("gpo", config={"seed": seed + 1_000_003 * before}, **options))
        groups = run.every
        inputs = {"policy": run.policy.identity(), "data": run.data_key(), "samples": self.samples, "seed": seed}

        def draw(folder: Path) -> None:
            prompts = [g.prompt_ids for g in groups]
            drawn = sample(run.policy, prompts, self.samples, self.sampling, seed=seed)
            write_json(folder / "samples.json", [[t.to_json() for t in some] for some in drawn])

        drawn = run.stage("gpo-samples", inputs | {"sampling": asdict(self.sampling)}, draw)
        traces = [[Trace.from_json(t) for t in some] for some in read_json(drawn / "samples.json")]

        def judge(folder: Path) -> None:
            np.save(folder / "tables.npy", np.stack([preference_table(scorer, some) for some in traces]))

        judged = run.stage("gpo-tables", {"samples": drawn.name, "scorer": describe(scorer)}, judge)
        tables = np.load(judged / "tables.npy", allow_pickle=False)
        pairs = [self._pair(g, some, table) for g, some, table in zip(groups, traces, tables, strict=True)]
        train, held_out = pairs[: len(run.groups)], pairs[len(run.groups) :]
        self._report(run, traces, tables, pairs)
        run.groups, run.held_out = ([g for g in side if g is not None] for side in (train, held_out))
        if not run.groups:
            raise ValueError("no prompt gave two samples that score differently; sample more, or at temperature 1")

    def _pair(self, group: Group, traces: Sequence[Trace], table_KK: np.ndarray) -> Group | None:
        """Best and worst of a prompt's samples, their scores as a column; None if there is nothing to tell apart."""
        scores = policy_scores(table_KK, self.target)
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] == scores[worst] or traces[best].completion_ids == traces[worst].completion_ids:
            return None
        pair, values = (traces[best], traces[worst]), (float(scores[best]), float(scores[worst]))
        old, said = group.example, tuple(t.text for t in pair)
        example = Example(prompt=old.prompt, responses=said, scores=values, row=old.row, source=old.source)
        made = Group(example=example, prompt_ids=group.prompt_ids, traces=pair)
        made.add_column(COLUMN, [Credit.of_sequence(t, v).values for t, v in zip(pair, values, strict=True)])
        return made

    def _report(
        self, run: Preparation, traces: Sequence[Sequence[Trace]], tables: np.ndarray, pairs: Sequence[Group | None]
    ) -> None:
        alike = sum(len({t.completion_ids for t in some}) == 1 for some in traces)
        lost = sum(pair is None for pair in pairs)
        scores = [policy_scores(table, self.target) for table in tables]
        z, reach = [log_partition(s, self.beta) for s in scores], np.abs(scores) / self.beta
        run.report(
            f"gpo: {len(pairs) - lost} pairs from {len(pairs)} prompts x {self.samples} samples; dropped: "
            f"{alike} whose samples are identical, {lost - alike} whose samples score alike"
        )
        run.report(
            f"gpo: mean |s/beta| {reach.mean():.3g} nats, beyond the clamp {(reach > self.clamp).mean():.1%}; the loss "
            f"takes the log-partition as 0, and it is {np.mean(z):.3g} on average (Jensen: not negative), at most "
            f"{max(z):.3g}"
        )

    @classmethod
    def example_columns(cls, rng: np.random.Generator, mask_NT: Tensor) -> dict[str, Tensor]:
        """Random columns of the shape that `prepare` makes, for tests."""
        return {COLUMN: 0.001 * torch.from_numpy(rng.normal(size=tuple(mask_NT.shape))) * mask_NT}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        """Mean over pairs of the mean of their two squares.

        Raises:
            ValueError: there is no column ``policy_score``.
        """
        if COLUMN not in batch.columns:
            raise ValueError(f"GPO needs the column {COLUMN!r}, which is not there; run prepare, or add it")
        logratio_N = implicit_rewards(stats, 1.0)
        score_N = masked_sum(batch.columns[COLUMN].to(logratio_N), stats["policy"].mask_NT)
        losses_N = gpo_loss(logratio_N, score_N, self.beta, self.clamp)
        w, l = batch.chosen, batch.rejected
        result = pair_loss(0.5 * (losses_N[w] + losses_N[l]), self.beta * logratio_N.detach(), stats, batch)
        for side, index in (("chosen", w), ("rejected", l)):
            result.metrics[f"scores/{side}"] = (score_N[index].sum(), float(len(index)))
        return result


def preference_table(scorer: Any, traces: Sequence[Trace]) -> np.ndarray:
    """s(row > column) / tau, float64 (K, K), from a scorer's `pairwise_table`, or the logits of its `prefer`.

    Raises:
        ValueError: it compares nothing; a table of another shape, not finite, or not antisymmetric.
    """
    if hasattr(scorer, "pairwise_table"):
        table = np.asarray(scorer.pairwise_table(traces), np.float64)
        gap = np.abs(table + table.T).max() / (1 + np.abs(table).max())
    elif hasattr(scorer, "prefer"):
        p = np.asarray(scorer.prefer(traces), np.float64)
        gap, p = np.abs(p + p.T - 1).max(), np.clip(p, _SURE, 1 - _SURE)
        table = np.log(p) - np.log1p(-p)
    else:
        raise ValueError(
            f"{type(scorer).__name__} has neither pairwise_table nor prefer; give one that compares, as GPM"
        )
    k = len(traces)
    if getattr(scorer, "compat", "") == "reference" and hasattr(scorer, "pairwise_table"):
        table = table / 2  # the release's tables are twice s / tau
    if table.shape != (k, k) or not np.isfinite(table).all():
        raise ValueError(f"the preference model gave a table of shape {table.shape} for {k} samples, or one not finite")
    if not gap <= _TOLERANCE:
        raise ValueError("P(a beats b) and P(b beats a) do not add up to 1; average both orders: (P + 1 - P.T) / 2")
    return 0.5 * (table - table.T)
