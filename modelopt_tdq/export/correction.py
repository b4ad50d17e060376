"""Behind a product of codes: what makes it the product of the values.

    product(s_ref q, w) -> Mul(s' / s_ref) -> Add(bias + o' * sum(w))

A part that does not depend on time becomes the bias of the product itself, where it has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.product import CONVOLUTIONS, constant_of, pads_of
from modelopt_tdq.export.spec import ActivationSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["correct_product"]


def correct_product(context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter]) -> None:
    """product(s_ref q, w) with its bias -> product(s_ref q, w) * s' / s_ref + (bias + o' * sum(w)).

    Args:
        context: Of the lowering.
        product: A convolution or matrix product whose operands are in place already.
        operands: Its quantized activations by operand index.
    """
    editor, lookup = context.editor, context.lookup
    types = editor.ir.DataType
    output = product.outputs[0]
    shifted = next((e.spec for e in operands.values() if e.spec.value_offset is not None), None)
    ratios = [e for e in operands.values() if e.temporal_values]
    if not ratios and shifted is None and output.dtype == types.FLOAT:
        return
    name, rank = next(iter(operands.values())).spec.name.rpartition(".")[0] or "product", len(output.shape or ())
    inputs = [_float32(context, product, value, f"{name}/operand") for value in product.inputs[:2] if value is not None]
    bias, replaced = _bias(product)
    attributes: dict[str, Any] = {k: v for k, v in product.attributes.items() if k != "beta"}
    if shifted is not None and any(pads_of(product)):
        attributes["pads"] = editor.ir.AttrInt64s("pads", [0] * len(pads_of(product)))
    inside = not ratios and (shifted is None or not lookup.is_temporal(shifted.name, "dequant_offset"))
    if shifted is not None and not lookup.is_temporal(shifted.name, "dequant_offset"):
        constant = lookup.constant(shifted.name, "dequant_offset") * _weight_sum(context, product)
        bias = constant if bias is None else bias + constant
        shifted = None
    if inside and bias is not None and product.op_type != "MatMul":
        inputs.append(editor.constant(f"{name}/bias", bias.astype(np.float32)))
        bias = None
    y = editor.before(product, product.op_type, inputs, f"{name}/product", shape=output.shape, **attributes)
    if ratios:
        factors = [lookup.value(e.spec.name, "ratio", rank, e.fold) for e in ratios]
        factor = factors[0] if len(factors) == 1 else editor.before(product, "Mul", factors, f"{name}/ratio")
        y = editor.before(product, "Mul", [y, factor], f"{name}/scaled", shape=output.shape)
    addend = _addend(context, product, operands, shifted, bias, rank, name)
    if addend is not None:
        y = editor.before(product, "Add", [y, addend], f"{name}/biased", shape=output.shape)
    if output.dtype is not None:
        y = editor.cast(product, y, output.dtype, f"{name}/result")
    editor.replace(replaced, y)


def _float32(context: LoweringContext, anchor: ir.Node, value: ir.Value, name: str) -> ir.Value:
    types = context.editor.ir.DataType
    if value in context.weights and value.dtype != types.FLOAT:
        source = value.producer()
        if source is not None and source.op_type == "Cast":
            return cast(
                "ir.Value", source.inputs[0]
            )  # the dequantized weight, before it was rounded to the model's dtype
    return context.editor.cast(anchor, value, types.FLOAT, name)


def _bias(product: ir.Node) -> tuple[Any | None, ir.Value]:
    """The constant bias [C] of a product, its own or that of an Add behind it; and the value that includes it."""
    output = product.outputs[0]
    if len(product.inputs) > 2 and product.inputs[2] is not None:
        bias = constant_of(product.inputs[2])
        if bias is None:
            raise TdqError("model", product.name, "the bias of this operator is computed", "Use a constant bias")
        return bias.astype(np.float64).reshape(-1) * product.attributes.get_float("beta", 1.0), output
    uses = output.uses()
    if product.op_type == "MatMul" and len(uses) == 1 and not output.is_graph_output():
        node, index = next(iter(uses))
        bias = constant_of(node.inputs[1 - index]) if node.op_type == "Add" and len(node.inputs) == 2 else None
        if bias is not None and bias.ndim == 1 and output.shape is not None and bias.shape[0] == output.shape[-1]:
            return bias.astype(np.float64), node.outputs[0]
    return None, output


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
    operands: dict[int, ActivationEmitter],
    shifted: ActivationSpec | None,
    bias: Any | None,
    rank: int,
    name: str,
) -> ir.Value | None:
    """The bias + o' * sum(w), to broadcast against the output of the product."""
    shape = [1, -1] + [1] * (rank - 2) if product.op_type in CONVOLUTIONS else [-1]

    def channels(suffix: str, values: Any) -> ir.Value:
        return context.editor.constant(f"{name}/{suffix}", values.astype(np.float32).reshape(shape))

    constant = None if bias is None else channels("bias", bias)
    if shifted is None:
        return constant
    emitter = next(e for e in operands.values() if e.spec is shifted)
    offset = context.lookup.value(shifted.name, "dequant_offset", rank, emitter.fold)
    sums = channels("weight_sum", _weight_sum(context, product))
    moved: ir.Value = context.editor.before(product, "Mul", [offset, sums], f"{name}/offset_sum")
    if constant is not None:
        moved = context.editor.before(product, "Add", [moved, constant], f"{name}/offset_bias")
    return moved
