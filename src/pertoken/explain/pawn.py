"""PAWN — is a text machine-written? A small head learns which tokens' statistics to trust.

Miralles-González, Huertas-Tato, Martín, Camacho, "Not all tokens are created equal: Perplexity Attention Weighted
Networks for AI generated text detection", 2025, arXiv 2501.03940. A frozen LM gives, where it scores token t_{i+1},
five metrics (entropy, max log-prob, log-prob, share of the vocabulary at least as likely, its mass) and states h:

    M_i = MLP_m(metrics_i) in R^F,   u_i = MLP_g([h_i; h_{i+1}; i/512]) in R^G,   a = softmax of u over the text
    z_f = sum_i a_{i, f mod G} M_{i,f},   logit = MLP_o(z)
    L = -mean[ w_pos y' log sigma(x) + (1 - y') log(1 - sigma(x)) ],   y' = y (1 - e) + e/2, y = 1: machine

Content reaches z as weights alone. Ablations: ``branch="metrics"`` (plain mean of M), ``"hidden"`` (a network of double
depth on the states, mean). In training a token's gate is dropped with probability 0.15, never all of a text. As
credit: the weights, mean over gates (kind weight); ``meta`` has logit and probability.

Zero-shot baselines on the same signals: `baselines`, `binoculars`.

Differs from the authors' code, which could not be read: the layers follow a public description (residual blocks, layer
norm without bias); their number of parameters is the paper's. i is counted from 0; dropout is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.credit import Credit
from ..core.lm import LM
from ..core.trace import Trace
from ._detection import METRICS, Signals, as_traces, baselines, binoculars, signals_of
from ._pawn_head import MLP, PAWNHead, Training, fit_pawn, judge, load_head, padded, pawn_loss, save_head

__all__ = [
    "METRICS",
    "MLP",
    "PAWN",
    "PAWNHead",
    "Signals",
    "Training",
    "as_traces",
    "baselines",
    "binoculars",
    "fit_pawn",
]
__all__ += ["judge", "load_head", "padded", "pawn_loss", "save_head", "signals_of"]


@dataclass(frozen=True, kw_only=True)
class PAWN:
    """Detector of machine-written completions."""

    folder: str = ""
    """A trained head (`save_head`)."""
    head: Any = None
    """From Python, in its place: a `PAWNHead`."""
    longest: int = 512
    """Tokens of a text that are looked at."""

    def explain(self, lm: LM, traces: Sequence[Trace]) -> list[list[Credit]]:
        """The weights of each completion's tokens; ``meta``: logit, probability (None, with a reason, for a text
        without a scored token), ``short`` below 20 tokens, ``cut`` where tokens beyond `longest` got no weight.

        Raises:
            ValueError: no head.
        """
        if self.head is None and not self.folder:
            raise ValueError("pawn has no head: train one (fit_pawn), save it, and name it: folder=FOLDER")
        head = self.head if self.head is not None else load_head(self.folder, lm)
        logits, weights = judge(head, signals_of(lm, traces, self.longest))
        out = []
        for trace, logit, w in zip(traces, logits, weights, strict=True):
            values = np.zeros(len(trace))
            values[: len(w)] = w
            known = not math.isnan(logit)
            meta: dict[str, Any] = {"logit": float(logit) if known else None, "short": len(w) < 20}
            meta["probability"] = 1 / (1 + math.exp(-logit)) if known else None
            meta |= {} if known else {"reason": "no token to score"}
            meta |= {"cut": len(trace) - len(w)} if len(w) < len(trace) else {}
            out.append([Credit(trace=trace, values=values, kind="weight", method="pawn", meta=meta)])
        return out
