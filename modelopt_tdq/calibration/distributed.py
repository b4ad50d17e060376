"""Reductions over torch.distributed that do nothing where it is not initialised."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce", "union"]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(value: Tensor, operation: str) -> Tensor:
    """``value`` reduced over all processes; ``operation`` is "sum", "max" or "min"."""
    if _active():
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(value, op=operations[operation])
    return value


def union(values: set[float]) -> list[float]:
    """Ascending union of the sets of all processes."""
    if not _active():
        return sorted(values)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return sorted(set().union(*gathered))
