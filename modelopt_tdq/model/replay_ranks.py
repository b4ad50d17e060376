"""Replayed calls over several processes.

A model that communicates in its ``forward`` needs every process to make the same calls in the same order. So for each
time at which any process has samples, every process makes one call: with its own samples, or with another one that
stands in and does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.distributed import gather

__all__ = ["Batch", "all_samples", "at_time", "largest_group"]


@dataclass(frozen=True)
class Batch:
    """One call of the model on replayed samples of one time.

    Attributes:
        row: Which of the times.
        call: Its keyword arguments.
        order: One number per sample, or one for a call that was kept whole; all samples of a time, of whatever process,
            in descending order, are those that one process would have. Empty if the batch stands in where this process
            has no samples of this time.
        first: Whether no other process of a lower rank makes the same call with the same samples, as those of tensor
            and context parallelism do: they share the layers' outputs, and each has the whole output of the model.
        output: What the model made of these samples when they were recorded, one by one behind another; None if that
            is not known.
    """

    row: int
    call: dict[str, Any]
    order: tuple[float, ...]
    first: bool
    output: Tensor | None = None

    @property
    def own(self) -> bool:
        """Whether what a layer makes of it here is evidence."""
        return bool(self.order)

    @property
    def counts(self) -> bool:
        """Whether what the model makes of it here is evidence."""
        return self.own and self.first


def all_samples(found: Mapping[int, Sequence[tuple[Sequence[float], Tensor]]]) -> dict[int, Tensor]:
    """Bring together what each process found out about its samples.

    Args:
        found: By row and batch that counts, its ``order``, and one number or more per sample: [n, ...].

    Returns:
        By row, ascending, [N, ...] on the CPU: those of all processes, in the order of one that saw all samples.
    """
    parts = gather({row: [(order, values.cpu()) for order, values in own] for row, own in found.items()})
    merged: dict[int, Tensor] = {}
    for row in sorted(set().union(*parts)):
        blocks = [
            block
            for part in parts
            for order, values in part.get(row, [])
            for block in zip(order, values.tensor_split(len(order)), strict=True)
        ]
        merged[row] = torch.cat([values for _, values in sorted(blocks, key=lambda block: -block[0])])
    return merged


def largest_group(groups: list[dict[str, list[float]]]) -> list[str | None]:
    """Per row, the layout of most samples over all processes; None where no process has any.

    Args:
        groups: Per row, the ``order`` of this process's samples by their layout.
    """
    largest: list[str | None] = []
    for row in zip(*gather(groups), strict=True):
        orders: dict[str, list[float]] = {}
        for part in row:
            for layout, order in part.items():
                orders.setdefault(layout, []).extend(order)
        largest.append(max(orders, key=lambda name: (len(orders[name]), max(orders[name])), default=None))
    return largest


def at_time(call: dict[str, Any], argument: str, time: float) -> dict[str, Any]:
    """The same call at another time, given in the form that it has there; a form that is not known stays."""
    value = call.get(argument)
    if isinstance(value, Tensor):
        return {**call, argument: torch.full_like(value, time)}
    return {**call, argument: type(value)(time)} if isinstance(value, (int, float)) else call
