"""From a time to a row of the table.

A table has one row per calibrated time. A time between two rows takes the nearest row, a time
exactly half-way takes the earlier (smaller) one, a time outside the table takes the end row. The
same rule, written as "count the edges below t", runs in PyTorch, in ONNX and in the plugin.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["edges", "nearest_known", "row_index"]


def edges(timesteps: Tensor) -> Tensor:
    """Half-way points between neighbouring rows.

    Args:
        timesteps: [K] float32, strictly ascending, in the model's own time units.

    Returns:
        [K - 1] float32. Where the exact half-way point is no float32 number, the one just below it: a
        float32 time then lies above the edge exactly where it lies above the half-way point.
    """
    exact = (timesteps[1:].to(torch.float64) + timesteps[:-1].to(torch.float64)) * 0.5
    rounded = exact.to(torch.float32)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.to(torch.float64) > exact, below, rounded)


def row_index(timestep: Tensor, timesteps: Tensor) -> Tensor:
    """Row of the table for each time: the number of edges strictly below it.

    Args:
        timestep: [B], any real dtype, in the model's own time units; taken as float32.
        timesteps: [K] float32, strictly ascending.

    Returns:
        [B] int64 in [0, K - 1].
    """
    return torch.bucketize(timestep.to(torch.float32), edges(timesteps))


def nearest_known(timesteps: Tensor, known: Tensor) -> Tensor:
    """For each row, the row that is nearest in time among the known ones, by the rule of :func:`row_index`.

    Args:
        timesteps: [K] float32, strictly ascending.
        known: [K] bool, one of them at least.

    Returns:
        [K] int64; a known row is its own.
    """
    rows = known.nonzero().squeeze(1)
    return rows[row_index(timesteps, timesteps[rows])]
