"""Temporal features in the graph: one packed table for all layers, of which the row of the time is taken.

    the row of the time [T, C] -> Cast -> Expand to the batch -> Split, one part per layer

Nothing uses the layers any more, nor what was upstream of them, so they leave the graph; with the policy "exact" they
stay, for times that are no rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.feature_rows import FeatureRows, width
from modelopt_tdq.export.markers import DOMAIN, FEATURE_MARKER
from modelopt_tdq.temporal_features.feature import Feature
from modelopt_tdq.temporal_features.table import FeatureTable

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_features"]


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
