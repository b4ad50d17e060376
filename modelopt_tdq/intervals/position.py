"""Where a time lies in the calibrated schedule."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["schedule_position"]


def schedule_position(time: Tensor, timesteps: Tensor) -> Tensor:
    """The time counted in calibrated steps, as a fraction of the schedule: 0 at its smallest time, 1 at its largest.

    Linear between two neighbouring times, constant outside. So time means the same whatever the model's unit is
    (0..999, 0..1, sigma), and a schedule that is dense somewhere is resolved there.

    Args:
        time: [B] float32, in the model's own units.
        timesteps: [K] float32, strictly ascending.

    Returns:
        [B] float32 in [0, 1]; zeros if K is 1.
    """
    if timesteps.numel() == 1:
        return torch.zeros_like(time)
    last = timesteps.numel() - 1
    left = (torch.bucketize(time, timesteps, right=True) - 1).clamp(0, last - 1)
    start, end = timesteps[left], timesteps[left + 1]
    fraction = ((time - start) / (end - start)).clamp(0.0, 1.0)
    return (left + fraction) / last
