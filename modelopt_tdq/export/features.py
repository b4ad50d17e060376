"""Temporal features in the graph: one packed table for all layers, of which the row of the time is taken.

    the row of the time [T, C] -> Cast -> Expand to the batch -> Split, one part per layer

Nothing uses the layers any more, nor what was upstream of them, so they leave the graph; with the policy "exact" they
stay, for times that are no rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import TimeRow
from modelopt_tdq.export.markers import DOMAIN, FEATURE_MARKER
from modelopt_tdq.temporal_features.feature import Feature
from modelopt_tdq.temporal_features.table import FeatureTable

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FeatureRows", "lower_features", "width"]


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


def lower_features(context: LoweringContext, *, gather_int8: bool) -> None:
    """Replace all feature markers of the graph.

    Args:
        context: Of the lowering.
        gather_int8: Whether the backend looks up INT8 values. TensorRT takes INT8 constants only in front of
            DequantizeLinear, which then makes halves of the codes: these hold them exactly.

    Raises:
        TdqError: Times are per sample, and a layer's batch is no multiple of their number.
    """
    table = context.spec.features
    if table is not None and context.token_times is not None:
        raise TdqError(
            "sample_inputs",
            context.token_times.shape,
            "temporal features are looked up for one time per sample, and samples have several",
            "Pass sample inputs with the same time for all tokens and frames of a sample",
        )
    markers: dict[str, list[ir.Node]] = defaultdict(list)
    for node in context.editor.graph:
        if node.domain == DOMAIN and node.op_type == FEATURE_MARKER:
            markers[str(node.attributes["feature"].as_string())].append(node)
    if table is None or not markers:
        return
    packs: dict[Any, dict[str, Feature]] = defaultdict(dict)
    for name in (n for n in table.features if n in markers):
        feature = table.features[name]
        packs[feature.rows.data.dtype][name] = feature
    placed = _Placed(context, table, gather_int8)
    for pack in packs.values():
        forms = {_form(context, marker) for name in pack for marker in markers[name]}
        value = placed.rows.values(list(pack.values()))
        if len(forms) == 1:  # as a rule: one Cast and one Expand for all
            value = placed.in_form(value, next(iter(forms)))
        for name, part in placed.split(value, pack).items():
            for marker in markers[name]:
                whole = part if len(forms) == 1 else placed.in_form(part, _form(context, marker))
                whole = placed.shaped(whole, pack[name].row_shape, name)
                context.editor.replace(marker.outputs[0], placed.chosen(whole, pack[name].row_shape, name, marker))
    context.features += [name for name in table.features if name in markers]


class _Form(NamedTuple):
    """What a layer's output looks like.

    Attributes:
        dtype: Its type.
        rows: Its batch; None where that is dynamic.
        repeats: How often its batch holds each time, or where one time serves all, each sample.
    """

    dtype: Any
    rows: int | None
    repeats: int


def _form(context: LoweringContext, marker: ir.Node) -> _Form:
    output = marker.outputs[0]
    size = output.shape[0] if output.shape is not None else None
    name = str(marker.attributes["feature"].as_string())
    rows = size if isinstance(size, int) else None
    seen = size if isinstance(size, int) else max(shape[0] for shape in context.shapes[name])
    unit = context.batch if rows is None and context.samples == 1 else context.samples
    if seen % unit:
        raise TdqError(
            "sample_inputs",
            name,
            f"{unit} times or samples cannot be matched with the {seen} rows of this temporal feature",
            "Pass one time for the whole batch, or one per sample",
        )
    return _Form(output.dtype, rows, seen // unit)


class _Placed:
    """Features as the layers would have given them.

    Args:
        context: Of the lowering.
        table: Of the features.
        gather_int8: See :func:`lower_features`.
    """

    def __init__(self, context: LoweringContext, table: FeatureTable, gather_int8: bool) -> None:
        self._context, self._outside = context, table.outside
        self._editor, self._time = context.editor, context.lookup.time
        self._types = context.editor.ir.DataType
        self.rows = FeatureRows(self._editor, self._time, table, gather_int8)

    def in_form(self, value: ir.Value, form: _Form) -> ir.Value:
        """[T, C] float32 -> [rows, C] in the type of the layer."""
        return self._expanded(self.rows.cast(value, form.dtype, "output"), form)

    def _expanded(self, value: ir.Value, form: _Form) -> ir.Value:
        """[T, C] -> [rows, C], of any type."""
        editor, width = self._editor, value.shape[1] if value.shape is not None else None
        if self._time.size != 1 and form.repeats > 1:
            value = self.rows.emit("Unsqueeze", [value, editor.ints([1])], "column", dtype=value.dtype)
            value = self.rows.emit("Expand", [value, editor.ints([1, form.repeats, 1])], "repeated", dtype=value.dtype)
            return self.rows.emit("Flatten", [value], "rows", dtype=value.dtype, shape=[form.rows, width], axis=2)
        if self._time.size != 1 or form.rows == 1:
            return value
        shape = editor.ints([form.rows, 1]) if form.rows is not None else self._dynamic_shape(form.repeats)
        return self.rows.emit("Expand", [value, shape], "rows", dtype=value.dtype, shape=[form.rows, width])

    def _dynamic_shape(self, repeats: int) -> ir.Value:
        """[2] int64: the dynamic batch, as often as a layer's batch holds it; and 1."""
        types = self._types
        sample = next(v for v in self._editor.graph.inputs if v.shape and not isinstance(v.shape[0], int))
        batch = self.rows.emit("Shape", [sample], "batch", dtype=types.INT64, shape=[1], start=0, end=1)
        if repeats > 1:
            batch = self.rows.emit(
                "Mul", [batch, self._editor.ints([repeats])], "batches", dtype=types.INT64, shape=[1]
            )
        return self.rows.emit("Concat", [batch, self._editor.ints([1])], "shape", dtype=types.INT64, shape=[2], axis=0)

    def split(self, value: ir.Value, pack: dict[str, Feature]) -> dict[str, ir.Value]:
        """[rows, C] -> a part [rows, C_h] per layer."""
        if len(pack) == 1:
            return dict.fromkeys(pack, value)
        sizes, editor = [width([f]) for f in pack.values()], self._editor
        parts: list[ir.Value] = editor.before(
            self._time.anchor,
            "Split",
            [value, editor.ints(sizes)],
            "features/part",
            dtype=value.dtype,
            outputs=len(sizes),
            axis=1,
        )
        for name, part, size in zip(pack, parts, sizes, strict=True):
            part.name = editor.unique(f"{name}/feature")
            part.shape = editor.ir.Shape([value.shape[0] if value.shape is not None else None, size])
        return dict(zip(pack, parts, strict=True))

    def shaped(self, value: ir.Value, row_shape: tuple[int, ...], name: str) -> ir.Value:
        """[rows, C_h] -> [rows, ...]."""
        if len(row_shape) == 1:
            return value
        shape = self._editor.ints([-1, *row_shape])
        return self.rows.emit("Reshape", [value, shape], f"{name}/shaped", dtype=value.dtype)

    def chosen(self, value: ir.Value, row_shape: tuple[int, ...], name: str, marker: ir.Node) -> ir.Value:
        """The looked-up value; with "exact", what the layer computed where the time is no row."""
        own, output, bools = marker.inputs[0], marker.outputs[0], self._types.BOOL
        if self._outside != "exact" or own is None:
            if output.is_graph_output():  # which has a shape and a name of its own
                value = self._editor.before(
                    marker, "Identity", [value], f"{name}/output", dtype=value.dtype, shape=output.shape
                )
            return value
        known = self.rows.known
        if self._time.size != 1:
            known = self._expanded(known, _form(self._context, marker))
        if len(row_shape) != 1:
            ones = self._editor.ints([-1] + [1] * len(row_shape))
            known = self.rows.emit("Reshape", [known, ones], f"{name}/known", dtype=bools)
        chosen: ir.Value = self._editor.before(
            marker, "Where", [known, value, own], f"{name}/feature_or_output", dtype=value.dtype, shape=own.shape
        )
        return chosen
