"""Lowering "reference": every activation marker becomes QuantizeLinear and DequantizeLinear in its place.

A scale that depends on time is a Gather'ed operand of both. Standard operators only; the numeric
yardstick. QuantizeLinear takes one scale per tensor, so times per sample divide and multiply around a
scale of 1 instead. Corrections of layers' outputs are a Mul and an Add.
"""

from __future__ import annotations

from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.layer_correction import CorrectionRows, add_in_place, corrections, lower_correction
from modelopt_tdq.export.weights import marker_name

__all__ = ["lower_reference"]


def lower_reference(context: LoweringContext) -> None:
    """Replace all activation markers of the graph."""
    for marker in context.markers():
        spec = context.activation(marker)
        emitter = ActivationEmitter(context.editor, context.lookup, spec, marker, context.layout(marker))
        context.editor.replace(marker.outputs[0], emitter.in_place(constant_scale=False))
        context.quantized(spec.name)
    rows, markers = CorrectionRows(context), corrections(context.editor.graph)
    for marker in markers:
        add_in_place(rows, marker, context.spec.corrections[marker_name(marker)])
    rows.emit()
    for marker in markers:
        lower_correction(context, rows, marker)
