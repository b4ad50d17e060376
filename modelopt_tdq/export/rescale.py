"""Behind a product of codes: what makes it the product of the values.

    product(s_ref q, w) -> Mul(s' / s_ref) -> Add(bias + o' * sum(w) + sum(w v))

A part that does not depend on time becomes the bias of the product itself, where it has one. Where the output is
corrected over time, y <- gain * y + b, the factor is gain * s' / s_ref and the addend gain * (bias + ...) + b, of each
channel: two rows of :class:`~modelopt_tdq.export.channel_rows.ChannelRows`; shifts v over time are part of the addend.
The nodes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.channel_rows import ChannelRows
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.layer_correction import correction_behind
from modelopt_tdq.export.lookup import reference_scale
from modelopt_tdq.export.product import CONVOLUTIONS, bias_of, computes_bias, constant_of, pads_of
from modelopt_tdq.export.weights import marker_name
from modelopt_tdq.model.token_times import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Plan", "plan", "rescale_product"]


class _Parts:
    """What a product of codes consists of besides the codes.

    Attributes:
        shifted: The activation whose code 0 has another value than 0; None: there is none.
        ratios: Those whose scale depends on time.
        bias: [C] of the product, with what offsets add that do not depend on time; None where there is none.
        biased: The value that has the bias.
        moving: The activation whose offset depends on time; None: there is none.
        moved: [K, C] what shifts of channels add that depend on time; None where there are none.
    """

    def __init__(self, context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter]) -> None:
        self.shifted = next((e for e in operands.values() if e.spec.moves_values), None)
        self.ratios = [e for e in operands.values() if e.temporal_values]
        self.bias, self.biased = bias_of(product)
        if computes_bias(product):
            raise TdqError("model", product.name, "the bias of this operator is computed", "Use a constant bias")
        self.moving: ActivationEmitter | None = None
        self.moved: Any | None = None
        if self.shifted is None:
            return
        spec = self.shifted.spec
        constants = []
        if spec.value_offset is not None:
            if context.lookup.is_temporal(spec.name, "dequant_offset"):
                self.moving = self.shifted
            else:
                constants.append(
                    context.lookup.constant(spec.name, "dequant_offset") * _weighted_sum(context, product)[0]
                )
        if spec.shift is not None:
            moved = _weighted_sum(context, product, spec.shift.reshape(len(spec.shift), -1))
            if spec.is_shifted_over_time:
                self.moved = moved
            else:
                constants.append(moved[0])
        for constant in constants:
            self.bias = constant if self.bias is None else self.bias + constant


@dataclass(frozen=True)
class Plan:
    """What comes behind a product.

    Attributes:
        parts: Of the product.
        rows: Of the graph, among them ``factor``, ``addend`` and ``moved`` of the corrected marker, or of the product;
            None: there are none.
        corrected: The marker of the correction over time that is part of it; None: there is none.
        with_ratio: Whether the factor is that of the ratio as well.
        with_offset: Whether the addend is that of the offset as well.
    """

    parts: _Parts
    rows: ChannelRows | None = None
    corrected: ir.Node | None = None
    with_ratio: bool = False
    with_offset: bool = False


def plan(
    context: LoweringContext,
    product: ir.Node,
    operands: dict[int, ActivationEmitter],
    shift_rows: ChannelRows,
    correction_rows: ChannelRows,
) -> Plan:
    """Add the rows of a correction that depends on time, and of shifts that do, behind a product of codes.

    Ratio and offset become part of them, unless these are inputs of the graph or have rows at other times. So does the
    ratio not where several products take the codes of one tensor (q, k, v): TensorRT-RTX scales the outputs of all in
    one kernel where they share a factor.
    """
    parts = _Parts(context, product, operands)
    marker = correction_behind(product)
    if marker is not None and not context.spec.corrections[marker_name(marker)].is_temporal:
        marker = None
    if marker is not None and parts.moved is not None and shift_rows is not correction_rows:
        marker = None  # rows at other times: a Mul and an Add of its own
    if marker is None and parts.moved is None:
        return Plan(parts)
    rows = shift_rows if marker is None else correction_rows
    whole = rows.same_times and not context.table_input
    with_ratio = marker is not None and whole and not any(_is_shared(emitter) for emitter in parts.ratios)
    gain: Any = 1.0
    shift: Any = 0.0
    rank, trailing = len(product.outputs[0].shape or ()), 0
    if marker is None:
        trailing = rank - 2 if product.op_type in CONVOLUTIONS else 0
    else:
        spec = context.spec.corrections[marker_name(marker)]
        gain, shift = spec.gain.astype(np.float64), spec.bias.astype(np.float64)
        rank, trailing = len(marker.outputs[0].shape or ()), spec.trailing
    addend: Any = 0.0 if parts.bias is None else parts.bias
    if parts.moved is not None:
        addend = addend + parts.moved
    found = {"addend": gain * addend + shift}
    if marker is not None:
        factor: Any = spec.gain
        if with_ratio:
            for emitter in parts.ratios:  # of one operand: the other is a weight
                factor = factor * (emitter.spec.value_scale / reference_scale(emitter.spec))[:, None]
        found["factor"] = factor
    if parts.moving is not None:
        moved = gain * _weighted_sum(context, product)
        offset = parts.moving.spec.value_offset
        if whole and offset is not None:
            found["addend"] = found["addend"] + offset.astype(np.float64)[:, None] * moved
        else:
            found["moved"] = moved
    owner = product if marker is None else marker
    for what, values in found.items():
        rows.add(owner, what, values, rank, trailing)
    return Plan(parts, rows, marker, with_ratio, whole)


def _is_shared(emitter: ActivationEmitter) -> bool:
    """Whether other quantizers take the same tensor."""
    source = emitter.marker.inputs[0]
    return source is not None and sum(node.op_type == emitter.marker.op_type for node, _ in source.uses()) > 1


def rescale_product(
    context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter], planned: Plan
) -> None:
    """product(s_ref q, w) with its bias -> product(s_ref q, w) * s' / s_ref + (bias + o' * sum(w)), corrected.

    Args:
        context: Of the lowering.
        product: A convolution or matrix product whose operands are in place already.
        operands: Its quantized activations by operand index.
        planned: What :func:`plan` made; its rows are emitted.
    """
    editor = context.editor
    types = editor.ir.DataType
    output = product.outputs[0]
    parts, corrected = planned.parts, planned.corrected
    if not parts.ratios and parts.shifted is None and output.dtype == types.FLOAT and corrected is None:
        return
    name, rank = next(iter(operands.values())).spec.name.rpartition(".")[0] or "product", len(output.shape or ())
    inputs = [_float32(context, product, value, f"{name}/operand") for value in product.inputs[:2] if value is not None]
    bias = parts.bias
    attributes: dict[str, Any] = {k: v for k, v in product.attributes.items() if k != "beta"}
    if parts.shifted is not None and any(pads_of(product)):
        attributes["pads"] = editor.ir.AttrInt64s("pads", [0] * len(pads_of(product)))
    inside = not parts.ratios and parts.moving is None and planned.rows is None
    if inside and bias is not None and product.op_type != "MatMul":
        inputs.append(editor.constant(f"{name}/bias", bias.astype(np.float32)))
        bias = None
    y = editor.before(product, product.op_type, inputs, f"{name}/product", shape=output.shape, **attributes)
    factors = [] if planned.with_ratio else parts.ratios
    values = [context.lookup.value(e.spec.name, "ratio", rank, e.layout) for e in factors]
    layout = Layout(0)
    if corrected is not None and planned.rows is not None:
        layout = context.layout_of_correction(corrected)
        values.append(planned.rows.value(corrected, "factor", layout))
    elif parts.moved is not None and parts.shifted is not None:
        layout = parts.shifted.layout
    if values:
        factor = values[0]
        for value in values[1:]:
            factor = editor.before(product, "Mul", [factor, value], f"{name}/ratio")
        y = editor.before(product, "Mul", [y, factor], f"{name}/scaled", shape=output.shape)
    addend = _addend(context, product, planned, bias, rank, layout, name)
    if addend is not None:
        y = editor.before(product, "Add", [y, addend], f"{name}/biased", shape=output.shape)
    if output.dtype is not None:
        y = editor.cast(product, y, output.dtype, f"{name}/result")
    editor.replace(parts.biased if corrected is None else corrected.outputs[0], y)


def _float32(context: LoweringContext, anchor: ir.Node, value: ir.Value, name: str) -> ir.Value:
    types = context.editor.ir.DataType
    if value in context.weights and value.dtype != types.FLOAT:
        source = value.producer()
        if source is not None and source.op_type == "Cast":
            return cast(
                "ir.Value", source.inputs[0]
            )  # the dequantized weight, before it was rounded to the model's dtype
    return context.editor.cast(anchor, value, types.FLOAT, name)


def _weighted_sum(context: LoweringContext, product: ir.Node, shift: Any | None = None) -> Any:
    """[K, C] float64: the sums of the weights of each output channel, times ``shift`` [K, C'] of each input channel.

    None: times 1, [1, C].
    """
    weight = product.inputs[1]
    lowered = None if weight is None else context.weights.get(weight)
    values: Any = constant_of(weight) if lowered is None else lowered.values()
    values = values.astype(np.float64)
    if product.op_type in CONVOLUTIONS:
        values = values.reshape(*values.shape[:2], -1).sum(2)  # [C, C' / groups]
        groups = product.attributes.get_int("group", 1)
    else:
        groups = 1
        if product.op_type != "Gemm" or not product.attributes.get_int("transB", 0):
            values = values.T
        values = values * product.attributes.get_float("alpha", 1.0)
    if shift is None:
        return values.sum(1)[None]
    grouped = values.reshape(groups, -1, values.shape[1])  # [g, C / g, C' / g]
    found = np.einsum("goc,kgc->kgo", grouped, shift.astype(np.float64).reshape(len(shift), groups, -1))
    return found.reshape(len(shift), -1)


def _addend(
    context: LoweringContext,
    product: ir.Node,
    planned: Plan,
    bias: Any | None,
    rank: int,
    layout: Layout,
    name: str,
) -> ir.Value | None:
    """The bias + o' * sum(w), to broadcast against the output of the product: of the planned rows, or of constants."""
    moving, rows, owner = planned.parts.moving, planned.rows, planned.corrected or product
    shape = [1, -1] + [1] * (rank - 2) if product.op_type in CONVOLUTIONS else [-1]

    def channels(suffix: str, values: Any) -> ir.Value:
        return context.editor.constant(f"{name}/{suffix}", values.astype(np.float32).reshape(shape))

    if rows is not None:
        fixed: ir.Value | None = rows.value(owner, "addend", layout)
    else:
        fixed = None if bias is None else channels("bias", bias)
    if moving is None or planned.with_offset:
        return fixed
    offset = context.lookup.value(moving.spec.name, "dequant_offset", rank, moving.layout)
    if rows is not None:
        sums = rows.value(owner, "moved", layout)
    else:
        sums = channels("weight_sum", _weighted_sum(context, product)[0])
    moved: ir.Value = context.editor.before(product, "Mul", [offset, sums], f"{name}/offset_sum")
    if fixed is not None:
        moved = context.editor.before(product, "Add", [moved, fixed], f"{name}/offset_bias")
    return moved
