"""What all processes of torch.distributed know together; each function returns its argument where there is but one.

Every process calls them in the same order. Inside :func:`modelopt_tdq.core.together.together`, none enters a
collective before all are there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from modelopt_tdq.core.together import active, collective_device, meet
from modelopt_tdq.errors import TdqError

__all__ = ["agreed", "all_reduce", "broadcast", "gather", "processes", "rank", "union"]

_T = TypeVar("_T", float, str)


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if active() else 0


def all_reduce(value: Tensor, operation: str) -> Tensor:
    """``value`` reduced over all processes; ``operation`` is "sum", "max" or "min"."""
    if not active():
        return value
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    meet()
    reduced = value.detach().to(collective_device(), copy=True)  # wherever it is in this process
    dist.all_reduce(reduced, op=operations[operation])
    return reduced.to(value.device)


def gather(value: Any) -> list[Any]:
    """The picklable ``value`` of every process, in the order of their ranks."""
    if not active():
        return [value]
    meet()
    gathered: list[Any] = [None] * processes()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any, source: int) -> Any:
    """The ``value`` of the process with rank ``source``; its tensors on this process's device of the same type."""
    if not active():
        return value
    meet()
    box: list[Any] = [None]
    if rank() == source:
        file = io.BytesIO()
        torch.save(value, file)
        box = [file.getvalue()]
    dist.broadcast_object_list(box, src=source)

    def here(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=location.partition(":")[0])

    # no file from elsewhere: bytes that another process of this run has just sent
    return value if rank() == source else torch.load(io.BytesIO(box[0]), map_location=here, weights_only=False)


def union(values: set[_T]) -> list[_T]:
    """Ascending union of the sets of all processes."""
    return sorted(set().union(*gather(values)))


def agreed(field: str, values: Mapping[str, Any]) -> None:
    """See that ``values`` are the same in all processes.

    Args:
        field: What they are.
        values: With a ``repr`` that tells them apart.

    Raises:
        TdqError: They are not; names a rank, and the first value that differs from that of rank 0.
    """
    first, *others = gather({name: repr(value) for name, value in values.items()})
    for number, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            mine, its = first.get(name, "nothing"), other.get(name, "nothing")
            if mine != its:
                raise TdqError(
                    field,
                    name,
                    f"it is {mine} in the process of rank 0, and {its} in that of rank {number}",
                    "All processes calibrate the same model in the same way",
                )
