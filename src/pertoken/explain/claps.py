"""ClaPS — a discrete prompt found without gradients: cluster the vocabulary, keep influential tokens, search them.

Zhou, Wan, Vulić, Korhonen, "Survival of the Most Influential Prompts: Efficient Black-Box Prompt Search via Clustering
and Pruning", Findings of EMNLP 2023, arXiv 2310.12774. Of word-initial tokens, the one nearest to each of K k-means
centroids of the input embedding; of these, on labelled examples D,

    Delta(v) = R(v; D) - R(empty; D)      (or KL( p_v || p_empty ), summed over D)

and those above the q-th percentile stay. A prompt of `length` tokens is then searched among them: greedily, by a
genetic algorithm, or by particle swarms over ids. R is the mean log-likelihood of the label, the gap to the best other
class, or minus the entropy. Ids are the truth: prompts are decoded for display alone.

Differs from the authors' code: log-likelihood is of one softmax (there of two: ``compat``); if no token passes the
strict percentile those that reach it stay (``compat``: none); crossover mixes tokens (there it returns a parent);
every place may mutate; the best of an epoch is recorded before the population is reordered; particles' bests are
copies. The prompt stands behind the text, so that a text is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.credit import Credit
from ..core.lm import LM
from ._prompt_task import Asked, Prompt, Task, calibrated, divergence, rewards

__all__ = ["Asked", "ClaPS", "Found", "Task", "calibrated", "concentration", "divergence", "prune", "rewards"]


def word_starts(lm: LM) -> list[int]:
    """Ids of tokens that begin a word: a leading space and something after it, no special ones."""
    view = lm.view
    return [i for i in range(view.size) if i not in view.special_ids and len(p := view.piece(i)) > 1 and p[:1] == b" "]


def clustered(lm: LM, candidates: Sequence[int], clusters: int, seed: int = 0) -> list[int]:
    """The candidate nearest to each centroid of the input embedding, in order of id; all of them if there are no more
    than `clusters`. Two centroids may have one nearest.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    if clusters >= len(candidates):
        return sorted(candidates)
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import pairwise_distances_argmin
    except ImportError as error:
        raise ImportError("clustering needs scikit-learn: pip install 'pertoken[classifiers]'") from error
    rows = lm.causal.get_input_embeddings().weight.detach().float().cpu().numpy()[list(candidates)]
    found = MiniBatchKMeans(clusters, init="k-means++", random_state=seed, n_init="auto", batch_size=4096).fit(rows)
    nearest = pairwise_distances_argmin(found.cluster_centers_, rows)
    return sorted({int(candidates[i]) for i in nearest})


def prune(delta: np.ndarray, q: float, compat: bool = False) -> np.ndarray:
    """Indices of values above their q-th percentile (linear, strict); where there is none, those that reach it."""
    delta = np.asarray(delta, np.float64)
    line = np.percentile(delta, q)
    kept = np.flatnonzero(delta > line)
    return kept if len(kept) or compat else np.flatnonzero(delta >= line)


def concentration(delta: np.ndarray, share: float = 0.1) -> float:
    """Share of the total |Delta| that the top tokens hold (uniform: `share`; a centred normal: 0.259 for a tenth)."""
    size = np.sort(np.abs(np.asarray(delta, np.float64)))[::-1]
    return float(size[: max(1, round(share * len(size)))].sum() / size.sum()) if size.sum() else math.nan


@dataclass(frozen=True)
class Found:
    """A search's outcome.

    Attributes:
        prompt: ids. text: as it reads. reward: R on the examples. history: best R after each round.
        evaluations: prompts that were evaluated for it (known ones are free).
    """

    prompt: Prompt
    text: str
    reward: float
    history: list[float]
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class ClaPS:
    """Options of ClaPS."""

    clusters: int = 2000
    """K."""
    percentile: float = 90.0
    """q."""
    influence: Literal["reward", "kl"] = "reward"
    """What a token's influence is."""
    reward: Literal["cross_entropy", "gap", "entropy"] = "cross_entropy"
    """R."""
    length: int = 5
    """Tokens of a prompt."""
    search: Literal["greedy", "genetic", "particles"] = "greedy"
    """How prompts are searched."""
    population: int = 128
    """Of the genetic search and the swarm."""
    epochs: int = 30
    """Of both."""
    compat: bool = False
    """The release's rewards and pruning."""
    seed: int = 42
    """Of clusters and searches."""

    def __post_init__(self) -> None:
        if min(self.clusters, self.length, self.epochs) < 1 or self.population < 4 or not 0 <= self.percentile < 100:
            raise ValueError(f"{self}: counts are 1 or more, population 4 or more, percentile in [0, 100)")
        if self.search not in _SEARCHES or self.influence not in ("reward", "kl"):
            raise ValueError(f"search={self.search!r} is not one of {', '.join(_SEARCHES)}, or influence of reward, kl")

    def influences(self, asked: Asked, tokens: Sequence[int]) -> np.ndarray:
        """Delta of each token, (tokens,)."""
        empty = asked.logits([()])
        found = asked.logits([(t,) for t in tokens])
        if self.influence == "kl":
            return divergence(found, empty[0])
        return self._rewards(asked, found) - self._rewards(asked, empty)

    def credit(self, asked: Asked, prompt: Prompt) -> Credit:
        """A prompt as a trace of its own, and Delta of each of its tokens by itself as credit (kind attribution)."""
        values = self.influences(asked, prompt)
        meta = {"influence": self.influence, "reward": self.reward}
        return Credit(
            trace=asked.lm.trace_of_ids((), prompt), values=values, kind="attribution", method="claps", meta=meta
        )

    def find(self, asked: Asked, tokens: Sequence[int], validation: Asked | None = None) -> Found:
        """Search a prompt among tokens.

        Args:
            validation: held-out examples; the genetic search and the swarm choose among the best of their epochs by its
                accuracy (the last of equal ones).

        Raises:
            ValueError: no token.
        """
        if not len(tokens):
            raise ValueError("no token is left to search; lower the percentile")
        before, pool = asked.evaluations, np.array(sorted(tokens))
        score = lambda prompts: self._rewards(asked, asked.logits(prompts))
        best, history = _SEARCHES[self.search](score, pool, self, np.random.default_rng(self.seed))
        chosen = best[-1]
        if validation is not None and self.search != "greedy":
            right = validation.accuracy(best)
            chosen = best[int(np.flatnonzero(right == right.max())[-1])]
        text = b"".join(asked.lm.view.piece(i) for i in chosen).decode("utf8", "replace")
        return Found(chosen, text, float(score([chosen])[0]), history, asked.evaluations - before)

    def run(self, lm: LM, task: Task, validation: Task | None = None) -> tuple[Found, dict[str, Any]]:
        """All of it: the prompt, and a report on the influences and on what the prompt does to the examples."""
        asked = Asked(lm, task)
        tokens = clustered(lm, word_starts(lm), self.clusters, self.seed)
        delta = self.influences(asked, tokens)
        kept = [tokens[i] for i in prune(delta, self.percentile, self.compat)]
        spent = asked.evaluations
        held = Asked(lm, validation) if validation is not None else None
        found = self.find(asked, kept, held)
        (top,), (entropy,) = asked.certainty([found.prompt])
        order = np.argsort(-delta, kind="stable")[:20]
        report = {
            "tokens": len(tokens),
            "kept": len(kept),
            "influence_evaluations": spent,
            "top_tenth_share": concentration(delta),
            "accuracy": float(asked.accuracy([found.prompt])[0]),
            "mean_top_probability": float(top),
            "entropy": float(entropy),
            "most_influential": [(lm.view.piece(tokens[i]).decode("utf8", "replace"), float(delta[i])) for i in order],
        }
        return found, report

    def _rewards(self, asked: Asked, logits: np.ndarray) -> np.ndarray:
        return rewards(logits, asked.labels, self.reward, self.compat)


Score = Callable[[Sequence[Prompt]], np.ndarray]
_Search = Callable[[Score, np.ndarray, ClaPS, np.random.Generator], tuple[list[Prompt], list[float]]]


def greedy(score: Score, pool: np.ndarray, how: ClaPS, rng: np.random.Generator) -> tuple[list[Prompt], list[float]]:
    """Token by token, the best continuation (the first of equal ones)."""
    prompt: Prompt = ()
    best, history = [], []
    for _ in range(how.length):
        tried = [(*prompt, int(v)) for v in pool]
        values = score(tried)
        prompt = tried[int(np.argmax(values))]
        best.append(prompt)
        history.append(float(values.max()))
    return best, history


def genetic(score: Score, pool: np.ndarray, how: ClaPS, rng: np.random.Generator) -> tuple[list[Prompt], list[float]]:
    """Elite of a tenth; half the population mutants (each place with probability 0.1), half uniform crossovers."""
    people = rng.choice(pool, (how.population, how.length))
    best, history, half = [], [], how.population // 2
    for _ in range(how.epochs):
        values = score([tuple(map(int, p)) for p in people])
        order = np.argsort(-values, kind="stable")
        best.append(tuple(map(int, people[order[0]])))
        history.append(float(values[order[0]]))
        elite = people[order[: max(1, int(0.1 * len(people)))]]
        parents = elite[rng.integers(len(elite), size=(3, half))]
        mutants = np.where(rng.random((half, how.length)) < 0.1, rng.choice(pool, (half, how.length)), parents[0])
        crossed = np.where(rng.random((half, how.length)) < 0.5, parents[1], parents[2])
        people = np.concatenate([elite, mutants, crossed])
    return best, history


def particles(score: Score, pool: np.ndarray, how: ClaPS, rng: np.random.Generator) -> tuple[list[Prompt], list[float]]:
    """Discrete swarm: velocities pull places towards a particle's own and the swarm's best."""
    here = rng.choice(pool, (how.population, how.length))
    speed = rng.uniform(-3, 3, here.shape)
    own, own_value = here.copy(), np.full(len(here), -np.inf)
    best, history = [], []
    for epoch in range(how.epochs):
        values = score([tuple(map(int, p)) for p in here])
        better = values > own_value
        own[better], own_value[better] = here[better], values[better]
        top = int(np.argmax(own_value))
        best.append(tuple(map(int, own[top])))
        history.append(float(own_value[top]))
        part = epoch / max(1, how.epochs - 1)
        inertia, towards_own, towards_top = 0.8 - 0.6 * part, 0.8 - 0.6 * part, 0.2 + 0.6 * part
        pull = np.where(here == own, -3.0, 3.0) + np.where(here == own[top], -3.0, 3.0)
        speed = inertia * speed + (1 - inertia) * pull
        turn = rng.random(here.shape) < 1 / (1 + np.exp(-speed))
        for goal, probability in ((own, towards_own), (own[top][None], towards_top)):
            moves = (rng.random(len(here)) < probability)[:, None] & turn
            here = np.where(moves, goal, here)
        places, hit = rng.integers(how.length, size=len(here)), rng.random(len(here)) < 0.1
        here[np.flatnonzero(hit), places[hit]] = rng.choice(pool, int(hit.sum()))
    return best, history


_SEARCHES: dict[str, _Search] = {"greedy": greedy, "genetic": genetic, "particles": particles}
