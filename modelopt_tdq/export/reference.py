"""Lowering "reference": every activation marker becomes QuantizeLinear and DequantizeLinear in its place.

A scale that depends on time is a Gather'ed operand of both. Standard operators only; the numeric
yardstick. QuantizeLinear takes one scale per tensor, so times per sample divide and multiply around a
scale of 1 instead. Corrections of layers' outputs are a Mul and an Add, shifts of channels part of the offsets.
"""

from __future__ import annotations

from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.layer_correction import add_in_place, corrections, lower_correction
from modelopt_tdq.export.shift import GraphShifts, all_channel_rows
from modelopt_tdq.export.weights import marker_name

__all__ = ["lower_reference"]


def lower_reference(context: LoweringContext) -> None:
    """Replace all activation markers of the graph."""
    shift_rows, rows = all_channel_rows(context)
    shifts, markers = GraphShifts(context, shift_rows), corrections(context.editor.graph)
    emitters = [shifts.emitter(marker) for marker in context.markers()]
    for emitter in emitters:
        shifts.add(emitter, "offset", "dequant_offset")
    for marker in markers:
        add_in_place(rows, marker, context.spec.corrections[marker_name(marker)])
    for some in {id(rows): rows, id(shift_rows): shift_rows}.values():
        some.emit()
    for emitter in emitters:
        context.editor.replace(emitter.marker.outputs[0], emitter.in_place(constant_scale=False))
        context.quantized(emitter.spec.name)
    for marker in markers:
        lower_correction(context, rows, marker)
