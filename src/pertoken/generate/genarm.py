"""GenARM — decoding that autoregressive reward models guide, token by token, with weights of each request's own.

Xu, Sehwag, Koppel, Zhu, An, Huang, Ganesh, "GenARM: Reward Guided Generation with Autoregressive Reward Model for
Test-time Alignment", ICLR 2025, arXiv 2410.08193. A frozen base and reward models pi_k (trained by `arm`) of one
tokenizer, whatever their sizes (weak-to-strong); alpha_k = 1 / beta_k. Next tokens are drawn from

    q(v | x, y_<t) = softmax_v( [ log pi_base(v | x, y_<t) + sum_k alpha_k log pi_k(v | x_k, y_<t) ] / T )

so each reward costs one forward a token. Every model has its own prompt x_k (its own template) and KV cache; the
continuation is shared. Log-probs in nats, (N, V) a step, float32 or better; T = 0 takes the likeliest token of the sum.
alpha = 0 leaves a model out (to the bit, and it is not computed), alpha < 0 steers away from its reward. Ids are those
of the base's head; what a reward model's narrower head lacks is never drawn while its alpha is not 0.

q is not the optimum of the KL-regularised problem, pi* ~ pi_base(y|x) prod_t pi_k(y_t|x, y_<t)^alpha: with the local
normalisers Z(y_<t) = sum_v pi_base(v|.) prod_k pi_k(v|.)^alpha_k, q(y) / pi*(y) = Z / prod_t Z(y_<t), Z the mean of
prod_t Z(y_<t) under q. The two are one where no Z depends on the prefix; elsewhere q is short-sighted.

Differs from the authors' code: the formula is applied directly. Theirs divides by 1 + sum alpha, renormalises, and
divides the temperature by it, too: the same q, but for sums of -1 and below, where theirs breaks.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.adapters import merge_lora
from ..core.credit import Credit
from ..core.decode import Drawn, Guide, LMGuide, Stream, decode, weighted
from ..core.head import at_least_float32
from ..core.lm import LM, Prompt, load
from ..core.rollout import Sampling
from ._guides import as_wide, in_template, refuse_unreadable, same_ids


def guided_logps(
    base: Tensor, arms: Sequence[Tensor], alpha: Sequence[float | Tensor], temperature: float = 1.0
) -> Tensor:
    """log q (N, V) from the logits (N, V) of the base and (N, V_k) of each reward model; alpha: numbers, or (N,)."""
    said = [F.log_softmax(at_least_float32(x), -1) for x in (base, *arms)]
    total = weighted([as_wide(x, base.shape[-1]) for x in said], (1.0, *alpha))
    return Sampling(temperature=temperature).logps(total)


@dataclass
class _State:
    """Rows of the base and of the reward models in use (their places), weights (N, K), and what each said last."""

    used: list[int]
    states: list[Any]
    alpha_NK: Tensor
    said: list[Tensor] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardGuide:
    """Base and reward models as one guide; a sequence starts from (prompt, its K weights)."""

    base: Guide
    arms: Sequence[Guide]

    @property
    def vocabulary(self) -> int:
        """Ids of the base's head."""
        return self.base.vocabulary

    def start(self, prompts: Sequence[tuple[Any, Sequence[float]]]) -> _State:
        """States; a reward that no sequence weighs is left out."""
        alpha_NK = torch.tensor([list(alpha) for _, alpha in prompts], dtype=torch.float64)
        used = [k for k in range(len(self.arms)) if bool((alpha_NK[:, k] != 0).any())]
        states = [self.base.start([p for p, _ in prompts])]
        for k in used:  # a row that does not weigh it has a prompt that it need not be able to read
            weighed = next(p for p, alpha in prompts if alpha[k])
            states.append(self.arms[k].start([p if alpha[k] else weighed for p, alpha in prompts]))
        return _State(used, states, alpha_NK)

    def step(self, state: _State, last_ids: Tensor | None) -> Tensor:
        """log pi_base + sum_k alpha_k log pi_k, (N, V), not normalised."""
        guides = [self.base, *(self.arms[k] for k in state.used)]
        state.said = []
        for g, s in zip(guides, state.states, strict=True):
            # an id beyond a reward model's head was drawn in a row that does not weigh it: whatever it reads there
            state.said.append(g.step(s, None if last_ids is None else last_ids.clamp(max=g.vocabulary - 1)))
        state.said[1:] = [as_wide(x, self.vocabulary).to(state.said[0].device) for x in state.said[1:]]
        return weighted(state.said, (1.0, *(state.alpha_NK[:, k] for k in state.used)))

    def reorder(self, state: _State, index: Tensor) -> None:
        """All of them."""
        for g, s in zip((self.base, *(self.arms[k] for k in state.used)), state.states, strict=True):
            g.reorder(s, index)
        state.alpha_NK = state.alpha_NK[index.cpu()]


def _loaded(source: str | Path, base: LM) -> LM:
    """A reward model where the base is; an adapter is added into its weights, as each token is computed with both."""
    lm = load(source, device=str(base.device))
    if not hasattr(lm.model, "merge_and_unload"):
        return lm
    return LM(merge_lora(lm.model), lm.tokenizer, name=lm.name, note=lm.note, template=lm.template)


@dataclass(frozen=True, kw_only=True)
class GenARM:
    """Options of guided decoding."""

    reward_models: str = ""
    """pi_k: folder or Hub id of a reward model, or of several (commas between)."""
    arms: Any = None
    """From Python, in its place: one or several, each an LM or any core.decode.Guide."""
    alpha: tuple[float, ...] = (1.0,)
    """alpha_k = 1 / beta_k, one a reward model, or one number for all of them."""
    per_prompt: Any = None
    """From Python: alpha of each prompt in place of `alpha`, (P,) or (P, K) numbers."""
    templates: tuple[str, ...] = ()
    """What each reward model reads, with {prompt} in it; one for all, or one each ("": as it encodes prompts)."""
    batch: int = 64
    """Sequences computed together."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: give 1 or more")
        if np.ndim(self.alpha) != 1 or not np.isfinite(np.asarray(self.alpha, float)).all():
            raise ValueError(f"alpha={self.alpha} must be finite numbers in a tuple, as (1.0,)")

    def guides(self, lm: LM) -> list[Guide]:
        """The reward models as guides, checked against the base.

        Raises:
            ValueError: none; other ids than the base's; a number of templates that fits nothing.
        """
        named = [name.strip() for name in self.reward_models.split(",") if name.strip()]
        given = named if self.arms is None else list(self.arms) if isinstance(self.arms, list | tuple) else [self.arms]
        if not given:
            raise ValueError(
                "GenARM needs a reward model: give arms=..., an LM that the method arm trained, or its folder"
            )
        if len(self.templates) not in (0, 1, len(given)):
            raise ValueError(f"{len(self.templates)} templates for {len(given)} reward models; give one each, or one")
        templates = self.templates * len(given) if len(self.templates) == 1 else self.templates or ("",) * len(given)
        out: list[Guide] = []
        for arm, template in zip(given, templates, strict=True):
            model = _loaded(arm, lm) if isinstance(arm, str | Path) else arm
            if isinstance(model, LM):
                model = LMGuide(lm=model, prompt=in_template(model, template) if template else None)
            elif template:
                raise ValueError("a guide reads its prompts in its own way; give templates to language models only")
            if isinstance(model, LMGuide):
                same_ids(lm, model.lm)
                if lm.terminator not in model.lm.stop_ids:
                    warnings.warn(
                        f"{model.lm.name or 'a reward model'} does not end responses with the base's terminator "
                        f"({lm.terminator}), so it does not guide where they end; train it on responses that do",
                        stacklevel=3,
                    )
            out.append(model)
        return out

    def weights(self, prompts: int, arms: int) -> list[tuple[float, ...]]:
        """alpha of each prompt, a tuple of K.

        Raises:
            ValueError: numbers that fit neither prompts nor reward models, or that are not finite.
        """
        given = self.alpha if self.per_prompt is None else self.per_prompt
        table = np.asarray(given.cpu() if isinstance(given, Tensor) else given, np.float64)
        if self.per_prompt is None and len(self.alpha) in (1, arms):
            table = np.broadcast_to(table, (prompts, arms))
        elif self.per_prompt is not None and table.shape in ((prompts,), (prompts, 1)):
            table = np.broadcast_to(table.reshape(prompts, 1), (prompts, arms))
        if table.shape != (prompts, arms) or not np.isfinite(table).all():
            raise ValueError(
                f"alpha of shape {table.shape} for {prompts} prompts and {arms} reward models; give finite numbers, "
                "one a reward model in `alpha`, or one a prompt and reward model in `per_prompt`"
            )
        return [tuple(row) for row in table.tolist()]

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
        """n continuations a prompt. Credit: alpha-weighted token rewards in nats; ``meta["parts"]`` has their sums.

        Raises:
            ValueError: as `guides` and `weights`; a prompt and answer beyond a reward model's context.
        """
        sampling, arms, base = sampling or Sampling(), self.guides(lm), LMGuide(lm=lm)
        alpha = self.weights(len(prompts), len(arms))
        for i, prompt in enumerate(prompts):
            room = min(sampling.max_new_tokens, lm.context - len(base.ids(prompt)))
            for arm, a in zip(arms, alpha[i], strict=True):
                if isinstance(arm, LMGuide) and a:
                    refuse_unreadable(arm, prompt, room, f"prompt {i}")
        found: dict[tuple[int, int], list[list[float]]] = {}

        def note(state: _State, ids: Tensor, places: list[tuple[int, int]]) -> None:
            said = [x.gather(1, ids[:, None])[:, 0] for x in state.said[1:]]
            rows = torch.stack(said, 1).double().tolist() if said else [[]] * len(places)
            for place, row in zip(places, rows, strict=True):
                every = dict(zip(state.used, row, strict=True))
                found.setdefault(place, []).append(
                    [every.get(k, 0.0) if a else 0.0 for k, a in enumerate(alpha[place[0]])]
                )

        traces = decode(
            lm,
            RewardGuide(base=base, arms=arms),
            prompts,
            n=n,
            sampling=sampling,
            seed=seed,
            stream=stream,
            base=lambda state: state.said[0],
            batch=self.batch,
            meta={"method": "genarm"},
            requests=list(zip(prompts, alpha, strict=True)),
            each=note,
        )
        names = [f"arm{k}" + (f" {g.lm.name}" if isinstance(g, LMGuide) else "") for k, g in enumerate(arms)]
        out: list[list[Drawn]] = []
        for i, some in enumerate(traces):
            out.append([])
            for j, trace in enumerate(some):
                rewards_TK = np.array(found[i, j]) * np.array(alpha[i])
                parts = dict(zip(names, rewards_TK.sum(0).tolist(), strict=True))
                meta = {"alpha": dict(zip(names, alpha[i], strict=True)), "parts": parts, "tokens": len(trace)}
                credit = Credit(trace=trace, values=rewards_TK.sum(1), method="genarm", version=1, meta=meta)
                out[i].append(Drawn(trace=trace, credit=credit, meta=meta))
        return out
