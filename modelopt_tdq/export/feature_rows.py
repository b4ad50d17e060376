"""The features of the call's times, in the graph: rows of a packed table, dequantized and interpolated.

    [DQ(1) ->] Gather(codes [K, C], row) -> Cast -> Mul(scale) -> Add(offset)
    Gather(scale [K, H], row) -> Gather(feature of each channel [C]), and likewise the offset

The number of nodes does not depend on the number H of layers. The row is the one that the scales take, and the
arithmetic that of :mod:`modelopt_tdq.temporal_features.lookup`, operator by operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import TimeRow
from modelopt_tdq.temporal_features.feature import Feature
from modelopt_tdq.temporal_features.table import FeatureTable

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FeatureRows", "width"]


def width(features: Sequence[Feature]) -> int:
    """Numbers per sample in these features."""
    return sum(math.prod(f.row_shape) for f in features)


class FeatureRows:
    """Emits what all features share, in front of the graph.

    Args:
        editor: Of the graph.
        time: The time of the call and its row.
        table: Of the features.
        gather_int8: Whether the backend looks up INT8 values. TensorRT takes INT8 constants only in front of
            DequantizeLinear, which then makes halves of the codes: these hold them exactly.
    """

    def __init__(self, editor: GraphEditor, time: TimeRow, table: FeatureTable, gather_int8: bool) -> None:
        self._editor, self._time, self._table, self._gather_int8 = editor, time, table, gather_int8
        self._types = editor.ir.DataType
        self._constants: dict[str, ir.Value] = {}

    def emit(self, op_type: str, inputs: list[ir.Value], name: str, **keywords: Any) -> ir.Value:
        """A node in front of the graph; see :meth:`GraphEditor.before`."""
        value: ir.Value = self._editor.before(self._time.anchor, op_type, inputs, f"features/{name}", **keywords)
        return value

    def cast(self, value: ir.Value, dtype: Any, name: str) -> ir.Value:
        """Likewise."""
        return self._editor.cast(self._time.anchor, value, dtype, f"features/{name}")

    def _constant(self, name: str, array: Any) -> ir.Value:
        """An initializer that is stored once, however often it is asked for."""
        if name not in self._constants:
            self._constants[name] = self._editor.constant(f"features/{name}", np.ascontiguousarray(array))
        return self._constants[name]

    def _number(self, value: float) -> ir.Value:
        return self._editor.constant("number", np.array(value, dtype=np.float32))

    @cached_property
    def _timesteps(self) -> ir.Value:
        """[K] float32."""
        return self._constant("timesteps", self._table.timesteps.numpy())

    @cached_property
    def _times(self) -> ir.Value:
        """[T] float32."""
        return self.emit("Reshape", [self._time.column, self._editor.ints([-1])], "times", shape=[self._time.size])

    @cached_property
    def _nearest(self) -> ir.Value:
        """[T] float32: the times of the rows."""
        return self.emit("Gather", [self._timesteps, self._time.row], "nearest", axis=0)

    @cached_property
    def _neighbours(self) -> list[tuple[ir.Value, ir.Value]]:
        """The rows below and above the time, [T] int64, each with its share, [T, 1] float32."""
        before = self.emit("Less", [self._times, self._nearest], "before", dtype=self._types.BOOL)
        before = self.cast(before, self._types.FLOAT, "before_float")
        count = self.emit("Sub", [self._time.count, before], "rows_below")
        count = self.emit("Clip", [count, self._number(0.0), self._number(len(self._table) - 2.0)], "lower_count")
        lower = self.cast(count, self._types.INT64, "lower")
        upper = self.cast(self.emit("Add", [count, self._number(1.0)], "upper_count"), self._types.INT64, "upper")
        below, above = (self.emit("Gather", [self._timesteps, row], "neighbour", axis=0) for row in (lower, upper))
        passed, width = self.emit("Sub", [self._times, below], "passed"), self.emit("Sub", [above, below], "width")
        share = self.emit("Div", [passed, width], "passed_share")
        share = self.emit("Clip", [share, self._number(0.0), self._number(1.0)], "share")
        share = self.emit("Reshape", [share, self._editor.ints([-1, 1])], "upper_share")
        return [(lower, self.emit("Sub", [self._number(1.0), share], "lower_share")), (upper, share)]

    def values(self, features: Sequence[Feature]) -> ir.Value:
        """[T, C] float32: features of one kind of storage, side by side; to be asked for once per kind."""
        if self._table.outside != "linear" or len(self._table) == 1:
            return self._taken(features, self._time.row)
        parts = [self.emit("Mul", [self._taken(features, r), share], "part") for r, share in self._neighbours]
        return self.emit("Add", parts, "interpolated", shape=[self._time.size, width(features)])

    def _taken(self, features: Sequence[Feature], row: ir.Value) -> ir.Value:
        """[T, C] float32: the values in these rows [T]."""
        packed = np.concatenate([f.rows.data.numpy().reshape(len(f), -1) for f in features], 1)
        kind = "codes" if packed.dtype == np.int8 else f"values_{packed.dtype}"
        data, shape = self._stored(kind, packed), [self._time.size, width(features)]
        value = self.emit("Gather", [data, row], f"row_of_{kind}", dtype=data.dtype, shape=shape, axis=0)
        value = self.cast(value, self._types.FLOAT, f"{kind}_float")
        if packed.dtype != np.int8:
            return value
        scale = np.stack([f.arrays()["scale"].numpy() for f in features], 1)
        value = self.emit("Mul", [value, self._per_channel("scale", scale, features, row)], "scaled", shape=shape)
        if all(f.offset is None for f in features):
            return value
        offset = np.stack([np.zeros(len(f), np.float32) if f.offset is None else f.offset.numpy() for f in features], 1)
        return self.emit("Add", [value, self._per_channel("offset", offset, features, row)], "dequantized", shape=shape)

    def _stored(self, kind: str, packed: Any) -> ir.Value:
        """[K, C]: what rows are taken from."""
        data = self._constant(kind, packed)
        return data if packed.dtype != np.int8 or self._gather_int8 else self._halves(data)

    def _halves(self, codes: ir.Value) -> ir.Value:
        if "halves" in self._constants:
            return self._constants["halves"]
        one = self._constant("one", np.array(1.0, dtype=np.float16))
        zero = self._editor.constant("zero_point", np.array(0, dtype=np.int8))
        halves = self.emit("DequantizeLinear", [codes, one, zero], "halves", dtype=one.dtype, shape=codes.shape)
        self._constants["halves"] = halves
        return halves

    def _per_channel(self, name: str, per_feature: Any, features: Sequence[Feature], row: ir.Value) -> ir.Value:
        """[T, C]: the number of each feature [K, H], for each of its channels; [T, 1] where there is one feature."""
        value = self.emit("Gather", [self._constant(name, per_feature), row], f"row_of_{name}", axis=0)
        if len(features) == 1:
            return value
        feature = np.repeat(np.arange(len(features)), [width([f]) for f in features])
        return self.emit("Gather", [value, self._constant("feature_of_channel", feature)], f"channel_{name}", axis=1)

    @cached_property
    def known(self) -> ir.Value:
        """[T, 1] bool: whether the time is a row."""
        known = self.emit("Equal", [self._times, self._nearest], "is_row", dtype=self._types.BOOL)
        ones = self._editor.ints([-1, 1])
        return self.emit("Reshape", [known, ones], "known", dtype=self._types.BOOL, shape=[self._time.size, 1])
