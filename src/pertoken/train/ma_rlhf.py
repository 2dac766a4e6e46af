"""MA-PPO — PPO whose decisions are macro actions: spans of tokens that share one value, one advantage and one return.

MA-RLHF: Chai, Sun, Fang, Wang, Sun, Wu, "MA-RLHF: Reinforcement Learning from Human Feedback with Macro Actions", ICLR
2025, arXiv 2410.02743. A rollout y_1..y_T of the policy is cut into macros omega_1..omega_M (`core.segment`: every n
tokens, random lengths, runs of falling perplexity under the reference, constituents); its last token is one alone.

    r_t   = 1[t=T] clip(R, +-2.5) - kl_coef ( log pi(y_t) - log pi_ref(y_t) )         R: the sum of what scorers give
    V_tau = sum_{i in tau} sigma_i V_i,      r_tau = sum_{i in tau} sigma_i r_i,     sigma = 1/|tau|  (equal)
    A_tau = delta_tau + gamma lam A_{tau+1},   delta_tau = r_tau + gamma V_{tau+1} - V_tau,   R_tau = A_tau + V_tau
    L     = mean_i [ max( -rho_i A_tau, -clip(rho_i, 1 +- 0.2) A_tau )
                     + vf_coef 0.5 max( (V_i - R_tau)^2, (clip(V_i, V_old,i +- 0.2) - R_tau)^2 ) ]      tau of i

Shapes (N, T), nats and rewards. n=1 is `ppo` (with these settings, on R) to the bit; one macro for the response, and
its tail, is REINFORCE with a critic, all but. `ratio="macro"` has the product of rho over the macro in place of rho_i,
each token through its own log-prob; where pi is pi_old both have one gradient.

kl_coef is not comparable across n: the KL penalty is averaged within macros as rewards are, so at n tokens a macro it
weighs about 1/n of what it does at n=1. The log has the KL of whole sequences (``objective/kl``). So is credit that
``reward_level="token"`` leaves where scorers put it; R on the last token, a macro of its own, is not.
gamma < 1 discounts a macro, however long (``discount="macro"``, as the release), or each of its tokens.

Differs from the authors' code: a start that two rules give counts once (there, where the grid falls on the last index,
an empty macro of value 0 enters GAE, so that even n=1 differs from PPO); `unit` works (there it indexes a row with two
indices and fails); the sequence's reward is on the last emitted token (there, with padding on the right, it falls on
the padding and is lost); all rows at once. The critic is a linear map on the policy's states, not a model of its own,
so its loss has a weight (vf_coef). A sentence that its parser and tokens disagree on falls back to every n tokens for
the whole response, counted (``macros/fallback``). The release has no default for parser_cutoff and repeat_times.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..core.advantage import GAE, Advantages, Sigma, macro_gae, on_last
from ..core.experience import Experience, Rollouts
from ..core.parsing import clauses, real_parser
from ..core.protocols import Segmenter
from ..core.rollout import Sampling
from ..core.segment import Fixed, Parsed, Perplexity, Randomized, cut, macro_ids
from ..core.stats import masked_sum
from ._policy_gradient import kl_penalised
from .ppo import PPO


@dataclass(frozen=True, kw_only=True)
class Macros:
    """Options of macro actions."""

    rule: Literal["fixed", "randomized", "ppl", "parsing"] = "fixed"
    """Where a response is cut: every n tokens; lengths 1, 2, 3, 5, 10 in random order; where perplexity under the
    reference rises; at constituents."""
    n: int = 5
    """Tokens of a macro, of fixed ones (1: ordinary PPO) and of those that parsing falls back to."""
    repeat_times: int = 25
    """How often each random length is there (25 x 21 tokens: more than a response of 512 has)."""
    cut_seed: int = 0
    """Of random lengths, whose order depends on it and on the response's ids."""
    ppl_cut: Literal["release", "after"] = "release"
    """A macro starts at the token before the rise, as in the release, or at the one whose perplexity is higher."""
    parser: str = "clauses"
    """clauses (built in), or a real one that is installed: benepar, constituent-treelib, spacy."""
    parser_cutoff: int = 5
    """C_parse: a constituent with fewer tokens is a macro."""
    value_function: Sigma = "equal"
    """sigma, of values and rewards: equal 1/|omega|, unit (the last token's), position (in proportion to 1/i)."""
    discount: Literal["macro", "token"] = "macro"
    """gamma a macro, or gamma^|omega|."""
    segmenter: Any = None
    """From Python: any `protocols.Segmenter`, in place of `rule`; it is given the reference's log-probs."""

    def __post_init__(self) -> None:
        known = {
            "rule": ("fixed", "randomized", "ppl", "parsing"),
            "value_function": ("equal", "unit", "position"),
            "discount": ("macro", "token"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        if self.parser == "clauses":  # a real one is loaded when it is asked; each checks its options
            assert self.cutter
        assert Fixed(n=self.n)

    @cached_property
    def cutter(self) -> Segmenter:
        """What cuts.

        Raises:
            ImportError: the parser that is named is not installed.
        """
        if self.segmenter is not None:
            return self.segmenter
        if self.rule == "parsing":
            parser = clauses if self.parser == "clauses" else real_parser(self.parser)
            return Parsed(parser=parser, cutoff=self.parser_cutoff)
        if self.rule == "randomized":
            return Randomized(repeat_times=self.repeat_times, seed=self.cut_seed)
        return Perplexity(cut=self.ppl_cut) if self.rule == "ppl" else Fixed(n=self.n)


@dataclass(frozen=True, kw_only=True)
class MARLHF(PPO):
    """Options of MA-PPO: those of PPO, with the paper's defaults, and its macro actions."""

    gae: GAE = field(default_factory=lambda: GAE(whitening="none"))
    """Advantages, over macros: gamma 1, lam 0.95 a macro; not whitened."""
    rollouts: Rollouts = field(
        default_factory=lambda: Rollouts(
            generations=1, sampling=Sampling(max_new_tokens=512, temperature=0.8, top_k=50), inner_epochs=1
        )
    )
    """How prompts are answered, and how often answers are learned from."""
    macros: Macros = field(default_factory=Macros)
    """Where responses are cut, and how a macro's tokens are summed up."""
    reward_clip: float | None = 2.5
    """Rewards are held in +- this, before the KL penalty (None: not)."""
    reward_level: Literal["sequence", "token"] = "sequence"
    """What scorers give: its sum, on the last token, or what stands on each token (each clipped, then averaged)."""

    def __post_init__(self) -> None:
        if self.reward_level not in ("sequence", "token"):
            raise ValueError(f"reward_level={self.reward_level!r} is not one of sequence, token")
        if self.reward_clip is not None and not self.reward_clip > 0:
            raise ValueError(f"reward_clip={self.reward_clip} must be above 0 (None: no clipping)")

    def rewards(self, experience: Experience, state: nn.Module | None) -> Tensor:
        """R or credit, clipped, less the KL penalty: (N, T)."""
        mask_NT, given_NT = experience.mask_NT, experience.reward_NT
        if self.reward_level == "sequence":
            given_NT = on_last(masked_sum(given_NT, mask_NT), mask_NT)
        if self.reward_clip is not None:
            given_NT = given_NT.clamp(-self.reward_clip, self.reward_clip)
        return kl_penalised(dataclasses.replace(experience, reward_NT=given_NT), state)

    def advantages(self, experience: Experience, reward_NT: Tensor, state: nn.Module | None) -> Advantages:
        """GAE over macros, whitened as asked, and returns, each token having its macro's."""
        mask_NT, values_NT = experience.mask_NT, experience.value_NT
        assert values_NT is not None
        logps_NT = experience.stats["reference"].logp_NT.double().cpu().numpy()
        logps = [logps_NT[n, : len(trace)] for n, trace in enumerate(experience.traces)]
        starts, failed = cut(experience.traces, self.macros.cutter, logps, Fixed(n=self.macros.n))
        macro_NT = macro_ids(starts, mask_NT)
        how: dict[str, Any] = {"sigma": self.macros.value_function, "per": self.macros.discount}
        found = macro_gae(reward_NT, values_NT, macro_NT, mask_NT, self.gae.gamma, self.gae.lam, **how)
        rows, emitted = float(len(starts)), float(mask_NT.sum())
        experience.figures.update(
            {
                "macros/count": (float(sum(map(len, starts))), rows),
                "macros/length": (emitted, float(sum(map(len, starts)))),
                "macros/fallback": (float(failed), rows),
            }
        )
        whitened_NT = self.gae.whitened(found.advantage_NT, mask_NT)
        columns = {"macros": macro_NT} if self.policy_loss.ratio == "macro" else {}
        return Advantages(whitened_NT, found.return_NT, columns)
