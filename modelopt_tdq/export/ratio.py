"""Lowering "ratio": quantize with a constant scale, correct behind the operator.

    Cast(x, f32) -> [Pad(x, 0)] -> [Sub(o)] -> Div(s) -> [Clip] -> Q(1) -> DQ(s_ref) -> product, no bias
                 -> Mul(s / s_ref) -> Add(bias + o * sum(weights))

The scale of QuantizeLinear is a constant, so every backend keeps its low-precision kernel, and dividing
first makes the codes those of the definition. An offset of the activation is a constant of each output
channel once the zeros of the padding are quantized like everything else, which needs them explicit and
zero a code of its own. A scale that does not depend on time stays plain Q(s) -> DQ(s).

Products compute in float32 here, whatever the dtype of the model: INT8 kernels accumulate in integers
and scale in float32 anyway.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.lookup import reference_scale
from modelopt_tdq.export.product import (
    CONVOLUTIONS,
    PRODUCTS,
    Path,
    constant_of,
    offset_problem,
    paths_to_products,
    per_sample_problem,
)
from modelopt_tdq.export.spec import ActivationSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_ratio"]


def lower_ratio(context: LoweringContext) -> None:
    """Replace all activation markers, and rewrite the products that take their codes.

    Raises:
        TdqError: A convolution pads, and its input has an offset that leaves zero without a code.
    """
    products: dict[ir.Node, dict[int, ActivationEmitter]] = defaultdict(dict)
    for marker in context.markers():
        spec = context.activation(marker)
        emitter = ActivationEmitter(context.editor, context.lookup, spec, marker, context.fold(marker))
        paths = paths_to_products(marker.outputs[0])
        problem = paths if isinstance(paths, str) else _problem(context, emitter, paths)
        if isinstance(paths, str) or problem is not None:
            context.skip(spec.name, str(problem))
            context.editor.replace(marker.outputs[0], emitter.in_place(constant_scale=True))
            continue
        context.quantized(spec.name)
        for path in paths:
            products[path.product][path.index] = emitter
        _emit_operand(context, emitter, paths)
    for weight, lowered in context.weights.items():
        if any(not products.get(node) for node, _ in weight.uses() if node.op_type in PRODUCTS):
            context.skip(lowered.spec.name, "stored in low precision, but its product computes in floating point")
    for product, operands in products.items():
        _report_float_partner(context, product, operands)
        _rewrite(context, product, operands)


def _is_constant(context: LoweringContext, value: ir.Value | None) -> bool:
    return value in context.weights or constant_of(value) is not None


def _pads(product: ir.Node) -> list[int]:
    return list(product.attributes.get_ints("pads", [])) if product.op_type == "Conv" else []


def _problem(context: LoweringContext, emitter: ActivationEmitter, paths: list[Path]) -> str | None:
    """Why the codes cannot go into the products; None if they can."""
    spec = emitter.spec
    for path in paths:
        if path.product.outputs[0].shape is None:
            return "the shape of its product's output is not known"
        if context.lookup.per_sample and (emitter.temporal_scale or context.lookup.is_temporal(spec.name, "offset")):
            problem = per_sample_problem(path)
            if problem is not None:
                return problem
        if spec.offset is None:
            continue
        problem = offset_problem(path, lambda value: _is_constant(context, value))
        if problem is None and len(paths) > 1 and any(any(_pads(p.product)) for p in paths):
            problem = "it has an offset, and goes into several convolutions that pad"
        if problem is not None:
            return problem
        if any(_pads(path.product)) and not spec.zero_has_a_code:
            raise TdqError(
                "offset",
                spec.name,
                "the convolution behind this quantizer pads with zeros, and with this offset zero has no code",
                "Use offsets that are whole multiples of the scale, as calibration does, or leave the layer out with "
                f"the quant_cfg rule {{'quantizer_name': '{spec.name}', 'enable': False}}",
            )
    return None


def _emit_operand(context: LoweringContext, emitter: ActivationEmitter, paths: list[Path]) -> None:
    """The codes, dequantized with a constant scale, in place of the marker."""
    editor = context.editor
    types = editor.ir.DataType
    if emitter.spec.offset is not None and any(_pads(paths[0].product)):
        emitter.pad(_pads(paths[0].product))
    codes, scale = emitter.codes(constant_scale=True)
    if scale is None:
        scale = editor.constant(f"{emitter.spec.name}/reference_scale", np.array(reference_scale(emitter.spec)))
    dequantized = emitter.dequantize(codes, scale)
    for path in paths:
        for node in path.chain:
            _compute_in_float32(context, node, types.FLOAT)
    editor.replace(emitter.marker.outputs[0], dequantized)


def _compute_in_float32(context: LoweringContext, node: ir.Node, dtype: Any) -> None:
    """Let a node between marker and product pass float32 on."""
    if node.op_type == "Cast":
        node.attributes["to"] = context.editor.ir.AttrInt64("to", int(dtype))
    if node.op_type in ("Mul", "Pad"):
        for index, value in enumerate(node.inputs):
            array = constant_of(value)
            if array is not None and value is not None and value.dtype != dtype and array.dtype.kind == "f":
                node.replace_input_with(
                    index, context.editor.constant(f"{value.name}/float32", array.astype("float32"))
                )
    node.outputs[0].dtype = dtype


def _report_float_partner(context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter]) -> None:
    for index, emitter in operands.items():
        partner = product.inputs[1 - index]
        if 1 - index in operands:
            same = operands[1 - index].spec.is_fp8 == emitter.spec.is_fp8
        elif partner in context.weights:
            same = context.weights[partner].spec.is_fp8 == emitter.spec.is_fp8
        else:
            context.skip(emitter.spec.name, "the other operand of its product is not quantized")
            continue
        if not same:
            context.skip(emitter.spec.name, "the other operand of its product has another kind of number format")


def _rewrite(context: LoweringContext, product: ir.Node, operands: dict[int, ActivationEmitter]) -> None:
    """product(s_ref q, w) with its bias -> product(s_ref q, w) * s / s_ref + (bias + o * sum(w))."""
    editor, lookup = context.editor, context.lookup
    types = editor.ir.DataType
    output = product.outputs[0]
    shifted = next((e.spec for e in operands.values() if e.spec.offset is not None), None)
    ratios = [e for e in operands.values() if e.temporal_scale]
    if not ratios and shifted is None and output.dtype == types.FLOAT:
        return
    name, rank = next(iter(operands.values())).spec.name.rpartition(".")[0] or "product", len(output.shape or ())
    inputs = [_float32(context, product, value, f"{name}/operand") for value in product.inputs[:2] if value is not None]
    bias, replaced = _bias(product)
    attributes: dict[str, Any] = {k: v for k, v in product.attributes.items() if k != "beta"}
    if shifted is not None and any(_pads(product)):
        attributes["pads"] = editor.ir.AttrInt64s("pads", [0] * len(_pads(product)))
    inside = not ratios and (shifted is None or not lookup.is_temporal(shifted.name, "offset"))
    if shifted is not None and not lookup.is_temporal(shifted.name, "offset"):
        constant = lookup.constant(shifted.name, "offset") * _weight_sum(context, product)
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
    """The bias + o * sum(w), to broadcast against the output of the product."""
    shape = [1, -1] + [1] * (rank - 2) if product.op_type in CONVOLUTIONS else [-1]

    def channels(suffix: str, values: Any) -> ir.Value:
        return context.editor.constant(f"{name}/{suffix}", values.astype(np.float32).reshape(shape))

    constant = None if bias is None else channels("bias", bias)
    if shifted is None:
        return constant
    emitter = next(e for e in operands.values() if e.spec is shifted)
    offset = context.lookup.value(shifted.name, "offset", rank, emitter.fold)
    sums = channels("weight_sum", _weight_sum(context, product))
    moved: ir.Value = context.editor.before(product, "Mul", [offset, sums], f"{name}/offset_sum")
    if constant is not None:
        moved = context.editor.before(product, "Add", [moved, constant], f"{name}/offset_bias")
    return moved
