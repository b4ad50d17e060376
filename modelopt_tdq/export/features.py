"""Temporal features in the graph: one packed table for all layers, of which the row of the time is taken.

    Gather(codes [K, C], row) -> Cast -> Mul(scale) -> Add(offset) -> Cast -> Expand -> Split -> a tensor per layer
    Gather(scale [K, H], row) -> Gather(feature of each channel [C]), and likewise the offset

The number of nodes does not depend on the number H of layers. The row is the one that the scales take, and the
arithmetic that of :mod:`modelopt_tdq.temporal_features.lookup`, operator by operator. Nothing uses the layers any more,
nor what was upstream of them, so they leave the graph; with the policy "exact" they stay, for times that are no rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.markers import DOMAIN, FEATURE_MARKER
from modelopt_tdq.temporal_features.feature import Feature
from modelopt_tdq.temporal_features.table import FeatureTable

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_features"]


def lower_features(context: LoweringContext) -> None:
    """Replace all feature markers of the graph.

    Raises:
        TdqError: Times are per sample, and a layer's batch is no multiple of their number.
    """
    table = context.spec.features
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
    lookup = _FeatureLookup(context, table)
    for pack in packs.values():
        forms = {_form(context, marker) for name in pack for marker in markers[name]}
        value = lookup.values(pack)
        if len(forms) == 1:  # as a rule: one Cast and one Expand for all
            value = lookup.in_form(value, next(iter(forms)))
        for name, part in lookup.split(value, pack).items():
            for marker in markers[name]:
                whole = part if len(forms) == 1 else lookup.in_form(part, _form(context, marker))
                whole = lookup.shaped(whole, pack[name].row_shape, name)
                context.editor.replace(marker.outputs[0], lookup.chosen(whole, pack[name].row_shape, name, marker))
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


class _FeatureLookup:
    """Emits the nodes that all features share, in front of the graph.

    Args:
        context: Of the lowering.
        table: Of the features.
    """

    def __init__(self, context: LoweringContext, table: FeatureTable) -> None:
        self._context, self._table = context, table
        self._editor, self._time = context.editor, context.lookup.time
        self._types = context.editor.ir.DataType
        self._constants: dict[str, ir.Value] = {}

    def _emit(self, op_type: str, inputs: list[ir.Value], name: str, **keywords: Any) -> ir.Value:
        value: ir.Value = self._editor.before(self._time.anchor, op_type, inputs, f"features/{name}", **keywords)
        return value

    def _cast(self, value: ir.Value, dtype: Any, name: str) -> ir.Value:
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
        return self._emit("Reshape", [self._time.column, self._editor.ints([-1])], "times", shape=[self._time.size])

    @cached_property
    def _nearest(self) -> ir.Value:
        """[T] float32: the times of the rows."""
        return self._emit("Gather", [self._timesteps, self._time.row], "nearest", axis=0)

    @cached_property
    def _neighbours(self) -> list[tuple[ir.Value, ir.Value]]:
        """The rows below and above the time, [T] int64, each with its share, [T, 1] float32."""
        before = self._emit("Less", [self._times, self._nearest], "before", dtype=self._types.BOOL)
        before = self._cast(before, self._types.FLOAT, "before_float")
        count = self._emit("Sub", [self._time.count, before], "rows_below")
        count = self._emit("Clip", [count, self._number(0.0), self._number(len(self._table) - 2.0)], "lower_count")
        lower = self._cast(count, self._types.INT64, "lower")
        upper = self._cast(self._emit("Add", [count, self._number(1.0)], "upper_count"), self._types.INT64, "upper")
        below, above = (self._emit("Gather", [self._timesteps, row], "neighbour", axis=0) for row in (lower, upper))
        passed, width = self._emit("Sub", [self._times, below], "passed"), self._emit("Sub", [above, below], "width")
        share = self._emit("Div", [passed, width], "passed_share")
        share = self._emit("Clip", [share, self._number(0.0), self._number(1.0)], "share")
        share = self._emit("Reshape", [share, self._editor.ints([-1, 1])], "upper_share")
        return [(lower, self._emit("Sub", [self._number(1.0), share], "lower_share")), (upper, share)]

    def values(self, pack: dict[str, Feature]) -> ir.Value:
        """[T, C] float32: features of one kind of storage, side by side."""
        features = list(pack.values())
        if self._table.outside != "linear" or len(self._table) == 1:
            return self._taken(features, self._time.row)
        parts = [self._emit("Mul", [self._taken(features, r), share], "part") for r, share in self._neighbours]
        return self._emit("Add", parts, "interpolated", shape=[self._time.size, _width(features)])

    def _taken(self, features: list[Feature], row: ir.Value) -> ir.Value:
        """[T, C] float32: the values in these rows [T]."""
        packed = np.concatenate([f.rows.data.numpy().reshape(len(f), -1) for f in features], 1)
        kind = "codes" if packed.dtype == np.int8 else f"values_{packed.dtype}"
        data, shape = self._constant(kind, packed), [self._time.size, _width(features)]
        value = self._emit("Gather", [data, row], f"row_of_{kind}", dtype=data.dtype, shape=shape, axis=0)
        value = self._cast(value, self._types.FLOAT, f"{kind}_float")
        if packed.dtype != np.int8:
            return value
        scale = np.stack([f.arrays()["scale"].numpy() for f in features], 1)
        value = self._emit("Mul", [value, self._per_channel("scale", scale, features, row)], "scaled", shape=shape)
        if all(f.offset is None for f in features):
            return value
        offset = np.stack([np.zeros(len(f), np.float32) if f.offset is None else f.offset.numpy() for f in features], 1)
        return self._emit(
            "Add", [value, self._per_channel("offset", offset, features, row)], "dequantized", shape=shape
        )

    def _per_channel(self, name: str, per_feature: Any, features: list[Feature], row: ir.Value) -> ir.Value:
        """[T, C]: the number of each feature [K, H], for each of its channels; [T, 1] where there is one feature."""
        value = self._emit("Gather", [self._constant(name, per_feature), row], f"row_of_{name}", axis=0)
        if len(features) == 1:
            return value
        feature = np.repeat(np.arange(len(features)), [_width([f]) for f in features])
        return self._emit("Gather", [value, self._constant("feature_of_channel", feature)], f"channel_{name}", axis=1)

    def in_form(self, value: ir.Value, form: _Form) -> ir.Value:
        """[T, C] float32 -> [rows, C] in the type of the layer."""
        return self._expanded(self._cast(value, form.dtype, "output"), form)

    def _expanded(self, value: ir.Value, form: _Form) -> ir.Value:
        """[T, C] -> [rows, C], of any type."""
        editor, width = self._editor, value.shape[1] if value.shape is not None else None
        if self._time.size != 1 and form.repeats > 1:
            value = self._emit("Unsqueeze", [value, editor.ints([1])], "column", dtype=value.dtype)
            value = self._emit("Expand", [value, editor.ints([1, form.repeats, 1])], "repeated", dtype=value.dtype)
            return self._emit("Flatten", [value], "rows", dtype=value.dtype, shape=[form.rows, width], axis=2)
        if self._time.size != 1 or form.rows == 1:
            return value
        shape = editor.ints([form.rows, 1]) if form.rows is not None else self._dynamic_shape(form.repeats)
        return self._emit("Expand", [value, shape], "rows", dtype=value.dtype, shape=[form.rows, width])

    def _dynamic_shape(self, repeats: int) -> ir.Value:
        """[2] int64: the dynamic batch, as often as a layer's batch holds it; and 1."""
        types = self._types
        sample = next(v for v in self._editor.graph.inputs if v.shape and not isinstance(v.shape[0], int))
        batch = self._emit("Shape", [sample], "batch", dtype=types.INT64, shape=[1], start=0, end=1)
        if repeats > 1:
            batch = self._emit("Mul", [batch, self._editor.ints([repeats])], "batches", dtype=types.INT64, shape=[1])
        return self._emit("Concat", [batch, self._editor.ints([1])], "shape", dtype=types.INT64, shape=[2], axis=0)

    def split(self, value: ir.Value, pack: dict[str, Feature]) -> dict[str, ir.Value]:
        """[rows, C] -> a part [rows, C_h] per layer."""
        if len(pack) == 1:
            return dict.fromkeys(pack, value)
        sizes, editor = [_width([f]) for f in pack.values()], self._editor
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
        return self._emit("Reshape", [value, shape], f"{name}/shaped", dtype=value.dtype)

    @cached_property
    def _known(self) -> ir.Value:
        """[T, 1] bool: whether the time is a row."""
        known = self._emit("Equal", [self._times, self._nearest], "is_row", dtype=self._types.BOOL)
        ones = self._editor.ints([-1, 1])
        return self._emit("Reshape", [known, ones], "known", dtype=self._types.BOOL, shape=[self._time.size, 1])

    def chosen(self, value: ir.Value, row_shape: tuple[int, ...], name: str, marker: ir.Node) -> ir.Value:
        """The looked-up value; with "exact", what the layer computed where the time is no row."""
        own, bools = marker.inputs[0], self._types.BOOL
        if self._table.outside != "exact" or own is None:
            return value
        known = self._known
        if self._time.size != 1:
            known = self._expanded(known, _form(self._context, marker))
        if len(row_shape) != 1:
            ones = self._editor.ints([-1] + [1] * len(row_shape))
            known = self._emit("Reshape", [known, ones], f"{name}/known", dtype=bools)
        chosen: ir.Value = self._editor.before(
            marker, "Where", [known, value, own], f"{name}/feature_or_output", dtype=value.dtype, shape=own.shape
        )
        return chosen


def _width(features: list[Feature]) -> int:
    return sum(math.prod(f.row_shape) for f in features)
