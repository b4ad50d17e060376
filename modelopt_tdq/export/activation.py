"""One activation quantizer in standard operators: from values to codes, and from codes to values.

The codes equal those of :func:`modelopt_tdq.fake_quant.quantize` bit for bit:

- A scale that is the quantizer's own operand of QuantizeLinear: the operator divides, rounds half to
  even and saturates, as the definition does.
- Dividing first and quantizing with scale 1 is the same arithmetic in two steps.
- Below 8 bits the range of the codes is smaller than that of INT8, and a Clip makes up for it. After a
  Div it clips the quotient to [qmin, qmax]. In front of QuantizeLinear(s) it clips the value to
  [fl(qmin s), fl(qmax s)]: division and rounding are monotone and fl(q s) / s rounds to q, so values
  outside get qmin or qmax as they should, and values inside are not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import Lookup
from modelopt_tdq.export.spec import ActivationSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CODES_SUFFIX", "ActivationEmitter"]

#: The tensor of codes is called "<quantizer>/codes" (numbered if the layer runs more than once).
CODES_SUFFIX = "/codes"


class ActivationEmitter:
    """Emits the nodes of one marker, in front of it.

    Args:
        editor: Of the graph.
        lookup: The scales.
        spec: The quantizer.
        marker: Its node in the marker graph.
        fold: Rows of the activation that belong to one sample, where times are per sample.
    """

    def __init__(self, editor: GraphEditor, lookup: Lookup, spec: ActivationSpec, marker: ir.Node, fold: int) -> None:
        self.editor, self.lookup, self.spec, self.marker, self.fold = editor, lookup, spec, marker, fold
        self.input = cast("ir.Value", marker.inputs[0])
        self.shape = self.input.shape
        self.rank = len(self.input.shape or ())

    def _emit(self, op_type: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
        value: ir.Value = self.editor.before(
            self.marker, op_type, inputs, f"{self.spec.name}/{suffix}", shape=self.shape
        )
        return value

    def quantity(self, name: str) -> ir.Value:
        """The scale, ratio or offset, to broadcast against the activation."""
        return self.lookup.value(self.spec.name, name, self.rank, self.fold)

    @property
    def temporal_scale(self) -> bool:
        """Whether the scale depends on time."""
        return self.lookup.is_temporal(self.spec.name, "scale")

    def _scalar(self, name: str, value: float | np.float32) -> ir.Value:
        return self.editor.constant(name, np.array(value, dtype=np.float32))

    def pad(self, pads: list[int]) -> None:
        """Pad the activation with zeros first. ``pads`` are those of a convolution (spatial axes only)."""
        half = len(pads) // 2
        full = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        self.shape = None
        self.input = self.editor.before(
            self.marker, "Pad", [self.input, self.editor.ints(full)], f"{self.spec.name}/padded", dtype=self.input.dtype
        )

    def codes(self, *, constant_scale: bool) -> tuple[ir.Value, ir.Value | None]:
        """From values to codes.

        Args:
            constant_scale: A scale that depends on time divides in front of QuantizeLinear, whose own
                scale is then the constant 1. Otherwise it is an operand of QuantizeLinear.

        Returns:
            The codes, and the scale operand of QuantizeLinear if that is the quantizer's whole scale,
            None if it is 1.
        """
        editor, spec = self.editor, self.spec
        x = editor.cast(self.marker, self.input, editor.ir.DataType.FLOAT, f"{spec.name}/float32")
        if spec.offset is not None:
            x = self._emit("Sub", [x, self.quantity("offset")], "centered")
        low, high = spec.code_range
        if not self.temporal_scale:
            scale = self.quantity("scale")
            if spec.needs_clip:
                bound = self.lookup.constant(spec.name, "scale")
                limits = [self._scalar(f"{spec.name}/limit", np.float32(q) * bound) for q in (low, high)]
                x = self._emit("Clip", [x, *limits], "clipped")
            return self._quantize(x, scale), scale
        if constant_scale or spec.needs_clip or self.lookup.per_sample:
            x = self._emit("Div", [x, self.quantity("scale")], "quotient")
            if spec.needs_clip:
                x = self._emit("Clip", [x, self._scalar("limit", low), self._scalar("limit", high)], "clipped")
            return self._quantize(x, self._scalar("one", 1.0)), None
        scale = self.lookup.value(spec.name, "scale", 1)
        return self._quantize(x, scale), scale

    def _zero_point(self, scale: ir.Value) -> ir.Value:
        types = self.editor.ir.DataType
        dtype = (types.FLOAT8E4M3FN if self.spec.is_fp8 else types.INT8).numpy()
        return self.editor.constant("zero_point", np.zeros([1] * len(scale.shape or ()), dtype=dtype))

    def _quantize(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        zero_point = self._zero_point(scale)
        codes: ir.Value = self.editor.before(
            self.marker,
            "QuantizeLinear",
            [x, scale, zero_point],
            self.spec.name + CODES_SUFFIX,
            dtype=zero_point.dtype,
            shape=self.shape,
        )
        return codes

    def dequantize(self, codes: ir.Value, scale: ir.Value) -> ir.Value:
        """DequantizeLinear, in float32."""
        return self._emit("DequantizeLinear", [codes, scale, self._zero_point(scale)], "dequantized")

    def in_place(self, *, constant_scale: bool) -> ir.Value:
        """The fake-quantized activation itself, in the dtype of the model."""
        codes, scale = self.codes(constant_scale=constant_scale)
        if scale is not None:
            x = self.dequantize(codes, scale)
        elif constant_scale or self.lookup.per_sample:
            x = self.dequantize(codes, self._scalar("one", 1.0))
            x = self._emit("Mul", [x, self.quantity("scale")], "scaled")
        else:
            x = self.dequantize(codes, self.lookup.value(self.spec.name, "scale", 1))
        if self.spec.offset is not None:
            x = self._emit("Add", [x, self.quantity("offset")], "value")
        dtype = self.marker.outputs[0].dtype
        return x if dtype is None else self.editor.cast(self.marker, x, dtype, f"{self.spec.name}/output")
