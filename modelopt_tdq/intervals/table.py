"""One learned value per interval of time: S_N of the paper, the static baseline, and optimal bins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.intervals.source import IntervalSource, positive, unconstrained

__all__ = ["TableIntervals"]


class TableIntervals(IntervalSource):
    """Each quantizer has a few learned values, and each row of the schedule uses one of them.

    Args:
        timesteps: [K] float32.
        bins: [K, Q] int64; rows of a column with the same number share a value. All zeros: static.
        initial: [K, Q] float32, positive; a value starts at the geometric mean of its rows.
        softplus: Learn softplus^-1 of the interval (DuQ, NIPQ) rather than the interval (LSQ).
    """

    index: Tensor

    def __init__(self, timesteps: Tensor, bins: Tensor, initial: Tensor, softplus: bool = False) -> None:
        super().__init__(timesteps)
        self.softplus = softplus
        # one flat vector of values over all quantizers
        labels = bins + torch.arange(bins.shape[1]) * (int(bins.max()) + 1)
        used, index = torch.unique(labels, return_inverse=True)
        rows = torch.zeros(len(used), dtype=torch.float64).index_add_(
            0, index.flatten(), initial.double().log().flatten()
        )
        values = (rows / index.flatten().bincount()).exp().float()
        self.register_buffer("index", index)
        self.values = nn.Parameter(unconstrained(values, softplus))

    def forward(self, time: Tensor) -> Tensor:
        """See :class:`IntervalSource`."""
        return positive(self.values[self.index[row_index(time, self.timesteps)]], self.softplus)

    def static_parameters(self) -> list[nn.Parameter]:
        """See :class:`IntervalSource`."""
        return [self.values]
