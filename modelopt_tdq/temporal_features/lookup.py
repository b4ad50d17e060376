"""From times to temporal features: rows of a table, dequantized, and interpolated where that is wanted.

Plain tensor arithmetic, in float32; the exported graph computes the same, operator by operator.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from modelopt_tdq.core.fake_quant import dequantize
from modelopt_tdq.core.schedule import row_index

__all__ = ["OUTSIDE", "Outside", "Rows", "is_row", "look_up", "neighbours"]

#: What a time gets that is no row of the table: the nearest row, the line between its two neighbours, or what the
#: model's own layers compute.
Outside: TypeAlias = Literal["nearest", "linear", "exact"]

OUTSIDE: tuple[Outside, ...] = ("nearest", "linear", "exact")


class Rows(NamedTuple):
    """One feature at K times.

    Attributes:
        data: [K, ...] float32 or float16 values, or int8 codes.
        scale: [K] float32, of codes; None with values.
        offset: [K] float32, the value of code 0; None where it is 0.
    """

    data: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def take(self, index: Tensor) -> Tensor:
        """[B, ...] float32: the rows at ``index`` [B] int64, dequantized."""
        data = self.data[index].to(torch.float32)
        if self.scale is None:
            return data
        shape = (-1, *(1,) * (data.dim() - 1))
        offset = None if self.offset is None else self.offset[index].reshape(shape)
        return dequantize(data, self.scale[index].reshape(shape), offset)


def is_row(time: Tensor, timesteps: Tensor) -> Tensor:
    """Which times are rows of the table, as float32 numbers.

    Args:
        time: [B], any real dtype, in the model's own units.
        timesteps: [K] float32, strictly ascending.

    Returns:
        [B] bool.
    """
    return timesteps[row_index(time, timesteps)] == time.to(torch.float32)


def neighbours(time: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Where a time lies between two rows; a time outside of the table lies on its end.

    Args:
        time: [B], any real dtype, in the model's own units.
        timesteps: [K] float32, strictly ascending, K >= 2.

    Returns:
        [B] int64: the lower row, whose neighbour is the next one; and [B] float32 in [0, 1]: the share of that.
    """
    time = time.to(torch.float32)
    nearest = row_index(time, timesteps)
    lower = (nearest - (time < timesteps[nearest]).to(torch.int64)).clamp(0, len(timesteps) - 2)
    below, above = timesteps[lower], timesteps[lower + 1]
    return lower, ((time - below) / (above - below)).clamp(0.0, 1.0)


def look_up(rows: Rows, timesteps: Tensor, time: Tensor, outside: Outside) -> Tensor:
    """One feature at some times.

    Args:
        rows: [K, ...].
        timesteps: [K] float32, strictly ascending.
        time: [B], any real dtype, in the model's own units.
        outside: See :data:`Outside`; "exact" answers as "nearest", since only the caller can compute more.

    Returns:
        [B, ...] float32. At a time that is a row it is that row, bit for bit, whatever ``outside`` says.
    """
    if outside != "linear" or len(timesteps) == 1:
        return rows.take(row_index(time, timesteps))
    lower, share = neighbours(time, timesteps)
    share = share.reshape(-1, *(1,) * (rows.data.dim() - 1))
    return rows.take(lower) * (1.0 - share) + rows.take(lower + 1) * share
