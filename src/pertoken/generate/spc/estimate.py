"""The arithmetic of SPC on plain tensors (expected embeddings, the verifier's first-order expansion, reweighting), and
what the LM itself gives it: look-ahead samples, distributions from the left, pseudo-likelihood.

Shapes: N sentences (one a candidate and sample), T tokens, V ids, D width of embeddings, K candidates, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.decode import LMGuide
from ...core.lm import LM
from ...core.packing import pack
from ...core.rollout import inverse_cdf
from ...core.stats import Needs, token_stats

Kind = Literal["auto", "mlm", "pseudo", "left"]
Space = Literal["probability", "logit"]
LogOdds = Callable[[Tensor, Tensor], Tensor]


def words_only(logp_NV: Tensor, words_V: Tensor) -> Tensor:
    """Probabilities (N, V) of the ids that are words, renormalised: a position of a sentence holds no special token."""
    return logp_NV.masked_fill(~words_V, -torch.inf).softmax(-1)


def expected_embeddings(p_NV: Tensor, table_VD: Tensor) -> Tensor:
    """e_bar = sum_v p~(v) emb(v), (N, D), of one position each."""
    return p_NV.to(table_VD.dtype) @ table_VD


def first_order(
    log_odds: LogOdds, embeds_NTD: Tensor, expected_NTD: Tensor, mask_NT: Tensor, *, space: Space, suppress: bool
) -> Tensor:
    """phi(emb(s)) + <grad phi, e_bar - emb(s)>, (N,), not clipped.

    Args:
        log_odds: the verifier, (N, T, D), (N, T) -> (N,); it treats each row by itself.
        embeds_NTD, expected_NTD: emb(s) and e_bar, equal where a position is fixed.
        space: ``probability`` expands phi itself (values may leave [0, 1]); ``logit`` expands its log-odds and puts the
            result through the sigmoid (a saturated sigmoid has no gradient).
        suppress: of 1 - phi.
    """
    with torch.enable_grad():
        at = embeds_NTD.detach().requires_grad_()
        value = log_odds(at, mask_NT)
        value = -value if suppress else value
        value = value.sigmoid() if space == "probability" else value
        found = torch.autograd.grad(value.sum(), at, allow_unused=True)[0] if value.requires_grad else None
    value, slope = value.detach(), 0.0
    if found is not None:
        slope = torch.where(mask_NT[..., None], found * (expected_NTD - embeds_NTD), 0.0).sum((-2, -1))
    return value + slope if space == "probability" else (value + slope).sigmoid()


def chances(raw_NKS: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """P^ of each candidate, (N, K): the mean over the samples, then clipped to [floor, 1]; and where it was outside."""
    mean = raw_NKS.mean(-1)
    return mean.clamp(floor, 1.0), (mean < floor) | (mean > 1.0)


def reweigh(logp_NK: Tensor, chance_NK: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """log q(v) of q ∝ p P^ over the candidates, (N, K), and the rows (N,) where no candidate is above the floor, which
    stay p."""
    idle = (chance_NK <= floor).all(-1)
    chance = torch.where(idle[:, None], 1.0, chance_NK)
    return (logp_NK + chance.to(logp_NK.dtype).log()).log_softmax(-1), idle


@dataclass(frozen=True, kw_only=True)
class Local:
    """The local distribution p~ of a look-ahead sample, and the masked LM."""

    kind: Kind = "auto"
    """``mlm`` (the paper's): a masked LM's conditionals; ``pseudo``: the LM's own, by scoring alternatives in place;
    ``left``: the LM's next-token distributions, no extra forward. ``auto``: mlm if a masked LM is given, else left."""
    alternatives: int = 8
    """m, likeliest tokens of each position that ``pseudo`` scores."""
    masked: str | Any = None
    """A `MaskedLM`, or a folder or Hub id of one, that shares the LM's tokenizer."""
    retokenize: bool = False
    """Let the masked LM have another tokenizer: each sentence is cut anew as text, the boundary of the candidate and
    the verifier's embeddings (means over the pieces' own tokens) are approximate then."""
    sweeps: int = 1
    """Gibbs sweeps over the look-ahead, if there is a masked LM."""
    parallel: bool = False
    """All positions of a sweep at once, from stale neighbours, in place of left to right."""

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "mlm", "pseudo", "left"):
            raise ValueError(f"kind={self.kind!r} is not one of auto, mlm, pseudo, left")
        if self.alternatives < 1 or self.sweeps < 0:
            raise ValueError(f"alternatives={self.alternatives} must be 1 or more, sweeps={self.sweeps} 0 or more")
        if self.kind == "mlm" and self.masked is None:
            raise ValueError("kind='mlm' needs a masked LM: give masked=..., or take kind='left' or 'pseudo'")
        if self.retokenize and self.used != "mlm":
            raise ValueError("retokenize=True is for kind='mlm' with a masked LM of another tokenizer; leave it out")

    @property
    def used(self) -> str:
        """What ``auto`` is."""
        return self.kind if self.kind != "auto" else "left" if self.masked is None else "mlm"


@dataclass
class Ahead:
    """Look-ahead of M rows: ids (M, L) and where they are words of the sentence (a special token ends it); e_bar
    (M, L, D), or None; the likeliest ids (M, L, m) and their log-probs, or None."""

    ids: Tensor
    words: Tensor
    expected: Tensor | None = None
    likely: tuple[Tensor, Tensor] | None = None


def look_ahead(
    base: LMGuide,
    state: Any,
    first_M: Tensor,
    uniform_ML: Tensor,
    words_V: Tensor,
    *,
    table: Tensor | None = None,
    likeliest: int = 0,
    forced: Tensor | None = None,
) -> Ahead:
    """Continue M rows after `first_M` by L tokens of the LM (temperature 1, nothing cut off).

    Args:
        uniform_ML: in [0, 1), what decides each draw. words_V: the ids that do not end a sentence.
        table: (V, D), to record e_bar of the distributions drawn from. likeliest: to record so many alternatives.
        forced: (M, L) ids in place of draws.
    """
    alive, last = words_V[first_M], first_M
    ids, words, expected, likely = [], [], [], []
    for j in range(uniform_ML.shape[1]):
        logp = base.step(state, last)[:, : len(words_V)]
        last = inverse_cdf(logp, uniform_ML[:, j]) if forced is None else forced[:, j]
        alive = alive & words_V[last]
        ids.append(last)
        words.append(alive)
        if table is not None:
            expected.append(expected_embeddings(words_only(logp, words_V), table))
        if likeliest:
            found = logp.masked_fill(~words_V, -torch.inf).topk(min(likeliest, int(words_V.sum())), -1)
            likely.append((found.indices, found.values))
    if not ids:
        return Ahead(first_M.new_zeros(len(first_M), 0), words_V.new_zeros(len(first_M), 0))
    return Ahead(
        torch.stack(ids, 1),
        torch.stack(words, 1),
        torch.stack(expected, 1) if expected else None,
        (torch.stack([a for a, _ in likely], 1), torch.stack([b for _, b in likely], 1)) if likely else None,
    )


def pseudo_embeddings(lm: LM, heads: Sequence[tuple[int, ...]], ahead: Ahead, table: Tensor) -> tuple[Tensor, Tensor]:
    """e_bar (M, L, D) of p~_i(v) ∝ p_LM(s with position i set to v) over the likeliest tokens, and how many tokens were
    scored for each row (M,).

    Args:
        heads: what comes before the look-ahead of each row: prompt, answer so far, candidate.
    """
    assert ahead.likely is not None
    alternatives, logps = ahead.likely
    scores, groups, where = logps.clone(), [], []
    spent = torch.zeros(len(heads), dtype=torch.long)
    for m, (ids, words) in enumerate(zip(ahead.ids.tolist(), ahead.words.tolist(), strict=True)):
        tail = ids[: min(sum(words) + 1, len(ids))]  # the special token that ended it, if any, is scored too
        for j in range(min(sum(words), len(tail) - 1)):
            traces = [lm.trace_of_ids((*heads[m], *tail[:j]), (v, *tail[j + 1 :])) for v in alternatives[m, j].tolist()]
            groups.append(traces)
            where.append((m, j))
            spent[m] += sum(map(len, traces))
    for packed in pack(groups) if groups else ():
        with torch.no_grad():
            stats = token_stats({"policy": lm}, packed, Needs({"policy": frozenset({"logp"})}))["policy"]
        total = torch.where(packed.mask_NT, stats.logp_NT, 0.0).sum(1)
        for row, (g, k) in enumerate(packed.order):
            scores[(*where[g], k)] = total[row]
    weights = scores.softmax(-1).to(table.dtype)
    return (weights[..., None] * table[alternatives]).sum(-2), spent
