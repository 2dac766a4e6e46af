"""Adaptation of a causal model to inputs it was not trained on: LoRA, added into the weights afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.adapters import add_lora, merge_lora
from ..core.head import Head, log_probs

Asked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Input embeddings (N, T, H) padded on the right, their mask (N, T); of M positions the row, the place, the next id."""


def adapted(model: Any, batches: Iterable[Asked], *, rank: int = 8, lr: float = 3e-4) -> tuple[Any, list[float]]:
    """Train an adapter of that rank by Adam, one step a batch, on the mean nats of the next ids; dropout is off.

    Returns:
        A copy of the model, frozen, with the adapter in its weights, and the losses. The model stays as it is.
    """
    tuned = add_lora(copy.deepcopy(model).eval().requires_grad_(False), rank).eval()
    causal, losses = tuned.get_base_model(), list[float]()
    head, optimizer = Head(causal), torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    for embedded, mask, rows, places, ids in batches:
        told = {"inputs_embeds": embedded, "attention_mask": mask, "use_cache": False}
        states = causal.base_model(**told).last_hidden_state[rows, places]
        loss = -log_probs(states, ids, head, (), contextlib.nullcontext, 256)["logp"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return merge_lora(tuned).requires_grad_(False), losses
