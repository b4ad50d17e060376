"""Shifts of channels in the graph: an offset of each channel in front of the codes, and what it adds behind products.

    p = (o + v) * c,    o' + v,    sum over the input channels of w v        of each row

(:meth:`modelopt_tdq.core.scales.Scales.over_channels`), float32 products and sums as in torch, so that codes are equal.
They are rows [K, C] of :class:`~modelopt_tdq.export.channel_rows.ChannelRows`. Where offsets are inputs of the graph,
or have rows at other times, the graph computes p from v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.channel_rows import ChannelRows
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.spec import ActivationSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GraphShifts", "all_channel_rows"]

_Array = np.ndarray[Any, np.dtype[np.float32]]


def all_channel_rows(context: LoweringContext) -> tuple[ChannelRows, ChannelRows]:
    """Those of shifts, and those of corrections: the same where their times are."""
    shifts, corrections = context.spec.shift_times, context.spec.correction_times
    if shifts is None or corrections is None or np.array_equal(shifts, corrections):
        rows = ChannelRows(context, corrections if shifts is None else shifts)
        return rows, rows
    return ChannelRows(context, shifts), ChannelRows(context, corrections)


class GraphShifts:
    """The shifts of one graph.

    Args:
        context: Of the lowering.
        rows: Where theirs are.
    """

    def __init__(self, context: LoweringContext, rows: ChannelRows) -> None:
        self._context, self.rows = context, rows

    def emitter(self, marker: ir.Node) -> ActivationEmitter:
        """What emits the activation of a marker."""
        context, spec = self._context, self._context.activation(marker)
        shifts = None if spec.shift is None else self
        return ActivationEmitter(context.editor, context.lookup, spec, marker, context.layout(marker), shifts)

    def add(self, emitter: ActivationEmitter, *quantities: str) -> None:
        """Add the rows for these quantities, "offset" or "dequant_offset"."""
        spec = emitter.spec
        if spec.shift is None:
            return
        shift = spec.shift.reshape(len(spec.shift), -1)
        for quantity in quantities:
            values = spec.offset if quantity == "offset" else spec.value_offset
            what = quantity
            if values is None or self._together(spec, values):
                rows = shift if values is None else values[:, None] + shift
                if quantity == "offset" and spec.divisor is not None:
                    rows = rows * spec.divisor.reshape(1, -1)
            else:
                rows, what = shift, "shift"
            if not self.rows.has(self._owner(emitter), what):
                self.rows.add(self._owner(emitter), what, rows, emitter.rank, spec.shift.ndim - 2)

    def _together(self, spec: ActivationSpec, values: _Array) -> bool:
        """Whether offsets and shifts can be added here."""
        if self._context.table_input and spec.name in self._context.spec.temporal:
            return False
        return len(values) == 1 or (spec.is_shifted_over_time and self.rows.same_times)

    @staticmethod
    def _owner(emitter: ActivationEmitter) -> tuple[str, int]:
        return emitter.spec.name, emitter.rank

    def offset(self, emitter: ActivationEmitter, quantity: str) -> ir.Value:
        """See :class:`~modelopt_tdq.export.activation.Shifts`."""
        owner = self._owner(emitter)
        if self.rows.has(owner, quantity):
            return self.rows.value(owner, quantity, emitter.layout)
        shift = self.rows.value(owner, "shift", emitter.layout)
        name, lookup = emitter.spec.name, self._context.lookup
        return lookup.shifted(name, quantity, emitter.rank, emitter.layout, shift)
