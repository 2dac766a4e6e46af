"""pertoken's scorers in TRL: as reward functions of any of its trainers, and token by token in `GRPOTrainer`.

    reward_funcs=[reward_function(Vader(), tokenizer)]                         # one number a completion
    trainer = token_credit_trainer(Vader(), model=..., reward_funcs=..., ...)  # an advantage a token

TRL's GRPO takes advantages of shape (B, T) from subclasses; the thin subclass here puts them there. A row that cannot
be scored is reported, and is None to TRL, which leaves it out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.advantage import GroupNormalised
from ..core.bytes import byte_view
from ..core.protocols import Scorer, as_scorer
from ..core.rewarding import Rewarder
from ._traces import trace_of

_TRLS = ("trainer_state", "log_extra", "log_metric", "environments")  # what TRL passes beside the row's columns


def reward_function(
    scorer: Scorer | Callable[..., Any], tokenizer: Any, *, name: str = "", on_error: str = "stop"
) -> Callable[..., list[float | None]]:
    """A scorer as one of TRL's reward functions: the sum of its credit.

    Args:
        scorer: any scorer, or a callable from text to a number. The row's other columns are in each trace's `meta`.
        tokenizer: that the policy generates with.
        name: what TRL logs it under.
        on_error: ``stop`` at a row that it fails on, or ``skip``: None for that row, with a warning.
    """
    made = as_scorer(scorer)
    name = name or str(getattr(made, "name", "") or type(made).__name__.lower())
    view, rewarder = byte_view(tokenizer), Rewarder({name: made}, on_error=on_error)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        rows = [{k: v[i] for k, v in columns.items() if k not in _TRLS} for i in range(len(prompts))]
        metas = [{"row": i, **row, "prompt": p} for i, (row, p) in enumerate(zip(rows, prompts, strict=True))]
        asked = [_prompt_ids(tokenizer, p) for p in prompts]
        found = rewarder([trace_of(view, p, c, m) for p, c, m in zip(asked, completion_ids, metas, strict=True)])
        for i, failed, what in found.failures:
            warnings.warn(f"{failed} failed on completion {i}, which is left out: {what}", stacklevel=2)
        return [None if c is None else c.reduce() for c in found.credits]

    reward.__name__ = name
    return reward


def token_credit_trainer(
    scorer: Scorer | Callable[..., Any],
    *,
    advantage: Any = None,
    weight: float = 1.0,
    alone: bool = False,
    **options: Any,
) -> Any:
    """A `trl.GRPOTrainer` whose advantages are one a token: TRL's own, plus those that token credit gives.

    Args:
        scorer: whose credit stays on the tokens where it stands.
        advantage: rewards -> advantages (`core.advantage`); default: GRPO's process supervision.
        weight: of the token advantages.
        alone: without TRL's own advantages (its `reward_funcs` are only logged then).
        options: of `trl.GRPOTrainer`; it must be given a `processing_class` that is a tokenizer.

    Raises:
        ImportError: TRL is not installed. ValueError: no tokenizer; in training, a group that is split over processes.
    """
    try:
        import torch
        from trl import GRPOTrainer
    except ImportError as error:
        raise ImportError("TRL is not installed: pip install 'pertoken[trl]'") from error
    tokenizer = options.get("processing_class")
    if tokenizer is None:
        raise ValueError("give processing_class=TOKENIZER: credit is put on its tokens")
    view, rewarder = byte_view(tokenizer), Rewarder({"credit": as_scorer(scorer)})
    judge = advantage or GroupNormalised(supervision="process")

    class TokenCreditGRPOTrainer(GRPOTrainer):
        """GRPO with an advantage a token."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            generations = self.num_generations if self.model.training else self.num_generations_eval
            if len(inputs) % generations:  # TRL gathers one number a completion from all processes; tokens stay here
                raise ValueError(
                    f"{len(inputs)} completions on a process do not make whole groups of {generations}; make "
                    "per_device_train_batch_size x steps_per_generation a multiple of num_generations (so for eval)"
                )
            out = super()._generate_and_score_completions(inputs)
            mask_NT = out["completion_mask"].bool()
            emitted_NT = mask_NT & out["tool_mask"].bool() if "tool_mask" in out else mask_NT
            traces = []
            for n, example in enumerate(inputs):
                prompt = out["prompt_ids"][n][out["prompt_mask"][n].bool()].tolist()
                kept = mask_NT[n]
                meta = {"row": n, **{k: v for k, v in example.items() if k != "completion"}}
                emitted = emitted_NT[n][kept].tolist()
                traces.append(trace_of(view, prompt, out["completion_ids"][n][kept].tolist(), meta, emitted))
            reward_NT = torch.zeros(mask_NT.shape, device=mask_NT.device)
            for n, credit in enumerate(rewarder(traces).credits):
                assert credit is not None
                reward_NT[n, mask_NT[n]] = torch.from_numpy(np.asarray(credit.values)).to(reward_NT)
            groups_N = torch.arange(len(traces), device=mask_NT.device) // generations
            token_NT = weight * judge.compute(reward_NT, None, groups_N, emitted_NT).advantage_NT
            own_NT = torch.zeros_like(token_NT) if alone else out["advantages"][:, None].expand_as(token_NT)
            out["advantages"] = own_NT + token_NT
            return out

    return TokenCreditGRPOTrainer(**options)


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
