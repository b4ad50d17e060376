"""Forms of the graph that runtimes leave right: the last step of every lowering.

ONNX Runtime's optimizer knows patterns around QuantizeLinear and DequantizeLinear, and some of its rewrites change
numbers, or make a graph that it then refuses. Seen in 1.31 and 1.32, and avoided here:

- From "basic" on, the bias [C] of a Conv or Gemm of codes whose result is quantized again is rounded to a multiple of
  the product of the scales, and a weight that is not quantized there becomes INT8. A bias of another rank stops both; a
  convolution, whose bias cannot have another, gets an Add. A MatMul with an Add of [C] becomes such a Gemm, between
  Reshapes; with [1, 1, C] it stays.
- From "extended" on, a MatMul whose only dequantized operand is a constant becomes MatMulNBits, which quantizes the
  other operand as well. It looks for channels on axis 1, and finds none on axis -1, which is the same axis of a matrix:
  see :mod:`modelopt_tdq.export.weights`.
- From "extended" on, a MatMul or Gemm of FP8 codes becomes a kernel that takes integers only, and is refused; a Flatten
  of the weight, which is flat already, hides it. (Of two activations, as in attention, there is no such way: load those
  at "basic".)
- From "extended" on, a Relu in front of QuantizeLinear to FP8 is left out, as if there were no negative codes: Max.
- From "extended" on, on x86 processors, QuantizeLinear is repeated behind an operator that moves the dequantized values
  around, with its type twice: refused from opset 21 on. So the opset is 20 where nothing needs more; where something
  does, the codes are moved around, and dequantized behind it. (Not in all graphs: OpenVINO then computes the products
  of attention in float.)

TensorRT-RTX and OpenVINO have the same kernels with and without, but for the last.

ONNX Runtime has no Where of two truth values (masks of HunyuanVideo): it is And and Or. ONNX has no products, sums,
minima or maxima of truth values, and torch's exporter writes them all the same: And and Or.

ONNX Runtime's CPU has no arithmetic in bfloat16. Parts of a model of another type that compute in it all the same
(attention of SanaWM) do so in float32 and round every result. (A model in bfloat16 stays as it is.)

OpenVINO's CPU plugin (2026.4) makes one kernel of matrix products in a row where it has few rows per thread, so mostly
with one thread. Of INT8 codes it returns other numbers, or does not compile for want of registers
(``benchmarks/upstream/openvino_one_thread.py``). It does so only with matrices [M, K] all along: where a product is
behind another one, its input is quantized as [M, 1, K].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.product import CONVOLUTIONS, LAYOUT, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET_BFLOAT16", "OPSET_INT4", "OPSET_REPEATED", "portable"]

#: The first opset whose convolutions take bfloat16: that of models in it.
OPSET_BFLOAT16 = 22

#: The first opset with INT4 tensors.
OPSET_INT4 = 21

#: The first one in which ONNX Runtime refuses the QuantizeLinear that it repeats behind a layout operator.
OPSET_REPEATED = 21

#: What may stand between a product and the QuantizeLinear that ONNX Runtime finds behind it.
_PASSED = (*LAYOUT, "Slice", "MaxPool", "Relu", "Clip")

_MATRIX_PRODUCTS = ("MatMul", "Gemm")

#: What operators of numbers are of truth values.
_OF_TRUTH = {"Mul": "And", "Min": "And", "Add": "Or", "Max": "Or"}

#: Behind these ONNX Runtime repeats QuantizeLinear.
_REPEATED_BEHIND = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "MaxPool")


def portable(model: ir.Model, editor: GraphEditor) -> None:
    """Bring a lowered graph into these forms, in place, and choose its opset. No number changes."""
    types = editor.ir.DataType
    integers = (types.INT8, types.INT4)
    if any(value.dtype == types.INT4 for value in editor.graph.initializers.values()):
        model.opset_imports[""] = max(model.opset_imports[""], OPSET_INT4)
    for node in list(editor.graph):
        if node.op_type in (*CONVOLUTIONS, "Gemm") and _codes(node.inputs[0]) is not None:
            weight = _codes(node.inputs[1])
            _keep_bias(editor, node, always=weight is None or weight.dtype not in integers)
        elif node.op_type == "Add":
            _keep_added_bias(editor, node)
    if model.opset_imports[""] < OPSET_BFLOAT16:
        for node in list(editor.graph):
            _round_to_bfloat16(editor, node)
    for node in list(editor.graph):
        if node.op_type == "DequantizeLinear":
            _hide_matrix(editor, node)
        elif node.op_type == "Relu" and types.FLOAT8E4M3FN in _quantized_again(node.outputs[0]):
            _keep_relu(editor, node)
        elif node.op_type == "QuantizeLinear":
            _part_products(editor, node)
        elif node.op_type == "Where" and types.BOOL in [value.dtype for value in node.inputs[1:] if value is not None]:
            _take_truth(editor, node)
        elif node.op_type in _OF_TRUTH and types.BOOL in [value.dtype for value in node.inputs if value is not None]:
            _combine_truth(editor, node)
    if model.opset_imports[""] >= OPSET_REPEATED:
        _dequantize_behind_layout(editor)


def _codes(value: ir.Value | None) -> ir.Value | None:
    """The codes that the value was dequantized from, perhaps before it was moved around."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _REPEATED_BEHIND:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


def _quantized_again(value: ir.Value) -> set[Any]:
    """The types of codes that it becomes, perhaps after it was moved around or clipped."""
    found: set[Any] = set()
    for node, index in value.uses():
        if node.op_type == "QuantizeLinear":
            found.add(node.outputs[0].dtype)
        elif node.op_type in _PASSED and index == 0:
            found |= _quantized_again(node.outputs[0])
    return found


def _keep_bias(editor: GraphEditor, product: ir.Node, always: bool) -> None:
    """``always``: with a bias of zeros if need be, because nothing but a bias protects the weight."""
    output = product.outputs[0]
    if output.shape is None or output.dtype is None or not _quantized_again(output):
        return
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    values, name = constant_of(bias), "" if bias is None else str(bias.name)
    if bias is None and always:
        values, name = np.zeros(output.shape[1], dtype=output.dtype.numpy()), f"{output.name}/bias"
    if values is None or values.ndim != 1:
        return
    rank = len(output.shape)

    def channels(name: str, values: Any) -> ir.Value:
        return editor.constant(f"{name}/rank{rank}", values.reshape([1, -1] + [1] * (rank - 2)))

    if product.op_type == "Gemm" and bias is not None:
        product.replace_input_with(2, channels(name, values))
        return
    inputs = [*product.inputs[:2], *([channels(name, values)] if product.op_type == "Gemm" else [])]
    form: dict[str, Any] = {"dtype": output.dtype, "shape": output.shape}
    attributes: dict[str, Any] = dict(product.attributes)
    new = editor.before(product, product.op_type, inputs, f"{name}/product", **form, **attributes)
    new.producer().name = product.name
    if product.op_type != "Gemm":
        operator, shaped = "Add", channels(name, values)
        if always:  # an Add would become the bias of a convolution with a constant weight, ahead of all else
            operator, shaped = "Sub", channels(f"{name}/negative", -values)
        new = editor.before(product, operator, [new, shaped], f"{name}/added", **form)
    editor.replace(output, new)
    editor.graph.remove(product, safe=True)


def _take_truth(editor: GraphEditor, node: ir.Node) -> None:
    """Of two truth values, by And and Or."""
    condition, yes, no = node.inputs
    output = node.outputs[0]
    form: dict[str, Any] = {"dtype": editor.ir.DataType.BOOL, "shape": output.shape}
    otherwise = editor.before(node, "Not", [condition], f"{output.name}/otherwise", dtype=editor.ir.DataType.BOOL)
    parts = [
        editor.before(node, "And", [one, other], f"{output.name}/{name}", **form)
        for name, one, other in (("if", condition, yes), ("else", otherwise, no))
    ]
    editor.replace(output, editor.before(node, "Or", parts, f"{output.name}/truth", **form))
    editor.graph.remove(node, safe=True)


def _combine_truth(editor: GraphEditor, node: ir.Node) -> None:
    output, (found, *others) = node.outputs[0], node.inputs
    for other in others:
        name, inputs, shape = f"{output.name}/truth", [found, other], output.shape if len(others) == 1 else None
        found = editor.before(node, _OF_TRUTH[node.op_type], inputs, name, dtype=editor.ir.DataType.BOOL, shape=shape)
    if found is not None:
        editor.replace(output, found)
        editor.graph.remove(node, safe=True)


def _round_to_bfloat16(editor: GraphEditor, node: ir.Node) -> None:
    types, output = editor.ir.DataType, node.outputs[0]
    if node.op_type == "Cast" or len(node.outputs) > 1 or output.dtype != types.BFLOAT16:
        return
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == types.BFLOAT16:
            node.replace_input_with(index, editor.cast(node, value, types.FLOAT, f"{value.name}/float32"))
    users, graph_output = list(output.uses()), output.is_graph_output()
    output.dtype = types.FLOAT
    name = editor.unique(f"{output.name}/bfloat16")
    to: dict[str, Any] = {"to": int(types.BFLOAT16)}
    rounded = editor.ir.Value(name=name, type=editor.ir.TensorType(types.BFLOAT16), shape=output.shape)
    cast = editor.ir.node("Cast", [output], to, outputs=[rounded], name=editor.unique(f"node/{name}"))
    editor.graph.insert_after(node, cast)
    for user, index in users:
        user.replace_input_with(index, rounded)
    if graph_output:
        editor.graph.outputs[editor.graph.outputs.index(output)] = rounded
        output.name, rounded.name = name, output.name


def _hide_matrix(editor: GraphEditor, node: ir.Node) -> None:
    matrix, codes = node.outputs[0], node.inputs[0]
    if codes is None or codes.dtype != editor.ir.DataType.FLOAT8E4M3FN or codes.const_value is None:
        return
    if len(codes.const_value.shape) != 2:
        return
    for user, index in list(matrix.uses()):
        if user.op_type in ("MatMul", "Gemm"):
            flat = editor.before(
                user, "Flatten", [matrix], f"{matrix.name}/flat", dtype=matrix.dtype, shape=matrix.shape
            )
            user.replace_input_with(index, flat)


def _keep_relu(editor: GraphEditor, relu: ir.Node) -> None:
    (value,), output = relu.inputs, relu.outputs[0]
    if value is None or value.dtype is None:
        return
    inputs = [value, editor.constant("none_negative", np.zeros((), dtype=value.dtype.numpy()))]
    new = editor.before(relu, "Max", inputs, f"{output.name}/not_negative", dtype=output.dtype, shape=output.shape)
    editor.replace(output, new)
    editor.graph.remove(relu, safe=True)


def _part_products(editor: GraphEditor, quantize: ir.Node) -> None:
    value, codes = quantize.inputs[0], quantize.outputs[0]
    if value is None or codes.dtype != editor.ir.DataType.INT8 or not _is_matrix(value) or codes.is_graph_output():
        return
    behind = [user for node, _ in codes.uses() for user, _ in node.outputs[0].uses()]
    if not any(user.op_type in _MATRIX_PRODUCTS for user in behind) or not _behind_a_product(value):
        return
    users = list(codes.uses())
    rows, columns = codes.shape or (None, None)
    name, axis = str(codes.name).rpartition("/")[0], editor.ints([1])
    form: dict[str, Any] = {"dtype": value.dtype, "shape": [rows, 1, columns]}
    quantize.replace_input_with(0, editor.before(quantize, "Unsqueeze", [value, axis], f"{name}/apart", **form))
    matrix = editor.before(
        users[0][0], "Squeeze", [codes, axis], f"{name}/matrix", dtype=codes.dtype, shape=codes.shape
    )
    codes.shape = editor.ir.Shape(form["shape"])
    for user, index in users:
        user.replace_input_with(index, matrix)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 2


def _behind_a_product(value: ir.Value) -> bool:
    """Whether it comes from a product of matrices, of matrices all along."""
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            continue
        if node.op_type in _MATRIX_PRODUCTS:
            return True
        for found in node.inputs:
            if found is not None and found not in seen and _is_matrix(found):
                seen.add(found)
                waiting.append(found)
    return False


def _keep_added_bias(editor: GraphEditor, add: ir.Node) -> None:
    for index, value in enumerate(add.inputs):
        other, rank = add.inputs[1 - index], len(add.outputs[0].shape or ())
        product = None if other is None else other.producer()
        bias = constant_of(value)
        if value is None or product is None or product.op_type != "MatMul" or bias is None or bias.ndim != 1:
            continue
        if any(_codes(operand) is not None for operand in product.inputs):
            shaped = bias.reshape([1] * max(rank - 1, 0) + [-1])
            add.replace_input_with(index, editor.constant(f"{value.name}/rank{rank}", shaped))


def _dequantize_behind_layout(editor: GraphEditor) -> None:
    waiting = [node for node in editor.graph if node.op_type == "DequantizeLinear"]
    while waiting:
        node = waiting.pop()
        output, codes, scale, zero_point = node.outputs[0], *node.inputs
        if codes is None or codes.dtype != editor.ir.DataType.INT8:
            continue  # other codes are not what it repeats; nor can it move FP8 around
        if scale is None or scale.shape is None or len(scale.shape):
            continue  # nor a scale per channel
        for mover, index in list(output.uses()):
            if mover.op_type not in _REPEATED_BEHIND or index != 0:
                continue
            moved, attributes = mover.outputs[0], cast("dict[str, Any]", dict(mover.attributes))
            value = editor.before(
                mover,
                mover.op_type,
                [codes, *mover.inputs[1:]],
                f"{moved.name}/codes",
                dtype=codes.dtype,
                shape=moved.shape,
                **attributes,
            )
            new = editor.before(
                mover,
                "DequantizeLinear",
                [value, scale, zero_point],
                f"{moved.name}/dequantized",
                dtype=output.dtype,
                shape=moved.shape,
            )
            editor.replace(moved, new)
            editor.graph.remove(mover, safe=True)
            waiting.append(new.producer())
        if not list(output.uses()) and not output.is_graph_output():
            editor.graph.remove(node, safe=True)
