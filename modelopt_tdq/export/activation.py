"""One activation quantizer in standard operators: from values to codes, and from codes to values.

The codes equal those of :func:`modelopt_tdq.core.fake_quant.quantize` bit for bit:

- A scale that is the quantizer's own operand of QuantizeLinear: the operator divides, rounds half to
  even and saturates, as the definition does.
- Dividing first and quantizing with scale 1 is the same arithmetic in two steps.
- Below 8 bits the range of the codes is smaller than that of INT8, and a Clip makes up for it. After a
  Div it clips the quotient to [qmin, qmax]. In front of QuantizeLinear(s) it clips the value to
  [fl(qmin s), fl(qmax s)]: division and rounding are monotone and fl(q s) / s rounds to q, so values
  outside get qmin or qmax as they should, and values inside are not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.lookup import Lookup, reference_scale
from modelopt_tdq.export.spec import ActivationSpec
from modelopt_tdq.model.token_times import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CODES_SUFFIX", "ActivationEmitter"]

#: The tensor of codes is called "<quantizer>/codes" (numbered if the layer runs more than once).
CODES_SUFFIX = "/codes"


class Shifts(Protocol):
    """What is added to the offsets of the channels of activations."""

    def offset(self, emitter: ActivationEmitter, quantity: str) -> ir.Value:
        """The "offset" or "dequant_offset" of each channel, to broadcast against the activation."""


class ActivationEmitter:
    """Emits the nodes of one marker, in front of it.

    Args:
        editor: Of the graph.
        lookup: The scales.
        spec: The quantizer.
        marker: Its node in the marker graph.
        layout: Where the times are in the activation, where they are per sample or token.
        shifts: Of its channels; None: there are none.
    """

    def __init__(
        self,
        editor: GraphEditor,
        lookup: Lookup,
        spec: ActivationSpec,
        marker: ir.Node,
        layout: Layout,
        shifts: Shifts | None = None,
    ) -> None:
        self.shifts = shifts
        self.editor, self.lookup, self.spec, self.marker, self.layout = editor, lookup, spec, marker, layout
        self.input = cast("ir.Value", marker.inputs[0])
        self.shape = self.input.shape
        self.rank = len(self.input.shape or ())

    def _emit(self, op_type: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
        value: ir.Value = self.editor.before(
            self.marker, op_type, inputs, f"{self.spec.name}/{suffix}", shape=self.shape
        )
        return value

    def quantity(self, name: str) -> ir.Value:
        """The scale, ratio or offset, to broadcast against the activation; an offset with its channel's shift."""
        if self.shifts is not None and name in ("offset", "dequant_offset"):
            return self.shifts.offset(self, name)
        return self.lookup.value(self.spec.name, name, self.rank, self.layout)

    @property
    def temporal_values(self) -> bool:
        """Whether the scale that turns codes back depends on time."""
        return self.lookup.is_temporal(self.spec.name, "dequant_scale", "ratio")

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

    def codes(self, *, constant_scale: bool) -> ir.Value:
        """From values to codes.

        Args:
            constant_scale: A scale that depends on time divides in front of QuantizeLinear, whose own
                scale is then the constant 1. Otherwise it is an operand of QuantizeLinear. Scales of channels always
                divide in front.
        """
        editor, spec = self.editor, self.spec
        x = editor.cast(self.marker, self.input, editor.ir.DataType.FLOAT, f"{spec.name}/float32")
        if spec.offset is not None or self.shifts is not None:
            x = self._emit("Sub", [x, self.quantity("offset")], "centered")
        low, high = spec.code_range
        temporal = self.lookup.is_temporal(spec.name, "scale")
        if not temporal and spec.divisor is None:
            scale = self.quantity("scale")
            if spec.needs_clip:
                bound = self.lookup.constant(spec.name, "scale")
                limits = [self._scalar(f"{spec.name}/limit", np.float32(q) * bound) for q in (low, high)]
                x = self._emit("Clip", [x, *limits], "clipped")
            return self._quantize(x, scale)
        if constant_scale or spec.needs_clip or self.lookup.per_sample or spec.divisor is not None:
            x = self._emit("Div", [x, self.quantity("scale")], "quotient")
            if spec.needs_clip:
                x = self._emit("Clip", [x, self._scalar("limit", low), self._scalar("limit", high)], "clipped")
            return self._quantize(x, self._scalar("one", 1.0))
        return self._quantize(x, self.lookup.value(spec.name, "scale", 1))

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

    def operand(self, *, constant_scale: bool = True) -> ir.Value:
        """The codes times a constant scale, in float32: s', or s_ref where s' depends on time.

        Args:
            constant_scale: See :meth:`codes`. If not, an s' that depends on time is an operand of
                DequantizeLinear (1 where times are per sample).
        """
        codes = self.codes(constant_scale=constant_scale)
        if not self.temporal_values:
            scale = self.quantity("dequant_scale")
        elif constant_scale:
            scale = self._scalar(f"{self.spec.name}/reference_scale", reference_scale(self.spec))
        elif self.lookup.per_sample:
            scale = self._scalar("one", 1.0)
        else:
            scale = self.lookup.value(self.spec.name, "dequant_scale", 1)
        return self._emit("DequantizeLinear", [codes, scale, self._zero_point(scale)], "dequantized")

    def in_place(self, *, constant_scale: bool) -> ir.Value:
        """The fake-quantized activation itself, in the dtype of the model. For ``constant_scale`` see :meth:`codes`."""
        x = self.operand(constant_scale=constant_scale)
        if self.temporal_values and constant_scale:
            x = self._emit("Mul", [x, self.quantity("ratio")], "scaled")
        elif self.temporal_values and self.lookup.per_sample:
            x = self._emit("Mul", [x, self.quantity("dequant_scale")], "scaled")
        if self.spec.moves_values:
            x = self._emit("Add", [x, self.quantity("dequant_offset")], "value")
        dtype = self.marker.outputs[0].dtype
        return x if dtype is None else self.editor.cast(self.marker, x, dtype, f"{self.spec.name}/output")
