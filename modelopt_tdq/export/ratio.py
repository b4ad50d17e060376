"""Lowering "ratio": quantize with a constant scale, correct behind the operator.

    Cast(x, f32) -> [Pad(x, 0)] -> [Sub(o)] -> Div(s) -> [Clip] -> Q(1) -> DQ(s_ref) -> product, no bias
                 -> Mul(s' / s_ref) -> Add(bias + o' * sum(weights))

Codes are turned back with s' = s and o' = o, unless the quantizer has others. Where the channels of the activation are
shifted, their offsets are vectors, and so is what is added: :mod:`modelopt_tdq.export.shift`.

The scale of QuantizeLinear is a constant, so every backend keeps its low-precision kernel, and dividing
first makes the codes those of the definition. An offset o' of the values is a constant of each output
channel once the zeros of the padding are quantized like everything else, which needs them explicit and
zero a code of its own. Scales that do not depend on time stay plain Q(s) -> DQ(s').

Products compute in float32 here, whatever the dtype of the model: INT8 kernels accumulate in integers
and scale in float32 anyway.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.activation import ActivationEmitter
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.layer_correction import add_in_place, corrections, lower_correction
from modelopt_tdq.export.product import (
    LAYOUT,
    PRODUCTS,
    Path,
    constant_of,
    offset_problem,
    pads_of,
    paths_to_products,
    per_sample_problem,
    tokens_problem,
)
from modelopt_tdq.export.rescale import Plan, plan, rescale_product
from modelopt_tdq.export.shift import GraphShifts, all_channel_rows
from modelopt_tdq.export.weights import marker_name
from modelopt_tdq.model.kinds import kind_of_operator, number_format, title, without_kernel

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_ratio"]


def _limited(path: Path, emitter: ActivationEmitter) -> str | None:
    """Which backends compute a product of codes in floating point all the same, and how to leave it out."""
    format_ = number_format(emitter.spec.num_bits)
    kind = kind_of_operator(path.product.op_type)
    if kind is None or kind.by_default:  # what the presets quantize is said once, in the coverage
        return None
    missing = without_kernel(path.product.op_type, format_)
    able = [title(backend) for backend in ("openvino", "tensorrt_rtx", "tensorrt") if backend not in missing]
    told = "; ".join(f"{title(backend)} {what}" for backend, what in missing.items())
    having = f"{' and '.join(able)} {'has' if len(able) == 1 else 'have'} one" if able else "no other has one"
    layer = emitter.spec.name.rpartition(".")[0]
    return f"{told} ({having}); to leave it out there, call mtq.disable_quantizer(model, '{layer}.*') before the export"


def lower_ratio(context: LoweringContext) -> None:
    """Replace all activation markers, and rewrite the products that take their codes.

    Raises:
        TdqError: A convolution pads, and its input has an offset that leaves zero without a code.
    """
    products: dict[ir.Node, dict[int, ActivationEmitter]] = defaultdict(dict)
    emitted: list[tuple[ActivationEmitter, list[Path]]] = []
    shift_rows, rows = all_channel_rows(context)
    shifts = GraphShifts(context, shift_rows)
    for marker in context.markers():
        emitter = shifts.emitter(marker)
        paths = paths_to_products(marker.outputs[0])
        problem = paths if isinstance(paths, str) else _problem(context, emitter, paths)
        if isinstance(paths, str) or problem is not None:
            context.skip(emitter.spec.name, str(problem))
            shifts.add(emitter, "offset", "dequant_offset")
            emitted.append((emitter, []))
            continue
        context.quantized(emitter.spec.name)
        shifts.add(emitter, "offset")
        emitted.append((emitter, paths))
        for path in paths:
            products[path.product][path.index] = emitter
            limited = _limited(path, emitter)
            if limited is not None:
                context.limited[emitter.spec.name] = limited
    for weight, lowered in context.weights.items():
        for node, _ in weight.uses():
            if node.op_type in PRODUCTS and not products.get(node):
                context.skip(lowered.spec.name, "stored in low precision, but its product computes in floating point")
            elif node.op_type not in (*PRODUCTS, *LAYOUT):
                context.skip(
                    lowered.spec.name, f"stored in low precision, but {node.op_type} computes in floating point"
                )
    plans: dict[ir.Node, Plan] = {}
    for product, operands in products.items():
        _report_float_partner(context, product, operands)
        plans[product] = plan(context, product, operands, shift_rows, rows)
    behind = {id(found.corrected) for found in plans.values()}
    others = [marker for marker in corrections(context.editor.graph) if id(marker) not in behind]
    for marker in others:
        add_in_place(rows, marker, context.spec.corrections[marker_name(marker)])
    for some in {id(rows): rows, id(shift_rows): shift_rows}.values():
        some.emit()
    for emitter, paths in emitted:
        if paths:
            _emit_operand(context, emitter, paths)
        else:
            context.editor.replace(emitter.marker.outputs[0], emitter.in_place(constant_scale=True))
    for product, operands in products.items():
        rescale_product(context, product, operands, plans[product])
    for marker in others:
        lower_correction(context, rows, marker)


def _is_constant(context: LoweringContext, value: ir.Value | None) -> bool:
    return value in context.weights or constant_of(value) is not None


def _problem(context: LoweringContext, emitter: ActivationEmitter, paths: list[Path]) -> str | None:
    """Why the codes cannot go into the products; None if they can."""
    spec = emitter.spec
    for path in paths:
        if path.product.outputs[0].shape is None:
            return "the shape of its product's output is not known"
        moved = emitter.temporal_values or context.lookup.is_temporal(spec.name, "dequant_offset")
        moved |= spec.is_shifted_over_time
        if context.lookup.per_sample and moved:
            problem = tokens_problem(path) if emitter.layout.axis else per_sample_problem(path)
            if problem is not None:
                return problem
        if not spec.moves_values:
            continue
        problem = offset_problem(path, lambda value: _is_constant(context, value))
        if problem is None and len(paths) > 1 and any(any(pads_of(p.product)) for p in paths):
            problem = "it has an offset, and goes into several convolutions that pad"
        if problem is not None:
            return problem
        if any(pads_of(path.product)) and not spec.zero_has_a_code:
            raise TdqError(
                "offset",
                spec.name,
                "the convolution behind this quantizer pads with zeros, and with this offset zero has no code",
                "Use offsets that are whole multiples of the scale, as calibration does (and a dequantize offset that "
                'turns the code of zero back into zero) and no shifts of its channels (`"channel_shift": "none"`), or '
                "leave the layer out with the quant_cfg rule "
                f"{{'quantizer_name': '{spec.name}', 'enable': False}}",
            )
    return None


def _emit_operand(context: LoweringContext, emitter: ActivationEmitter, paths: list[Path]) -> None:
    """The codes, dequantized with a constant scale, in place of the marker."""
    editor = context.editor
    types = editor.ir.DataType
    if emitter.spec.moves_values and any(pads_of(paths[0].product)):
        emitter.pad(pads_of(paths[0].product))
    operand = emitter.operand()
    for path in paths:
        for node in path.chain:
            _compute_in_float32(context, node, types.FLOAT)
    editor.replace(emitter.marker.outputs[0], operand)


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
