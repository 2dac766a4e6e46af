"""Statistics written down by hand, for the tests of objectives: no model, so that a number can be checked on paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pertoken.core.protocols import Batch, Loss
from pertoken.core.stats import Stats


def stats(*rows: Sequence[float], **extra: Sequence[Sequence[float]]) -> Stats:
    """Float64 log-probs of completions of differing lengths, padded with NaN; they are leaves with gradients."""
    longest = max(len(row) for row in rows)

    def padded(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([[*row, *[torch.nan] * (longest - len(row))] for row in values], dtype=torch.float64)

    mask = torch.tensor([[t < len(row) for t in range(longest)] for row in rows], dtype=torch.bool)
    mask = mask.reshape(len(rows), longest)
    logp = padded(rows).reshape(len(rows), longest).requires_grad_()
    return Stats(mask, logp, mask, {name: padded(values) for name, values in extra.items()})


def pairs(n: int = 1) -> Batch:
    """Completions 0, 1 are the first pair (chosen, rejected), 2, 3 the second..."""
    return Batch(torch.arange(2 * n).reshape(n, 2))


def labels(*values: bool, mismatched: Sequence[bool] | None = None) -> Batch:
    """Unpaired completions, desirable or not."""
    columns = {} if mismatched is None else {"mismatched_N": torch.tensor(mismatched)}
    return Batch(None, columns, torch.tensor(values))


def gradient(loss: Loss | Tensor, s: Stats) -> Tensor:
    """Gradient of a loss's sum with respect to the log-probs (N, T), 0 beyond the ends."""
    total = loss.sum if isinstance(loss, Loss) else loss
    (found,) = torch.autograd.grad(total, s.logp_NT, retain_graph=True)
    return found


def mean(loss: Loss, name: str | None = None) -> float:
    """The loss, or one of its metrics, as it is shown."""
    total, count = (loss.sum.detach(), loss.count) if name is None else loss.metrics[name]
    return float(total) / float(count)
