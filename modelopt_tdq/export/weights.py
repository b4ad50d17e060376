"""Weights: INT8, INT4 or FP8 initializers with DequantizeLinear, in place of the markers.

Codes of at most 4 bits fit two into a byte. What backends make of an INT4 tensor (measured with ONNX Runtime 1.31,
OpenVINO 2026.4 and TensorRT-RTX 1.7.1):

- INT4 -> Cast(INT8) -> DequantizeLinear ("cast"): ONNX Runtime computes the same; OpenVINO folds the Cast and keeps
  its INT8 kernels; TensorRT-RTX refuses the Cast.
- INT4 -> DequantizeLinear ("direct"): ONNX Runtime computes the same; OpenVINO computes in float; TensorRT-RTX stores
  INT4 in the engine, and turns it into INT8 in front of each matrix product at run time, one kernel more; it fails to
  build convolutions, and refuses an odd number of codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from modelopt_tdq.errors import require
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.markers import DOMAIN, WEIGHT_MARKER
from modelopt_tdq.export.spec import QuantizationSpec, WeightSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PACKINGS", "LoweredWeight", "PackWeights", "lower_weights", "marker_name", "weights_form"]

#: How codes of at most 4 bits are stored.
PackWeights = Literal["none", "cast", "direct"]
PACKINGS = ("none", "cast", "direct")


@dataclass(frozen=True)
class LoweredWeight:
    """A quantized weight as it is in the graph.

    Attributes:
        spec: The quantizer.
        transposed: Whether the graph holds [in, out] instead of torch's [out, in].
        packed: Whether two codes share a byte.
    """

    spec: WeightSpec
    transposed: bool
    packed: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the codes in the file."""
        size = self.spec.size
        return (size + 1) // 2 if self.packed else size

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


def _is_packed(spec: WeightSpec, users: set[str], pack: PackWeights) -> bool:
    if not spec.fits_int4 or pack == "none":
        return False
    return pack == "cast" or (users <= {"MatMul", "Gemm"} and spec.size % 2 == 0)


def _dequantized(
    editor: GraphEditor, anchor: ir.Node, spec: WeightSpec, transpose: bool, pack: PackWeights
) -> ir.Value:
    """The weight in float32; ``pack`` is "none" unless the codes go into an INT4 tensor.

    The channels of a matrix [in, out] are on axis -1, and an integer one has a scale for each: ONNX Runtime would
    multiply by a single scale, or by one per channel of axis 1, in a kernel that quantizes the other operand too.
    """
    types = editor.ir.DataType
    kind = types.FLOAT8E4M3FN if spec.is_fp8 else types.INT8
    held = kind if pack == "none" else types.INT4

    def codes() -> Any:
        found = np.ascontiguousarray(spec.codes.T if transpose else spec.codes).view(kind.numpy())
        return found if held == kind else found.astype(held.numpy())

    shape = spec.shape[::-1] if transpose else spec.shape
    axis, scale = spec.axis if spec.axis is None or not transpose else 1 - spec.axis, spec.scale
    if len(shape) == 2 and axis is None and not spec.is_fp8:
        axis, scale = 1, np.full(shape[1], scale)
    attributes: dict[str, Any] = {} if axis is None else {"axis": -1 if len(shape) == 2 and axis == 1 else axis}
    value = editor.lazy(f"{spec.name}/codes", shape, held, codes)
    if pack == "cast":
        value = editor.cast(anchor, value, types.INT8, f"{spec.name}/unpacked")
    inputs = [
        value,
        editor.constant(f"{spec.name}/scale", scale),
        editor.constant("zero_point", np.zeros(scale.shape, dtype=(held if pack == "direct" else kind).numpy())),
    ]
    return cast(
        "ir.Value",
        editor.before(anchor, "DequantizeLinear", inputs, f"{spec.name}/dequantized", shape=shape, **attributes),
    )


def lower_weights(
    editor: GraphEditor, spec: QuantizationSpec, pack: PackWeights = "none"
) -> dict[ir.Value, LoweredWeight]:
    """Replace the weight markers.

    A Transpose of a linear layer's weight is applied to the codes.

    Args:
        editor: Of the graph.
        spec: The quantizers.
        pack: How codes of at most 4 bits are stored; see above. With "direct", those that TensorRT cannot take are
            not packed.

    Returns:
        The quantized weight behind each new value.
    """
    lowered: dict[ir.Value, LoweredWeight] = {}
    for marker in [n for n in editor.graph if n.domain == DOMAIN and n.op_type == WEIGHT_MARKER]:
        old = marker.outputs[0]
        transposed, other = _uses(old)
        for transpose, replaced in ((True, transposed), (False, [old] if other else [])):
            if replaced:
                new = _lower(editor, marker, spec, replaced, transpose, pack, lowered)
                for value in replaced:
                    editor.replace(value, new)
    return lowered


def _lower(
    editor: GraphEditor,
    marker: ir.Node,
    spec: QuantizationSpec,
    replaced: list[ir.Value],
    transpose: bool,
    pack: PackWeights,
    lowered: dict[ir.Value, LoweredWeight],
) -> ir.Value:
    name, dtype = marker_name(marker), marker.outputs[0].dtype
    if name in spec.folded:
        compute, held = spec.folded[name][0], editor.ir.DataType.FLOAT if dtype is None else dtype
        shape = () if marker.outputs[0].shape is None else marker.outputs[0].shape.numpy()

        def values() -> Any:
            found = compute().astype(held.numpy())
            return np.ascontiguousarray(found.T) if transpose else found

        return editor.lazy(f"{name}/values", shape[::-1] if transpose else shape, held, values)
    weight = spec.weights[name]
    packed = _is_packed(weight, {node.op_type for old in replaced for node, _ in old.uses()}, pack)
    new = _dequantized(editor, marker, weight, transpose, pack if packed else "none")
    value = editor.cast(marker, new, dtype, f"{name}/output")
    lowered[new] = lowered[value] = LoweredWeight(weight, transpose, packed)
    return value


def weights_form(weights: Iterable[LoweredWeight]) -> str:
    """What the quantized weights take, and what they would take packed."""
    every = list(weights)
    total, packed = sum(w.nbytes for w in every), sum(w.nbytes for w in every if w.packed)
    loose = sum(w.nbytes for w in every if w.spec.fits_int4 and not w.packed)
    text = f"{total:,} bytes of codes" if every else ""
    if packed:
        text += f", {packed:,} of them two codes to a byte"
    if loose:
        text += f", {loose:,} of them codes of at most 4 bits in INT8 tensors: the saving of half is lost"
    return text
