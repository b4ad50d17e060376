"""The table as an input of the graph: one engine for any table of the model, with any number of rows.

    tdq_table [K, M] float32   the scales, ratios and offsets that the graph looks up, side by side
    tdq_edges [K] float32      where each row's interval of time ends; the last is infinite

K is open. What a column is, is part of the file: :func:`engine_table` makes both inputs from a ScaleTable.

Ratios are columns, while s_ref stays what it was at the export, a constant. A scale below s_ref has a ratio below 1,
which is as exact; but the product in front of it is larger than behind it by 1 / ratio. That cannot hurt in float32,
in which products compute; a backend that keeps their results in float16 has that much less room.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from modelopt_tdq.core.schedule import edges
from modelopt_tdq.core.table import ScaleTable, number_format
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import ColumnSource, TimeRow, reference_scale, split_columns
from modelopt_tdq.export.markers import ACTIVATION_MARKER
from modelopt_tdq.export.spec import ActivationSpec, QuantizationSpec
from modelopt_tdq.export.weights import marker_name
from modelopt_tdq.model.model_table import checksum_of_channels, scale_table

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "EDGES_INPUT",
    "ROWS",
    "TABLE_INPUT",
    "all_rows",
    "engine_table",
    "looked_up_in_input",
    "require_table_input",
]

#: Names of the inputs, and of their open dimension.
TABLE_INPUT, EDGES_INPUT, ROWS = "tdq_table", "tdq_edges", "tdq_rows"

_METADATA = "modelopt_tdq.table"
_SCHEMA = 1

_Array = np.ndarray[Any, np.dtype[np.float32]]


def require_table_input(spec: QuantizationSpec, lowering: str) -> None:
    """Check that a table input is possible.

    Raises:
        TdqError: Another lowering than "ratio", or nothing depends on time.
    """
    if lowering != "ratio":
        raise TdqError("table_input", True, f"lowering {lowering!r} has no table input", "Use lowering='ratio'")
    if not any(name in spec.activations for name in spec.temporal) or len(spec.timesteps) == 1:
        raise TdqError(
            "table_input",
            True,
            "no scale of this model depends on time",
            "Export it without; or calibrate with bins='per_step' and keep_static_below=None",
        )


def all_rows(spec: QuantizationSpec) -> QuantizationSpec:
    """The same numbers, all those of temporal quantizers as [K], so that each becomes a column."""

    def rows(values: _Array | None) -> Any:
        return None if values is None else np.broadcast_to(values, spec.timesteps.shape).copy()

    def expanded(activation: ActivationSpec) -> ActivationSpec:
        return replace(
            activation,
            scale=rows(activation.scale),
            offset=rows(activation.offset),
            dequant_scale=rows(activation.dequant_scale),
            dequant_offset=rows(activation.dequant_offset),
        )

    activations = {n: expanded(a) if n in spec.temporal else a for n, a in spec.activations.items()}
    return replace(spec, activations=activations)


def looked_up_in_input(spec: QuantizationSpec, model: ir.Model) -> ColumnSource:
    """Columns of an input of ``model``, whose meaning becomes part of its metadata."""
    markers = [node for node in model.graph if node.op_type == ACTIVATION_MARKER]
    quantized = {marker_name(node): id(node.inputs[0]) for node in markers}

    def source(editor: GraphEditor, time: TimeRow, columns: Mapping[str, _Array]) -> dict[str, ir.Value]:
        # One column for quantizers of the same tensor with the same scales (to_q, to_k, to_v): the codes are computed
        # once. Other columns may be equal by chance, and differ in the next table.
        groups: dict[Any, list[str]] = {}
        for name, column in columns.items():
            quantizer, _, quantity = name.rpartition("/")
            groups.setdefault((quantity, quantized.get(quantizer, name), column.tobytes()), []).append(name)
        floats = editor.ir.DataType.FLOAT
        inputs = [
            editor.ir.Value(name=name, type=editor.ir.TensorType(floats), shape=editor.ir.Shape(shape))
            for name, shape in ((TABLE_INPUT, [ROWS, len(groups)]), (EDGES_INPUT, [ROWS]))
        ]
        editor.graph.inputs.extend(inputs)
        own = time.with_edges(inputs[1])
        shape = [time.size, len(groups)]
        row = editor.before(time.anchor, "Gather", [inputs[0], own.row], "time/table_row", shape=shape, axis=0)
        row = editor.before(
            time.anchor, "Unsqueeze", [row, editor.ints([2, 3])], "time/table_row_4d", shape=[*shape, 1, 1]
        )
        parts = split_columns(editor, time, row, len(groups))
        model.metadata_props[_METADATA] = json.dumps(_description(spec, list(groups.values())))
        return {name: part for names, part in zip(groups.values(), parts, strict=True) for name in names}

    return source


def _description(spec: QuantizationSpec, groups: list[list[str]]) -> dict[str, Any]:
    columns = []
    for names in groups:
        quantizers = [name.rpartition("/")[0] for name in names]
        quantity = names[0].rpartition("/")[2]
        column: dict[str, Any] = {"quantity": quantity, "quantizers": quantizers}
        if quantity == "ratio":
            column["s_ref"] = float(reference_scale(spec.activations[quantizers[0]]))
        columns.append(column)
    own = {name: spec.activations[name] for name in spec.temporal if name in spec.activations}
    return {
        "schema": _SCHEMA,
        "names": list(spec.temporal),
        "columns": columns,
        "num_bits": {name: activation.num_bits for name, activation in own.items()},
        "zero_has_a_code": [n for n, a in own.items() if a.value_offset is not None and a.zero_has_a_code],
        "channel_divisors": {
            name: _checksum_of_channels(activation, spec.shift_times)
            for name, activation in own.items()
            if activation.divisor is not None or activation.shift is not None
        },
    }


def _checksum_of_channels(activation: ActivationSpec, shift_times: _Array | None) -> int:
    """As of the quantizer that it was read from."""
    shift, times = activation.shift, None
    if shift is not None:
        times = np.zeros(1, np.float32) if shift_times is None or len(shift) == 1 else shift_times
    vectors = (None if v is None else torch.from_numpy(v) for v in (activation.divisor, shift, times))
    return checksum_of_channels(*vectors)


def engine_table(
    model: str | os.PathLike[str] | onnx.ModelProto, table: ScaleTable | nn.Module
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The inputs "tdq_table" [K, M] and "tdq_edges" [K] of a graph that was exported with ``table_input=True``.

    Args:
        model: The ONNX file that the engine was built from, or the model in memory.
        table: For all temporal quantizers of the model; or the quantized torch model, whose table is taken.

    Raises:
        TdqError: The graph has no table input; or the table has other names than the graph, was made for other
            number formats or with other smoothing of the channels, has offsets where the graph has none, different
            columns where the graph has one, or an offset that leaves the zeros of a padding without a code.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    description = _read(model)
    found = table if isinstance(table, ScaleTable) else scale_table(table)
    _check_names(description, found)
    found.require_divisors(description.get("channel_divisors", {}), description["num_bits"], "engine")
    specs = {name: _spec(description, found, name) for name in description["num_bits"]}
    columns = [_column(column, specs) for column in description["columns"]]
    offsets = {(q, c["quantity"]) for c in description["columns"] for q in c["quantizers"]}
    for name, spec in specs.items():
        for quantity, values in (("offset", spec.offset), ("dequant_offset", spec.value_offset)):
            if values is not None and (name, quantity) not in offsets:
                raise TdqError(quantity, name, "the engine has no offset for this quantizer", _EXPORT_AGAIN)
        if name in description["zero_has_a_code"] and not spec.zero_has_a_code:
            raise TdqError(
                "offset", name, "with this offset zero has no code", "Use offsets that are whole multiples of the scale"
            )
    ends = np.append(edges(found.timesteps).numpy(), np.float32(np.inf))
    return {TABLE_INPUT: np.stack(columns, axis=1), EDGES_INPUT: ends}


_EXPORT_AGAIN = "Export the model with this table, and build the engine again"


def _read(model: Any) -> dict[str, Any]:
    onnx = require("onnx", "onnx")
    shown = str(model)[:80]
    proto = onnx.load(os.fspath(model), load_external_data=False) if isinstance(model, (str, os.PathLike)) else model
    text = next((entry.value for entry in proto.metadata_props if entry.key == _METADATA), None)
    if text is None:
        raise TdqError("model", shown, "its table is no input", "Export it with lowering='ratio', table_input=True")
    description: dict[str, Any] = json.loads(text)
    if description["schema"] != _SCHEMA:
        raise TdqError("model", shown, f"its table input has schema {description['schema']}", "Export it again")
    return description


def _check_names(description: dict[str, Any], table: ScaleTable) -> None:
    cure = "Use a table made for the model and the quant_cfg that the engine was exported from"
    table.require_names(description["names"], "engine", cure)
    table.require_formats(description["num_bits"], "engine", _EXPORT_AGAIN)


def _spec(description: dict[str, Any], table: ScaleTable, name: str) -> ActivationSpec:
    scales = table.column(table.names.index(name))
    rows = [None if value is None else value.numpy() for value in scales]
    return ActivationSpec(name, number_format(description["num_bits"][name]), *rows)  # type: ignore[arg-type]


def _column(column: dict[str, Any], specs: Mapping[str, ActivationSpec]) -> _Array:
    """[K] the numbers of one column, which all its quantizers have."""
    first, *others = [_quantity(specs[name], column) for name in column["quantizers"]]
    for name, values in zip(column["quantizers"][1:], others, strict=True):
        if not np.array_equal(values, first):
            raise TdqError(
                column["quantity"],
                [column["quantizers"][0], name],
                "these quantizers of one tensor share a column of the engine, and differ in this table",
                _EXPORT_AGAIN,
            )
    if not np.isfinite(first).all():
        raise TdqError(
            "scale", column["quantizers"][0], "too large for the engine, relative to its s_ref", _EXPORT_AGAIN
        )
    return first


def _quantity(spec: ActivationSpec, column: dict[str, Any]) -> _Array:
    zeros = np.zeros_like(spec.scale)
    if column["quantity"] == "ratio":
        with np.errstate(over="ignore"):  # an error of its own
            return spec.value_scale / np.float32(column["s_ref"])
    if column["quantity"] == "dequant_offset":
        return zeros if spec.value_offset is None else spec.value_offset
    if column["quantity"] == "offset":
        return zeros if spec.offset is None else spec.offset
    return spec.scale
