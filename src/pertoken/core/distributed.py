"""Figures that an objective shares over the processes of a run: sums and counts are added, never means; values that
must be seen one by one are gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_alone = False


def summed(*values: Tensor | float) -> list[Tensor]:
    """Each value, detached, added up over processes; with one process, itself. All processes must call it together.

    Args:
        values: numbers or tensors, of one shape on every process; at least one tensor where the run is on GPUs.
    """
    device = next((v.device for v in values if isinstance(v, Tensor)), None)  # GPUs share nothing that lies elsewhere
    own = [v.detach().clone() if isinstance(v, Tensor) else torch.tensor(float(v), device=device) for v in values]
    if not _alone and torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in own:
            torch.distributed.all_reduce(value)
    return own


def gathered(values: Tensor) -> Tensor:
    """The values of all processes, detached, in the order of the processes; with one process, its own. All processes
    must call it together, each with as many as it has (none, even).

    Args:
        values: shape (n,).
    """
    own = values.detach()
    if _alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own.clone()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    lengths = torch.zeros(world, dtype=torch.long, device=own.device)
    lengths[rank] = len(own)
    torch.distributed.all_reduce(lengths)
    table = own.new_zeros(world, int(lengths.max()))  # a sum with zeros is exact
    table[rank, : len(own)] = own
    torch.distributed.all_reduce(table)
    return torch.cat([row[:n] for row, n in zip(table, lengths.tolist(), strict=True)])


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, nothing is shared: for what one process computes without the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before
