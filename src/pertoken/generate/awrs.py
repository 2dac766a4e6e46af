"""Constrained generation that checks a handful of tokens a step, and weighs what it draws.

AWRS, "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling", Lipkin, LeBrun,
Vigly, Loula, MacIver, Du, Eisner, Cotterell, Mansinghka, O'Donnell, Lew, Vieira, COLM 2025, arXiv 2504.05410.

The target is the model's own distribution over complete texts, given the constraint:

    g(y) ∝ prod_t p(y_t | x, y_<t) f(y),      f(y) = 1 if the bytes of y are in the constraint's language, else 0

which is not what masking each step gives (that is myopic: it weighs no dead ends). Each step of each of N particles
draws a token x and a weight w by rejection, E[w 1(x = v)] = p(v) f(v) (`_rejection`), where f(v) asks whether the text
and v may go on, and for an end of the text whether it is complete. log w + log Z0 is added to the particle's weight
(Z0: what is left of p after pruning); resampling as in `core.particles`. With a proposal q, tokens are drawn and
weighed under q, and log p(x) - log q(x) is added. Temperature, top-k and top-p of `sampling` change p first: the target
is of that p.

`generate` runs one population of particles a prompt and returns n draws from its weighted particles, with replacement:
all draws weigh alike (logw 0). `Drawn.meta` has the whole posterior (shares of different texts), the log of the
marginal (the share of the model's texts that the constraint allows), checks and deaths. If every particle died there is
nothing to draw: empty continuations of logw -inf. Weights may be averaged over runs, the dead ones as 0; log-weights
may not. The constraint reads the continuation's own bytes, from its first: where a prompt of ids ends inside a
character, only a constraint that allows such bytes lets it be finished.

Differs from the authors' code: tokens are drawn from cumulated weights, one by one, not by keys of the whole vocabulary
(the same distribution); particles of one text share what was checked, and a token that begins with a piece that was
refused there is not checked again (checks are monotone); 1 - R is summed anew as it shrinks, so that a particle is not
killed when more than 1 - 1e-5 was rejected; tokens of no bytes (special ones) are never accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..core.credit import Credit
from ..core.decode import Drawn, Guide, LMGuide, Stream, Streamed, generators
from ..core.lm import LM, Prompt, load, same_vocabulary
from ..core.particles import Particles, Population, ancestors_of, smc
from ..core.rollout import Sampling
from ._constrained import ConstrainedSampler
from ._constraints import constraint_of


@dataclass(frozen=True, kw_only=True)
class AWRS:
    """Options of adaptive weighted rejection sampling."""

    constraint: str | Any = None
    """f: ``regex:PATTERN``, ``json:SCHEMA.json``, ``lark:GRAMMAR.lark``, or an object with the functions
    ``prefix(bytes) -> bool`` and ``complete(bytes) -> bool`` (see `_constraints`)."""
    estimator: Literal["auto", "two-round", "recursive", "geometric"] = "auto"
    """Of the weight; auto: geometric if ``max_accepts > 2`` or a token has 2/3 of the mass, else recursive; two-round:
    the paper's."""
    max_accepts: int = 2
    """m of the geometric estimator: more accepts, less variance."""
    max_rejects: int | None = None
    """Budget of rejected tokens a step (None: all); a particle that spends it dies. Not for two-round."""
    proper_weights: bool = True
    """False: the first accepted token at weight 1, locally constrained decoding; the posterior is of no target then,
    and there is no marginal."""
    prune: bool = True
    """Leave out tokens of no bytes before drawing, instead of rejecting them."""
    particles: Particles = field(default_factory=Particles)
    """N, resampling, longest text (a text that is not complete then is dead; `sampling` may make it shorter)."""
    proposal: str | Any = None
    """q: a model of the same tokenizer (or its path), or a guide."""
    critic: Any = None
    """A Python function (texts as bytes, whether each has ended) -> log-scores: a twist of the weights."""
    debug: bool = False
    """Check that a predicate is monotone."""

    def __post_init__(self) -> None:
        if self.estimator not in ("auto", "two-round", "recursive", "geometric"):
            raise ValueError(f"estimator={self.estimator!r} is not one of auto, two-round, recursive, geometric")
        budget = math.inf if self.max_rejects is None else self.max_rejects
        least = 2 if self.proper_weights else 1
        if self.max_accepts < least or budget < least:
            raise ValueError(
                f"max_accepts={self.max_accepts}, max_rejects={self.max_rejects}: an unbiased weight needs 2 or more "
                "of both (proper_weights=False takes 1)"
            )
        if self.estimator == "two-round" and self.max_rejects is not None:
            raise ValueError("the two-round estimator has no budget; leave max_rejects out, or use another estimator")

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
        """n draws a prompt from its weighted particles. `stream` gets the tokens of a draw when it is done.

        Raises:
            ValueError: a constraint that does not compile or accepts nothing; a model without exact bytes.
        """
        if n < 1:
            raise ValueError(f"n={n}: give 1 or more")
        if lm.view.family == "wordpiece":
            raise ValueError("the tokens of this model have no exact bytes (WordPiece), so no constraint can read them")
        constraint, proposal = constraint_of(self.constraint, debug=self.debug), _guide(self.proposal, lm)
        guide, how, out = LMGuide(lm=lm), sampling or Sampling(), []
        target = (
            f"{lm.name or 'the model'} at temperature {how.temperature:g}, top_p {how.top_p:g}, top_k {how.top_k}, "
            f"given {constraint.name[:200]}{', times the critic' if self.critic else ''}"
        )
        if not self.proper_weights:
            target = f"no target, each token was drawn among those that may follow: {target}"
        for place, prompt in enumerate(prompts):
            ids = guide.ids(prompt)
            longest = min(self.particles.max_tokens, lm.context - len(ids) - 1)
            longest = longest if sampling is None else min(longest, sampling.max_new_tokens - 1)
            sampler = ConstrainedSampler(
                constraint=constraint,
                piece=lm.view.piece,
                stops=sorted(lm.stop_ids),
                sampling=how,
                estimator=self.estimator,
                max_accepts=self.max_accepts,
                max_rejects=math.inf if self.max_rejects is None else self.max_rejects,
                proper_weights=self.proper_weights,
                prune=self.prune,
                proposal=proposal,
                prompt=prompt,
            )
            critic = None if self.critic is None else sampler.critic(self.critic)
            particles = replace(self.particles, max_tokens=longest)
            found = smc(guide, prompt, sampler, particles, stops=sampler.stops, seed=seed, place=place, critic=critic)
            within = f"{target}, at most {longest} tokens before the end"
            out.append(self._draws(lm, ids, prompt, place, found, sampler, n, seed, within))
            for k, drawn in enumerate(out[-1] if stream else ()):
                last = len(drawn.trace) - 1
                for t, (token, piece) in enumerate(zip(drawn.trace.completion_ids, drawn.trace.completion_pieces)):
                    stream(Streamed(place, k, token, piece, t == last))  # type: ignore[misc]
        return out

    def _draws(
        self,
        lm: LM,
        ids: tuple[int, ...],
        prompt: Any,
        place: int,
        found: Population,
        sampler: ConstrainedSampler,
        n: int,
        seed: int,
        target: str,
    ) -> list[Drawn]:
        weights, text = found.weights(), sampler.text
        meta = {
            "posterior": [{"text": t.decode("utf8", "replace"), "share": w} for t, w in found.posterior(text).items()],
            "log_marginal": found.log_marginal if weights.any() and self.proper_weights else None,
            "target": target,
            "particles": len(weights),
            "dead": int((weights == 0).sum()),
            "ess": found.ess,
            "resampled": found.resampled,
            **sampler.counts,
        }
        asked = {} if isinstance(prompt, tuple) else {"prompt": prompt}
        how = {"method": "awrs", "model": lm.name, "seed": seed, "target": target, "place": place}
        if not weights.any():
            return [Drawn(lm.trace_of_ids(ids, [], sampling=how, meta=asked), -math.inf, None, meta) for _ in range(n)]
        chosen = ancestors_of(weights, generators(seed, place, len(weights) + 2)[-1].random(n))
        out = []
        for i in chosen.tolist():
            tokens, logps = sampler.history(found.tokens[i])
            trace = lm.trace_of_ids(ids, tokens, ended=True, policy_logps=logps, sampling=how, meta=asked)
            values = np.asarray(found.increments[i])
            out.append(Drawn(trace, 0.0, Credit(trace=trace, values=values, kind="logratio", method="awrs"), meta))
        return out


def _guide(proposal: Any, lm: LM) -> Guide | None:
    """A proposal as a guide."""
    if proposal is None or (isinstance(proposal, Guide) and not isinstance(proposal, LM)):
        return proposal
    other = load(proposal, device=str(lm.device)) if isinstance(proposal, str) else proposal
    if not isinstance(other, LM):
        raise ValueError(f"proposal={proposal!r}: give a model, its path, or a guide")
    same_vocabulary(lm, other)
    return LMGuide(lm=other)
