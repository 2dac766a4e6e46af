"""LM cascades: a small model answers, and a large one is called where the small one's tokens were uncertain.

LM cascades (Language Model Cascades: Token-level uncertainty and beyond; Gupta, Narasimhan, Jitkrittum, Rawat, Menon,
Kumar; ICLR 2024, arXiv 2404.10136). The small model M1 answers y_1..y_n, with log-probs l_i = log p(y_i | y_<i, x) at
temperature 1. A rule gives a score s(x), higher is less certain, and the large model M2 is called iff s(x) > tau:

    Chow-Sum          s = - sum_i l_i             defers what is long
    Chow-Average      s = - 1/n sum_i l_i         one bad token is diluted in a long answer
    Chow-Quantile(a)  s = - quantile_a({l_i})     a = 0: the least likely token; straight lines between tokens
    post hoc          s = g(phi(x))               g learns whether M2 is better

phi: quantiles on a grid, Chow-Sum, Chow-Average, whether the answer was truncated (Post-Hoc-Quantile); with the mean
of M1's last hidden states (Embed-1), and what M2's first layers make of the prompt (Embed-1+2). g learns, by
cross-entropy, the gain d = q2 - q1 in quality, scaled to [0, 1] (`Learning`, `LearnedRule`). A list of entropies,
greatest probabilities or margins may stand in place of the log-probs. n counts the terminator; without it (`eos=False`)
an empty answer has s = +inf. `observe` gives what rules see, `standings` compares rules by their deferral curves.

Differs from the authors' code: none was published. The grid, g (logistic regression and an MLP of 2 x 32), the
feature for truncated answers, the scaling of d and the reading of Embed-1+2 for decoders (the state that enters a layer
of M2 at the prompt's last token) are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.decode import Drawn, LMGuide, Stream, Streamed, decode, generators
from ...core.lm import LM, Prompt, load, same_vocabulary
from ...core.rollout import Sampling
from ...core.trace import Trace
from .curves import Standing, area, deferral_curve, standings, threshold_for, usable
from .learning import Learning, targets
from .rules import (
    GRID,
    Answer,
    FixedRule,
    LearnedRule,
    Rule,
    Signal,
    chow_average,
    chow_quantile,
    chow_sum,
    features,
    observe,
)

__all__ = [
    "GRID",
    "Answer",
    "FixedRule",
    "LMCascade",
    "LearnedRule",
    "Learning",
    "Rule",
    "Standing",
    "area",
    "chow_average",
    "chow_quantile",
    "chow_sum",
    "deferral_curve",
    "features",
    "observe",
    "standings",
    "targets",
    "threshold_for",
    "usable",
]


@dataclass(frozen=True, kw_only=True)
class LMCascade:
    """Decoder of two models: the one that is asked is M1."""

    large: str | Any = None
    """M2: a model, a folder, or a Hub id. Its tokenizer may be another one."""
    rule: str | Any = "quantile"
    """s: sum, average, quantile, or a learned rule (or the file it was saved in)."""
    signal: Signal = "logp"
    """What the fixed rules look at."""
    alpha: float = 0.0
    """a of Chow-Quantile."""
    threshold: float = math.log(2)
    """tau (default, ours: some token was less likely than 1/2); `calibrated` sets it for a budget."""
    eos: bool = True
    """Whether the terminator is one of the n tokens."""
    peek: str | Any = None
    """A learned rule that looks into M2 (or its file): it decides, in place of `rule`, where `rule` lets it look."""
    peek_above: float = -math.inf
    """Where M2's first layers have a look: s of `rule` above this; elsewhere M1 has answered."""

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or math.isnan(self.peek_above):
            raise ValueError(f"threshold={self.threshold}, peek_above={self.peek_above}: give numbers")
        if isinstance(self.rule, str) and self.rule in ("sum", "average", "quantile"):
            FixedRule(self.rule, self.signal, self.alpha)  # refuses what is out of range

    def rules(self) -> tuple[Rule, Rule | None]:
        """The rule of M1's answer, and the one that looks into M2, ready to score.

        Raises:
            ValueError: no such rule, or no such file.
        """

        def ready(rule: Any) -> Rule:
            if isinstance(rule, str) and rule in ("sum", "average", "quantile"):
                return FixedRule(rule, self.signal, self.alpha)
            return rule if isinstance(rule, FixedRule | LearnedRule) else LearnedRule.load(rule)

        return ready(self.rule), None if self.peek is None else ready(self.peek)

    def second(self) -> LM:
        """M2, loaded if it was named.

        Raises:
            ValueError: it was not given.
        """
        if self.large is None:
            raise ValueError("a cascade defers to a large model; give large (a model, a folder, or a Hub id)")
        return self.large if isinstance(self.large, LM) else load(str(self.large))

    def scores(self, lm: LM, traces: Sequence[Trace], prompts: Sequence[Any], large: LM | None = None) -> np.ndarray:
        """s (N,) of M1's answers; -inf where the first rule does not let M2 look."""
        first, second = self.rules()
        common = {"eos": self.eos, "large": large}
        score = first.score(observe(lm, traces, [first], prompts=prompts, **common))
        if second is None:
            return score
        rows = np.flatnonzero(score > self.peek_above)
        seen = observe(lm, [traces[i] for i in rows], [second], prompts=[prompts[i] for i in rows], **common)
        out = np.full(len(score), -math.inf)
        out[rows] = second.score(seen)
        return out

    def calibrated(
        self, lm: LM, prompts: Sequence[Prompt], budget: float, *, sampling: Sampling | None = None, seed: int = 0
    ) -> LMCascade:
        """The same cascade with the threshold at which it defers a share `budget` of these prompts, which should be
        like those that come later, and not those that a rule learned from."""
        asked = self.second() if any(r is not None and r.inputs for r in self.rules()) else None
        traces = [t for (t,) in _drawn(lm, prompts, 1, sampling, seed)]
        return dataclasses.replace(self, threshold=threshold_for(self.scores(lm, traces, prompts, asked), budget))

    def generate(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[list[Drawn]]:
        """Answer with `lm`, and with `large` where the rule says so (each sample for itself; greedy by default).

        Returns:
            n draws a prompt. ``trace`` is of the model that answered, its ``policy_logps`` are its own; ``meta`` says
            ``answered_by`` (small or large), ``score`` (None: infinite), ``deferred_for`` (score, or empty), and what
            the small model had said (``small_answer``). Tokens are streamed when it is known who answers.

        Raises:
            ValueError: no large model; a prompt of ids that the large model does not read alike.
        """
        large = self.second()
        if any(isinstance(p, tuple) for p in prompts):
            same_vocabulary(lm, large)
        small = [t for row in _drawn(lm, prompts, n, sampling, seed) for t in row]
        places = [(i, k) for i in range(len(prompts)) for k in range(n)]
        score = self.scores(lm, small, [prompts[i] for i, _ in places], large)
        deferred = [row for row in range(len(places)) if score[row] > self.threshold]
        if stream:
            for row in sorted(set(range(len(places))) - set(deferred)):
                for t, token in enumerate(small[row].completion_ids):
                    piece, last = small[row].completion_pieces[t], t == len(small[row]) - 1
                    stream(Streamed(*places[row], token, piece, last))

        def relayed(s: Streamed) -> None:
            i, k = places[deferred[s.prompt]]
            if stream:
                stream(dataclasses.replace(s, prompt=i, sample=k))

        # every deferred sample is a prompt of its own, and draws what it would draw if all were deferred
        chance = [[generators(seed, places[row][0], n)[places[row][1]]] for row in deferred]
        asked = [prompts[places[row][0]] for row in deferred]
        again = _drawn(large, asked, 1, sampling, seed, relayed if stream else None, chance) if deferred else []
        by_row = {row: t for row, (t,) in zip(deferred, again, strict=True)}
        out: list[list[Drawn]] = [[] for _ in prompts]
        for row, (i, k) in enumerate(places):
            trace = by_row.get(row, small[row])
            trace = dataclasses.replace(trace, sampling=trace.sampling | {"place": [i, k]})
            s = float(score[row])
            meta: dict[str, Any] = {"answered_by": "large" if row in by_row else "small"}
            meta |= {"score": s if math.isfinite(s) else None, "threshold": _finite(self.threshold)}
            if row in by_row:
                meta |= {"deferred_for": "empty" if s == math.inf else "score", "small_answer": small[row].text}
            out[i].append(Drawn(trace, meta=meta))
        return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drawn(
    lm: LM,
    prompts: Sequence[Any],
    n: int,
    sampling: Sampling | None,
    seed: int,
    stream: Stream | None = None,
    draws: Sequence[Sequence[np.random.Generator]] | None = None,
) -> list[list[Trace]]:
    greedy = sampling or Sampling(temperature=0.0)
    return decode(lm, LMGuide(lm=lm), prompts, n=n, sampling=greedy, seed=seed, stream=stream, draws=draws)
