"""The columns of a model's interval source that belong to one block, as parameters of their own.

The intervals of all quantizers live in one batched source. A block learns a copy of its part of it, so that nothing
that happens to it (gradients, moments of the optimizer) reaches another block's intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.source import SMALLEST, IntervalSource, positive
from modelopt_tdq.intervals.table import TableIntervals

__all__ = ["BlockColumns", "block_columns"]


class BlockColumns:
    """Some columns of a source; here, of one whose parameters all have the quantizers as their first dimension.

    Args:
        source: Of the whole model.
        columns: [n] int64, those of the block.
        quantizers: Q, of the whole model.
    """

    def __init__(self, source: IntervalSource, columns: Tensor, quantizers: int) -> None:
        self.source, self.columns, self.quantizers = source, columns, quantizers
        self.values = {name: self._learned(value).requires_grad_() for name, value in self.read().items()}

    def _where(self, name: str) -> Tensor:
        """Indices of this block's part of a parameter, in its first dimension."""
        parameter = self.source.get_parameter(name)
        if parameter.dim() == 0 or len(parameter) != self.quantizers:
            raise TdqError(
                "intervals", type(self.source).__name__, f"{name} has no part per quantizer", "Use another source"
            )
        return self.columns

    def _learned(self, stored: Tensor) -> Tensor:
        """What is learned for a stored value."""
        return stored

    def _stored(self, learned: Tensor) -> Tensor:
        """The reverse."""
        return learned

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """A copy of this block's part of the source's parameters."""
        return {name: p[self._where(name)].clone() for name, p in self.source.named_parameters()}

    @torch.no_grad()
    def write(self, part: dict[str, Tensor]) -> None:
        """Put such a part into the source."""
        for name, value in part.items():
            self.source.get_parameter(name)[self._where(name)] = value

    def commit(self) -> None:
        """Write what was learned into the source."""
        with torch.no_grad():
            self.write({name: self._stored(value) for name, value in self.values.items()})

    def made(self, time: Tensor) -> Tensor:
        """Intervals [B, n] of the block at times [B]."""
        intervals: Tensor = functional_call(self.source, self.values, (time,))
        return intervals

    def intervals(self, time: Tensor) -> Tensor:
        """The same in their places among all, [B, Q]; zeros elsewhere."""
        made = self.made(time)
        return made.new_zeros(len(made), self.quantizers).index_copy(1, self.columns, made)


class _TableColumns(BlockColumns):
    """Columns of a table: the learned values that its rows use. Scales are learned by their logarithm.

    A step of the optimizer then changes each by a fraction of itself, whatever the layer's range.
    """

    source: TableIntervals

    def _where(self, name: str) -> Tensor:
        used: Tensor
        used, self.index = torch.unique(self.source.index[:, self.columns], return_inverse=True)
        return used

    def _learned(self, stored: Tensor) -> Tensor:
        return stored if self.source.softplus else stored.log()

    def _stored(self, learned: Tensor) -> Tensor:
        return learned if self.source.softplus else learned.exp().clamp(min=SMALLEST)

    def made(self, time: Tensor) -> Tensor:
        """Intervals [B, n] of the block at times [B]."""
        rows = row_index(time, self.source.timesteps)
        values = self._stored(self.values["values"][self.index[rows]])
        return positive(values, self.source.softplus)


def block_columns(source: IntervalSource, columns: list[int], quantizers: int) -> BlockColumns:
    """The columns of one block.

    Args:
        source: Of the whole model.
        columns: Numbers of the block's quantizers in it.
        quantizers: Number of all.
    """
    kind = _TableColumns if isinstance(source, TableIntervals) else BlockColumns
    return kind(source, torch.tensor(columns, dtype=torch.int64, device=source.timesteps.device), quantizers)
