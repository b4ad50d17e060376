"""Reductions over torch.distributed that do nothing where it is not initialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["all_reduce", "gather", "together", "union"]

_T = TypeVar("_T", float, str)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(value: Tensor, operation: str) -> Tensor:
    """``value`` reduced over all processes; ``operation`` is "sum", "max" or "min"."""
    if not _active():
        return value
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    # NCCL reduces tensors on a GPU only, and some of ours live on the CPU
    reduced = value.cuda() if dist.get_backend() == "nccl" else value
    dist.all_reduce(reduced, op=operations[operation])
    return reduced.to(value.device)


def gather(value: Any) -> list[Any]:
    """The picklable ``value`` of every process, in the order of their ranks."""
    if not _active():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def union(values: set[_T]) -> list[_T]:
    """Ascending union of the sets of all processes."""
    return sorted(set().union(*gather(values)))


@contextmanager
def together() -> Iterator[None]:
    """If the body raises in one process, it raises in all: none is left waiting in a reduction for the others.

    Raises:
        TdqError: The body raised in another process.
    """
    try:
        yield
    except Exception as error:
        gather(f"{type(error).__name__}: {error}")
        raise
    failures = [failure for failure in gather(None) if failure is not None]
    if failures:
        raise TdqError("forward_loop", failures[0], "calibration failed in another process", "See its error")
