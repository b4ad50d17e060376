"""Lowering "plugin": the graph of "ratio", its lookup done by one node of TensorRT's plugin TdqScaleLookup.

    (s [T, Q], s / s_ref [T, Q]) = TdqScaleLookup(timestep [T], table [K, Q], timesteps [K])

A ratio is the second output's column of the scale that turns codes back; offsets are columns whose ratio nobody uses.
:func:`plugin_free` turns the node into standard operators again, for backends without the plugin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import ColumnSource, TimeRow, power_of_two, split_columns
from modelopt_tdq.export.product import constant_of
from modelopt_tdq.export.spec import QuantizationSpec
from modelopt_tdq.plugin.aot import NAME, NAMESPACE, VERSION

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["PLUGIN_DOMAIN", "looked_up_by_plugin", "plugin_free", "without_plugin"]

#: Where ONNX Runtime and ModelOpt look for nodes that are plugins of TensorRT; TensorRT itself reads the attributes.
PLUGIN_DOMAIN = "trt.plugins"

_Array = np.ndarray[Any, np.dtype[np.float32]]


def looked_up_by_plugin(spec: QuantizationSpec) -> ColumnSource:
    """The columns of ``spec``, looked up by the plugin."""

    def source(editor: GraphEditor, time: TimeRow, columns: Mapping[str, _Array]) -> dict[str, ir.Value]:
        # the column that the plugin makes a ratio of is the scale itself, which is often that of quantizing, too
        scale_of = {name: _scale(spec, name) for name in columns if name.endswith("/ratio")}
        distinct = {column.tobytes(): column for column in scale_of.values()}
        with_ratio = len(distinct)
        distinct |= {c.tobytes(): c for name, c in columns.items() if name not in scale_of}
        packed = np.stack(list(distinct.values()), axis=1)
        scales, ratios = _node(editor, time, packed, spec.timesteps)
        scale_values = dict(zip(distinct, _parts(editor, time, scales, len(distinct)), strict=True))
        ratio_values: dict[bytes, ir.Value] = {}
        if with_ratio:
            if with_ratio < len(distinct):  # offsets have none, and are the last columns
                ends = [editor.ints([n]) for n in (0, with_ratio, 1)]
                ratios = editor.before(time.anchor, "Slice", [ratios, *ends], "time/used_ratios")
            ratio_values = dict(zip(distinct, _parts(editor, time, ratios, with_ratio), strict=False))
        return {
            name: ratio_values[scale_of[name].tobytes()] if name in scale_of else scale_values[column.tobytes()]
            for name, column in columns.items()
        }

    return source


def _scale(spec: QuantizationSpec, ratio: str) -> _Array:
    return spec.activations[ratio.rpartition("/")[0]].value_scale


def _node(editor: GraphEditor, time: TimeRow, packed: _Array, timesteps: _Array) -> list[ir.Value]:
    times = editor.before(time.anchor, "Reshape", [time.column, editor.ints([-1])], "time/times", shape=[time.size])
    inputs = [
        times,
        editor.constant("time/table", np.ascontiguousarray(packed)),
        editor.constant("time/timesteps", timesteps),
    ]
    outputs: list[ir.Value] = editor.before(
        time.anchor,
        NAME,
        inputs,
        "time/lookup",
        outputs=2,
        shape=[time.size, packed.shape[1]],
        domain=PLUGIN_DOMAIN,
        plugin_namespace=NAMESPACE,
        plugin_version=VERSION,
    )
    return outputs


def _parts(editor: GraphEditor, time: TimeRow, values: ir.Value, count: int) -> list[ir.Value]:
    """[T, M] -> M values [T, 1, 1, 1]."""
    shape = [time.size, count, 1, 1]
    return split_columns(
        editor,
        time,
        editor.before(time.anchor, "Unsqueeze", [values, editor.ints([2, 3])], "time/table_row", shape=shape),
        count,
    )


def plugin_free(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in standard operators: the twin of an export with ``lowering="plugin"``, equal bit for bit.

    A function of this package and not of the file: a parser that prefers functions of the file to plugins would
    otherwise leave the plugin unused.

    Args:
        model: A file, or a model in memory, which is not changed. Weights that a file keeps beside it are read.

    Raises:
        TdqError: The model has no node of the plugin.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    ir = require("onnx_ir", "onnx")
    proto = require("onnx", "onnx").load(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model
    graph = ir.from_proto(proto)
    without_plugin(graph, str(model)[:80])
    return cast("onnx.ModelProto", ir.to_proto(graph))


def without_plugin(graph: ir.Model, shown: str) -> None:
    """:func:`plugin_free` in place; ``shown`` is what an error calls the graph."""
    nodes = [node for node in graph.graph if node.domain == PLUGIN_DOMAIN and node.op_type == NAME]
    if not nodes:
        raise TdqError("model", shown, f"it has no node {NAME}", "Export it with lowering='plugin'")
    editor = GraphEditor(graph.graph)
    for node in nodes:
        _replace(editor, node)
    graph.opset_imports.pop(PLUGIN_DOMAIN, None)
    require("onnx_ir.passes.common", "onnx").RemoveUnusedNodesPass()(graph)


def _replace(editor: GraphEditor, node: ir.Node) -> None:
    times, table, timesteps = node.inputs
    rows, stands_for = constant_of(table), constant_of(timesteps)
    if times is None or rows is None or stands_for is None:
        raise TdqError("model", node.name, "its table is computed", "Export it with lowering='plugin'")
    spec = QuantizationSpec({}, {}, {}, stands_for, None)
    size = times.shape[0] if times.shape is not None else None
    time = TimeRow(editor, spec.edges, times, size if isinstance(size, int) else None, anchor=node)
    ratios = rows / power_of_two(rows.min(0))
    for output, name, values in zip(node.outputs, ("scales", "ratios"), (rows, ratios), strict=True):
        constant = editor.constant(f"time/{name}_table", values.astype(np.float32))
        inputs, shape = [constant, time.row], [time.size, rows.shape[1]]
        editor.replace(output, editor.before(node, "Gather", inputs, f"time/{name}", shape=shape, axis=0))
    editor.graph.remove(node, safe=True)
