"""Behind a product of codes: what makes it the product of the values.

    product(s_ref q, w) -> Mul(s' / s_ref) -> Add(bias + o' * sum(w))

A part that does not depend on time becomes the bias of the product itself, where it has one. Where the output is
corrected over time, y <- gain * y + b, the factor is gain * s' / s_ref and the addend gain * (bias + o' * sum(w)) + b,
of each channel: two rows of :class:`~modelopt_tdq.export.layer_correction.CorrectionRows`. The nodes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.layer_correction import CorrectionRows
from modelopt_tdq.export.lookup import reference_scale
from modelopt_tdq.export.product import CONVOLUTIONS, bias_of, computes_bias, constant_of, pads_of
from modelopt_tdq.export.weights import marker_name
from modelopt_tdq.model.token_times import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Correction", "plan_correction", "rescale_product"]


@dataclass(frozen=True)
class Correction:
    """The correction behind a product.

    Attributes:
        rows: Those of the graph; ``factor``, ``addend`` and ``moved`` of the marker are among them.
        marker: Behind the product and its bias.
        parts: Of the product.
        with_ratio: Whether the factor is that of the ratio as well.
        with_offset: Whether the addend is that of the offset as well.
    """

    rows: CorrectionRows
    marker: ir.Node
    parts: _Parts
    with_ratio: bool
    with_offset: bool


class _Parts:
    """What a product of codes consists of besides the codes."""

    def __init__(self, context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter]) -> None:
        self.shifted = next((e for e in operands.values() if e.spec.value_offset is not None), None)
        self.ratios = [e for e in operands.values() if e.temporal_values]
        self.bias, self.biased = bias_of(product)
        if computes_bias(product):
            raise TdqError("model", product.name, "the bias of this operator is computed", "Use a constant bias")
        self.moving = self.shifted  # unless its offset is a constant
        if self.shifted is not None and not context.lookup.is_temporal(self.shifted.spec.name, "dequant_offset"):
            constant = context.lookup.constant(self.shifted.spec.name, "dequant_offset")
            moved = constant * _weight_sum(context, product)
            self.bias = moved if self.bias is None else self.bias + moved
            self.moving = None


def plan_correction(
    context: LoweringContext,
    rows: CorrectionRows,
    product: ir.Node,
    operands: dict[int, ActivationEmitter],
    marker: ir.Node,
) -> Correction:
    """Add the rows of a correction that depends on time, behind a product of codes.

    Ratio and offset become part of them, unless these are inputs of the graph or have rows at other times. So does the
    ratio not where several products take the codes of one tensor (q, k, v): TensorRT-RTX scales the outputs of all in
    one kernel where they share a factor.
    """
    spec, parts = context.spec.corrections[marker_name(marker)], _Parts(context, product, operands)
    whole = rows.same_times and not context.table_input
    with_ratio = whole and not any(_is_shared(emitter) for emitter in parts.ratios)
    gain, shift = spec.gain.astype(np.float64), spec.bias.astype(np.float64)
    factor: Any = spec.gain
    addend = shift if parts.bias is None else gain * parts.bias + shift
    if with_ratio:
        for emitter in parts.ratios:  # of one operand: the other is a weight
            factor = factor * (emitter.spec.value_scale / reference_scale(emitter.spec))[:, None]
    found = {"factor": factor, "addend": addend}
    if parts.moving is not None:
        moved = gain * _weight_sum(context, product)
        offset = parts.moving.spec.value_offset
        if whole and offset is not None:
            found["addend"] = addend + offset.astype(np.float64)[:, None] * moved
        else:
            found["moved"] = moved
    rank = len(marker.outputs[0].shape or ())
    for what, values in found.items():
        rows.add(marker, what, values, rank, spec.trailing)
    return Correction(rows, marker, parts, with_ratio, whole)


def _is_shared(emitter: ActivationEmitter) -> bool:
    """Whether other quantizers take the same tensor."""
    source = emitter.marker.inputs[0]
    return source is not None and sum(node.op_type == emitter.marker.op_type for node, _ in source.uses()) > 1


def rescale_product(
    context: LoweringContext,
    product: ir.Node,
    operands: dict[int, ActivationEmitter],
    correction: Correction | None = None,
) -> None:
    """product(s_ref q, w) with its bias -> product(s_ref q, w) * s' / s_ref + (bias + o' * sum(w)), corrected.

    Args:
        context: Of the lowering.
        product: A convolution or matrix product whose operands are in place already.
        operands: Its quantized activations by operand index.
        correction: What :func:`plan_correction` made; its rows are emitted.
    """
    editor = context.editor
    types = editor.ir.DataType
    output = product.outputs[0]
    parts = _Parts(context, product, operands) if correction is None else correction.parts
    if not parts.ratios and parts.shifted is None and output.dtype == types.FLOAT and correction is None:
        return
    name, rank = next(iter(operands.values())).spec.name.rpartition(".")[0] or "product", len(output.shape or ())
    inputs = [_float32(context, product, value, f"{name}/operand") for value in product.inputs[:2] if value is not None]
    bias = parts.bias
    attributes: dict[str, Any] = {k: v for k, v in product.attributes.items() if k != "beta"}
    if parts.shifted is not None and any(pads_of(product)):
        attributes["pads"] = editor.ir.AttrInt64s("pads", [0] * len(pads_of(product)))
    inside = not parts.ratios and parts.moving is None and correction is None
    if inside and bias is not None and product.op_type != "MatMul":
        inputs.append(editor.constant(f"{name}/bias", bias.astype(np.float32)))
        bias = None
    y = editor.before(product, product.op_type, inputs, f"{name}/product", shape=output.shape, **attributes)
    factors = [] if correction is not None and correction.with_ratio else parts.ratios
    values = [context.lookup.value(e.spec.name, "ratio", rank, e.layout) for e in factors]
    layout = Layout(0)
    if correction is not None:
        layout = context.layout_of_correction(correction.marker)
        values.append(correction.rows.value(correction.marker, "factor", layout))
    if values:
        factor = values[0]
        for value in values[1:]:
            factor = editor.before(product, "Mul", [factor, value], f"{name}/ratio")
        y = editor.before(product, "Mul", [y, factor], f"{name}/scaled", shape=output.shape)
    if correction is None:
        addend = _addend(context, product, parts.moving, bias, rank, name)
    else:
        addend = _corrected_addend(context, product, parts.moving, correction, rank, layout, name)
    if addend is not None:
        y = editor.before(product, "Add", [y, addend], f"{name}/biased", shape=output.shape)
    if output.dtype is not None:
        y = editor.cast(product, y, output.dtype, f"{name}/result")
    editor.replace(parts.biased if correction is None else correction.marker.outputs[0], y)


def _corrected_addend(
    context: LoweringContext,
    product: ir.Node,
    moving: ActivationEmitter | None,
    correction: Correction,
    rank: int,
    layout: Layout,
    name: str,
) -> ir.Value:
    addend = correction.rows.value(correction.marker, "addend", layout)
    if moving is None or correction.with_offset:
        return addend
    offset = context.lookup.value(moving.spec.name, "dequant_offset", rank, moving.layout)
    moved = correction.rows.value(correction.marker, "moved", layout)
    moved = context.editor.before(product, "Mul", [offset, moved], f"{name}/offset_sum")
    return cast("ir.Value", context.editor.before(product, "Add", [addend, moved], f"{name}/offset_bias"))


def _float32(context: LoweringContext, anchor: ir.Node, value: ir.Value, name: str) -> ir.Value:
    types = context.editor.ir.DataType
    if value in context.weights and value.dtype != types.FLOAT:
        source = value.producer()
        if source is not None and source.op_type == "Cast":
            return cast(
                "ir.Value", source.inputs[0]
            )  # the dequantized weight, before it was rounded to the model's dtype
    return context.editor.cast(anchor, value, types.FLOAT, name)


def _weight_sum(context: LoweringContext, product: ir.Node) -> Any:
    """[C] float64: the sum of the weights of each output channel."""
    weight = product.inputs[1]
    lowered = None if weight is None else context.weights.get(weight)
    values: Any = constant_of(weight) if lowered is None else lowered.values()
    values = values.astype(np.float64)
    if product.op_type in CONVOLUTIONS:
        return values.reshape(values.shape[0], -1).sum(1)
    if product.op_type == "Gemm":
        axis = 1 if product.attributes.get_int("transB", 0) else 0
        return values.sum(axis) * product.attributes.get_float("alpha", 1.0)
    return values.sum(0)


def _addend(
    context: LoweringContext,
    product: ir.Node,
    moving: ActivationEmitter | None,
    bias: Any | None,
    rank: int,
    name: str,
) -> ir.Value | None:
    """The bias + o' * sum(w), to broadcast against the output of the product."""
    shape = [1, -1] + [1] * (rank - 2) if product.op_type in CONVOLUTIONS else [-1]

    def channels(suffix: str, values: Any) -> ir.Value:
        return context.editor.constant(f"{name}/{suffix}", values.astype(np.float32).reshape(shape))

    constant = None if bias is None else channels("bias", bias)
    if moving is None:
        return constant
    offset = context.lookup.value(moving.spec.name, "dequant_offset", rank, moving.layout)
    sums = channels("weight_sum", _weight_sum(context, product))
    moved: ir.Value = context.editor.before(product, "Mul", [offset, sums], f"{name}/offset_sum")
    if constant is not None:
        moved = context.editor.before(product, "Add", [moved, constant], f"{name}/offset_bias")
    return moved
