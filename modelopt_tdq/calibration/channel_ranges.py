"""Between which values the channels of a layer's input lie, at each time of the calibration.

See :mod:`modelopt_tdq.calibration.channel_smoothing`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modelopt_tdq.core.distributed import all_reduce, union

__all__ = ["ChannelRanges", "SharedRanges", "shared_ranges"]

#: Times that have ranges of their own, at most: a thousand would take as much memory as the weights.
_TIMES = 64


class ChannelRanges:
    """Smallest and largest value of each channel of one layer's input, at each time: [C] each.

    Attributes:
        by_time: [2, C] float32, the smallest values and the largest, by time.
    """

    def __init__(self) -> None:
        self.by_time: dict[float, Tensor] = {}

    def see(self, channels: Tensor, times: Tensor) -> None:
        """Take an input into account.

        Args:
            channels: [C, n], all that a channel holds, sample by sample.
            times: [1], or [B] where samples have times of their own.
        """
        known = times.tolist()
        samples = channels.reshape(len(channels), len(known) if channels.shape[1] % len(known) == 0 else 1, -1)
        for time in sorted(set(known)):
            own = samples if len(set(known)) == 1 else samples[:, [i for i, t in enumerate(known) if t == time]]
            found = torch.stack(torch.aminmax(own.flatten(1), dim=1)).float()
            seen = self.by_time.get(time)
            self.by_time[time] = found if seen is None else _spanned([seen, found.to(seen.device)])

    def agree(self, width: int, device: torch.device) -> None:
        """Over all processes.

        Args:
            width: C.
            device: Where the model computes.
        """
        times = union(set(self.by_time))
        if not times:
            return
        nothing = torch.tensor([[math.inf], [-math.inf]], device=device).expand(2, width)
        own = torch.stack([self.by_time.get(time, nothing).to(device) for time in times])
        low, high = all_reduce(own[:, 0].contiguous(), "min"), all_reduce(own[:, 1].contiguous(), "max")
        self.by_time = {time: torch.stack(ends) for time, *ends in zip(times, low, high, strict=True)}

    @property
    def is_nothing(self) -> bool:
        """Whether nothing but zeros was seen."""
        return not any(bool(ends.any()) for ends in self.by_time.values())

    def at(self, time: float) -> tuple[Tensor, Tensor]:
        """[C] the smallest and the largest values at one time, or at the nearest that there is."""
        low, high = self.by_time[min(self.by_time, key=lambda seen: abs(seen - time))]
        return low, high


def _spanned(ranges: list[Tensor]) -> Tensor:
    """[2, C] the range over several."""
    stacked = torch.stack(ranges)
    return torch.stack([stacked[:, 0].amin(0), stacked[:, 1].amax(0)])


class SharedRanges(NamedTuple):
    """Of a tensor that several layers read.

    Attributes:
        times: [K] ascending.
        low: [K, C] float32, the smallest values.
        high: [K, C] float32, the largest.
    """

    times: list[float]
    low: Tensor
    high: Tensor


def shared_ranges(ranges: list[ChannelRanges]) -> SharedRanges:
    """Those of a tensor that the layers with these ranges read.

    Neighbouring times share a row where there are too many: the middle one stands for them.
    """
    times = sorted(set().union(*(own.by_time for own in ranges)))
    device = next(iter(ranges[0].by_time.values())).device
    rows = [_spanned([own.by_time[time].to(device) for own in ranges if time in own.by_time]) for time in times]
    if len(times) > _TIMES:
        parts = [part.tolist() for part in torch.arange(len(times)).tensor_split(_TIMES)]
        rows = [_spanned([rows[i] for i in part]) for part in parts]
        times = [times[part[len(part) // 2]] for part in parts]
    stacked = torch.stack(rows)
    return SharedRanges(times, stacked[:, 0], stacked[:, 1])
