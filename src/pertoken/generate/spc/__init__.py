"""Semantic Probabilistic Control: each next token weighed by the chance that the finished sentence has an attribute.

SPC / SConE, Ahmed, Belem, Smyth, Singh, 2025, arXiv:2505.01954. For the likeliest k tokens v of a prefix

    q(v) ∝ p(v | y_<t) P^_a(v),    P^_a(v) = mean over s of  phi_a(emb(s)) + <grad phi_a(emb(s)), e_bar(s) - emb(s)>

s = (y_<t, v, s_{t+1..T}): look-ahead samples of the LM, refined by Gibbs sweeps of a masked LM if there is one;
e_bar_i = sum_v p~_i(v) emb(v) under the local distribution p~_s(y) = prod_i p~_i(y_i), in which every other position is
held at the sample; phi_a: a differentiable verifier's probability of the attribute from the embeddings of the tokens.
P^ is clipped to [floor, 1]. Exact under p~ where phi is linear in the embeddings; nothing more is claimed (a masked
LM's conditionals need not belong to any joint distribution).

Shapes: k candidates, S samples, T tokens (T = t: no look-ahead, P^ = phi). Probabilities; the credit is log q(v) -
log p_k(v), what the reweighting did to the drawn token among the candidates.

Differs from the authors' code: none was found. Theirs are the stages; ours are the number of sweeps, the end of a
sentence (a special token ends the look-ahead; p~ holds words only), and the variants `left` and `pseudo` of p~.
A verifier that steers is not the judge of what it steered: report another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...core.decode import Drawn, Stream, decode
from ...core.lm import LM, Prompt
from ...core.rollout import Sampling
from .._verifier import Differentiable, Verifier, VerifierOptions, check_vocabulary, train_verifier
from .estimate import Local, Space
from .guide import SPCGuide
from .masked import MaskedLM

__all__ = ["SPC", "Differentiable", "Local", "MaskedLM", "SPCGuide", "Verifier", "VerifierOptions", "train_verifier"]


@dataclass(frozen=True, kw_only=True)
class SPC:
    """Options of SPC."""

    verifier: str | Any = None
    """phi_a: a `Verifier`, the file of one, or anything that keeps to `Differentiable`."""
    candidates: int = 10
    """k: the likeliest tokens, which are weighed; the others get probability 0."""
    lookahead: int = 20
    """T - t, tokens after the candidate (0: the verifier on the prefix alone); cut at the longest answer."""
    length: int | None = None
    """T in tokens of the answer, for a verifier that needs one length; None: t + lookahead."""
    samples: int = 2
    """Look-ahead samples (chains) of each candidate."""
    local: Local = field(default_factory=Local)
    """The local distribution p~, the masked LM and its Gibbs sweeps."""
    space: Space = "probability"
    """What is expanded: the verifier's probability, or its log-odds, put through the sigmoid afterwards."""
    floor: float = 1e-4
    """eps: the least P^."""
    suppress: bool = False
    """Steer away from the attribute, 1 - phi."""
    over: Literal["all", "completion"] = "all"
    """What the verifier reads: prompt and answer (special tokens left out), or the answer."""

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.samples < 1 or not 0 <= self.floor < 1:
            raise ValueError(f"{self}: candidates >= 1, samples >= 1 and 0 <= floor < 1 are needed")
        if self.lookahead < 0 or (self.length is not None and self.length < 1):
            raise ValueError(
                f"lookahead={self.lookahead}, length={self.length}: T must not lie before t; give a lookahead >= 0"
            )
        if self.space not in ("probability", "logit") or self.over not in ("all", "completion"):
            raise ValueError(f"space={self.space!r}, over={self.over!r}: probability or logit, all or completion")

    def guide(self, lm: LM, *, longest: int | None = None, least: int = 0) -> SPCGuide:
        """The step alone, for other loops: log q as a guide's log-weights.

        Args:
            longest: tokens of the longest answer, beyond which nothing is looked at. least: of the shortest.

        Raises:
            ValueError: no verifier; another vocabulary (of the verifier, or of the masked LM without `retokenize`); a
                `length` shorter than the longest answer.
        """
        if self.verifier is None:
            raise ValueError("SPC needs a verifier: train one with train_verifier, or give the file of a saved one")
        if self.length is not None and longest is not None and self.length < longest:
            raise ValueError(f"length={self.length} (T) lies before t={longest}; raise it or draw fewer tokens")
        phi = Verifier.load(self.verifier, lm) if isinstance(self.verifier, str | Path) else self.verifier
        check_vocabulary(phi.fingerprint, lm)
        masked = self.local.masked
        masked = MaskedLM.load(masked, lm.device) if isinstance(masked, str | Path) else masked
        if masked is not None and not self.local.retokenize and not masked.shares(lm):
            raise ValueError(
                "the masked LM has another tokenizer than the LM; give one that shares it, or say retokenize=True"
            )
        return SPCGuide(self, lm, phi, masked, longest, least)

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
        """n draws a prompt. `sampling` is applied to q (temperature 0: its argmax); the look-ahead is plain sampling.

        ``meta``: `probability` (P^ of each token), `estimates` and `clipped` (values of P^, and those outside
        [floor, 1]), `at_floor` (steps at which no candidate was above it), `lm_tokens` (forward, look-ahead included).

        Warns:
            RuntimeWarning: steps at which all candidates were at the floor, so that nothing was reweighed.
        """
        sampling = sampling or Sampling()
        guide = self.guide(lm, longest=sampling.max_new_tokens, least=sampling.min_new_tokens)
        traces = decode(
            lm,
            guide,
            prompts,
            n=n,
            sampling=sampling,
            seed=seed,
            stream=stream,
            base=lambda state: state.said,
            meta={"method": "spc"},
        )
        out = [[guide.told[i, k].drawn(trace) for k, trace in enumerate(row)] for i, row in enumerate(traces)]
        idle = sum(d.meta["at_floor"] for row in out for d in row)
        if idle:
            warnings.warn(
                f"at {idle} steps all candidates were at the floor ({self.floor}), so nothing was reweighed; "
                "look at the verifier, or take space='logit'",
                RuntimeWarning,
                stacklevel=2,
            )
        return out
