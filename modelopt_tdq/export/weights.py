"""Weights: INT8 or FP8 initializers with DequantizeLinear, in place of the markers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.errors import require
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.markers import DOMAIN, WEIGHT_MARKER
from modelopt_tdq.export.spec import QuantizationSpec, WeightSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LoweredWeight", "lower_weights", "marker_name"]


@dataclass(frozen=True)
class LoweredWeight:
    """A quantized weight as it is in the graph.

    Attributes:
        spec: The quantizer.
        transposed: Whether the graph holds [in, out] instead of torch's [out, in].
    """

    spec: WeightSpec
    transposed: bool

    def values(self) -> Any:
        """float64, in the layout of the graph: codes times scale."""
        spec = self.spec
        codes = spec.codes.view(require("ml_dtypes", "onnx").float8_e4m3fn) if spec.is_fp8 else spec.codes
        shape = [1] * codes.ndim
        if spec.axis is not None:
            shape[spec.axis] = -1
        values = codes.astype(np.float64) * spec.scale.astype(np.float64).reshape(shape)
        return values.T if self.transposed else values


def marker_name(node: ir.Node) -> str:
    """The quantizer that a marker stands for."""
    return str(node.attributes["quantizer"].as_string())


def _uses(value: ir.Value) -> tuple[list[ir.Value], bool]:
    """The outputs of the Transposes [1, 0] that use ``value``, and whether something else uses it too."""
    transposed, other = [], value.is_graph_output()
    for node, _ in value.uses():
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
            transposed.append(node.outputs[0])
        else:
            other = True
    return transposed, other


def _dequantized(editor: GraphEditor, anchor: ir.Node, spec: WeightSpec, transpose: bool) -> ir.Value:
    types = editor.ir.DataType
    codes = np.ascontiguousarray(spec.codes.T) if transpose else spec.codes
    codes = codes.view(types.FLOAT8E4M3FN.numpy()) if spec.is_fp8 else codes
    axis = spec.axis if spec.axis is None or not transpose else 1 - spec.axis
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    inputs = [
        editor.constant(f"{spec.name}/codes", codes),
        editor.constant(f"{spec.name}/scale", spec.scale),
        editor.constant("zero_point", np.zeros(spec.scale.shape, dtype=codes.dtype)),
    ]
    value: ir.Value = editor.before(
        anchor, "DequantizeLinear", inputs, f"{spec.name}/dequantized", shape=codes.shape, **attributes
    )
    return value


def lower_weights(editor: GraphEditor, spec: QuantizationSpec) -> dict[ir.Value, LoweredWeight]:
    """Replace the weight markers.

    A Transpose of a linear layer's weight is applied to the codes.

    Returns:
        The quantized weight behind each new value.
    """
    lowered: dict[ir.Value, LoweredWeight] = {}
    for marker in [n for n in editor.graph if n.domain == DOMAIN and n.op_type == WEIGHT_MARKER]:
        old = marker.outputs[0]
        transposed, other = _uses(old)
        for transpose, replaced in ((True, transposed), (False, [old] if other else [])):
            if replaced:
                new = _lower(editor, marker, spec, transpose, lowered)
                for value in replaced:
                    editor.replace(value, new)
    return lowered


def _lower(
    editor: GraphEditor,
    marker: ir.Node,
    spec: QuantizationSpec,
    transpose: bool,
    lowered: dict[ir.Value, LoweredWeight],
) -> ir.Value:
    name, dtype = marker_name(marker), marker.outputs[0].dtype
    if name in spec.folded:
        values = spec.folded[name][0]
        values = np.ascontiguousarray(values.T) if transpose else values
        return editor.constant(f"{name}/values", values.astype(np.float32 if dtype is None else dtype.numpy()))
    weight = spec.weights[name]
    new = _dequantized(editor, marker, weight, transpose)
    value = editor.cast(marker, new, dtype, f"{name}/output")
    lowered[new] = lowered[value] = LoweredWeight(weight, transpose)
    return value
