"""pertoken's scorers in verl: a reward manager that fills the token tensor, where verl's own fill the last token only.

Register it under a name in a file that verl loads:

    from verl.workers.reward_manager import register
    from pertoken.adapters.verl import TokenRewardManager

    @register("pertoken")
    class Manager(TokenRewardManager):
        scorer = Vader()

What verl calls `data` is read by shape alone (``batch`` with prompts, responses, attention_mask, response_mask;
``non_tensor_batch``), so that nothing of verl is imported here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..core.bytes import byte_view
from ..core.protocols import as_scorer
from ..core.rewarding import Rewarder
from ._traces import trace_of


class TokenRewardManager:
    """A reward manager of verl.

    Args:
        tokenizer: of the policy. num_examine: completions to print of each batch.
        compute_score: as verl passes it; taken as the scorer if it is one and none is given.
        reward_fn_key: the column that names a row's data source.
        scorer: any scorer, or a callable from text to a number.
        on_error: ``stop`` at a row that it fails on, or ``skip``: no reward for that row, counted in ``failed``.

    Each trace's `meta` has the row's other columns, ``ground_truth`` and what ``extra_info`` holds.

    Raises:
        ValueError: no scorer.
    """

    scorer: Any = None

    def __init__(
        self,
        tokenizer: Any,
        num_examine: int = 0,
        compute_score: Any = None,
        reward_fn_key: str = "data_source",
        *,
        scorer: Any = None,
        on_error: str = "stop",
        **_: Any,
    ):
        chosen = scorer if scorer is not None else self.scorer
        chosen = compute_score if chosen is None and hasattr(compute_score, "score") else chosen
        if chosen is None:
            raise ValueError("no scorer: TokenRewardManager(tokenizer, scorer=...), or a class attribute `scorer`")
        self.tokenizer, self.num_examine, self.reward_fn_key = tokenizer, num_examine, reward_fn_key
        self.rewarder, self.view = Rewarder({"pertoken": as_scorer(chosen)}, on_error=on_error), byte_view(tokenizer)

    def __call__(self, data: Any, return_dict: bool = False) -> Tensor | dict[str, Any]:
        """Rewards on tokens.

        Args:
            data: B rows: ``batch["prompts"]`` (B, P) padded on the left, ``batch["responses"]`` (B, T) padded on the
                right, ``batch["attention_mask"]`` (B, P + T), perhaps ``batch["response_mask"]`` (B, T): 0 on what a
                tool wrote.

        Returns:
            float32 (B, T), or with `return_dict` ``{"reward_tensor", "reward_extra_info"}`` with the named parts.
        """
        batch, columns = data.batch, data.non_tensor_batch
        if "rm_scores" in batch.keys():  # noqa: SIM118 - a TensorDict's `in` asks for something else
            return {"reward_tensor": batch["rm_scores"], "reward_extra_info": {}} if return_dict else batch["rm_scores"]
        prompts, responses, attention = batch["prompts"], batch["responses"], batch["attention_mask"].bool()
        width = prompts.shape[1]
        there_NT = attention[:, width:]
        emitted_NT = batch["response_mask"].bool() if "response_mask" in batch.keys() else there_NT  # noqa: SIM118
        traces = []
        for n in range(len(responses)):
            ids, kept = responses[n], there_NT[n]
            meta = self._meta({k: v[n] for k, v in columns.items()}, n)
            prompt = prompts[n][attention[n, :width]].tolist()
            traces.append(trace_of(self.view, prompt, ids[kept].tolist(), meta, emitted_NT[n][kept].tolist()))
        found = self.rewarder(traces)
        reward_NT = torch.zeros(responses.shape, dtype=torch.float32, device=responses.device)
        for n, credit in enumerate(found.credits):
            if credit is not None:
                reward_NT[n, there_NT[n]] = torch.from_numpy(credit.values * traces[n].mask).to(reward_NT)
        for n in range(min(self.num_examine, len(traces))):
            print(f"[prompt] {traces[n].prompt_text}\n[response] {traces[n].text}\n[score] {float(reward_NT[n].sum())}")
        if not return_dict:
            return reward_NT
        extra: dict[str, list[Any]] = defaultdict(list)
        for name, values in found.parts.items():
            extra[name.removeprefix("pertoken.")] = [float("nan") if v is None else v for v in values]
        extra["failed"] = [credit is None for credit in found.credits]
        return {"reward_tensor": reward_NT, "reward_extra_info": dict(extra)}

    def _meta(self, row: dict[str, Any], n: int) -> dict[str, Any]:
        truth = row.get("reward_model") or {}
        known = {"row": n, **(row.get("extra_info") or {}), **{k: v for k, v in row.items() if k != "extra_info"}}
        known["source"] = row.get(self.reward_fn_key, "")
        return known | ({"ground_truth": truth["ground_truth"]} if "ground_truth" in truth else {})
