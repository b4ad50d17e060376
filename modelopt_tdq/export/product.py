"""Where a quantized activation goes: the products that can take its codes.

A quantized value may pass through operators that commute with a scale (transpositions, reshapes, a
constant factor) before it reaches a convolution or a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.errors import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CONVOLUTIONS",
    "LAYOUT",
    "PRODUCTS",
    "Path",
    "bias_of",
    "computes_bias",
    "constant_of",
    "offset_problem",
    "pads_of",
    "paths_to_products",
    "per_sample_problem",
    "tokens_problem",
]

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = (*CONVOLUTIONS, "MatMul", "Gemm")

#: Only move values around; a constant stays one.
LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast")


@dataclass(frozen=True)
class Path:
    """From a marker to one operand of a product.

    Attributes:
        product: The node.
        index: Of the operand.
        chain: The nodes in between.
    """

    product: ir.Node
    index: int
    chain: tuple[ir.Node, ...]


def constant_of(value: ir.Value | None) -> Any | None:
    """The constant in ``value`` as a NumPy array, or None."""
    if value is None:
        return None
    tensor = require("onnx_ir", "onnx").convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def pads_of(product: ir.Node) -> list[int]:
    """The zero padding of a convolution, as its attribute has it; empty for any other product."""
    return list(product.attributes.get_ints("pads", [])) if product.op_type == "Conv" else []


def _commutes_with_scale(node: ir.Node, index: int) -> bool:
    if node.op_type in LAYOUT:
        return index == 0
    if node.op_type == "Mul":
        factor = constant_of(node.inputs[1 - index])
        return factor is not None and factor.size == 1
    if node.op_type == "Pad" and index == 0:
        fill = constant_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0
        return fill is not None and not fill
    return False


def paths_to_products(value: ir.Value, chain: tuple[ir.Node, ...] = ()) -> list[Path] | str:
    """All paths from ``value`` to products, or why it does not only go into products."""
    if value.is_graph_output():
        return "it is an output of the model"
    paths: list[Path] = []
    for node, index in value.uses():
        if node.domain == "" and node.op_type in PRODUCTS and index < 2:
            paths.append(Path(node, index, chain))
        elif node.domain == "" and _commutes_with_scale(node, index):
            further = paths_to_products(node.outputs[0], (*chain, node))
            if isinstance(further, str):
                return further
            paths += further
        else:
            return f"it goes into {node.op_type}, which is neither a convolution nor a matrix product"
    return paths


def _keeps_batch(node: ir.Node) -> bool:
    before, after = node.inputs[0], node.outputs[0]
    if node.op_type == "Transpose":
        return bool(node.attributes["perm"].as_ints()[0] == 0)
    if before is None or before.shape is None or after.shape is None or not len(before.shape) or not len(after.shape):
        return False
    # a row-major reshape that keeps the size of dimension 0 keeps what belongs to each of its rows
    return bool(before.shape[0] == after.shape[0])


def per_sample_problem(path: Path) -> str | None:
    """Why a factor per sample cannot move from the operand to the output of the product, if so."""
    product, operand, output = path.product, path.product.inputs[path.index], path.product.outputs[0]
    if not all(_keeps_batch(node) for node in path.chain):
        return "the batch does not stay in front between it and its product, and times are per sample"
    if product.op_type in CONVOLUTIONS and path.index == 0:
        return None
    smallest = 2 + path.index  # of a matrix [in, out], the rows are no samples
    if operand is None or operand.shape is None or output.shape is None or len(operand.shape) < smallest:
        return "the rows of its product's output are not the samples, and times are per sample"
    if len(operand.shape) != len(output.shape) or operand.shape[0] != output.shape[0]:
        return "the rows of its product's output are not the samples, and times are per sample"
    return None


def tokens_problem(path: Path) -> str | None:
    """Why a factor per token cannot move from the operand to the output of the product, if so."""
    if path.index == 0 and all(node.op_type in ("Cast", "Identity") for node in path.chain):
        operand, output = path.product.inputs[0], path.product.outputs[0]
        ranks = [None if value is None or value.shape is None else len(value.shape) for value in (operand, output)]
        if ranks[0] is not None and ranks[0] == ranks[1]:
            return None
    return "tokens have times of their own, and do not stay where they are between it and its product"


def offset_problem(path: Path, is_constant: Callable[[ir.Value | None], bool]) -> str | None:
    """Why ``offset * sum(weights)`` cannot take the place of the offset, if so."""
    product = path.product
    if product.op_type == "ConvTranspose":
        return "it has an offset, and the weights that an output of ConvTranspose sees differ along the borders"
    if path.index != 0 or not is_constant(product.inputs[1]):
        return "it has an offset, and the other operand of its product is no weight"
    if any(node.op_type not in LAYOUT for node in path.chain):
        return f"it has an offset, and passes through {path.chain[-1].op_type} before its product"
    transposed: int = product.attributes.get_int("transA", 0)
    if product.op_type == "Gemm" and transposed:
        return "it has an offset, and its product transposes it"
    if product.op_type == "Conv" and path.chain and any(product.attributes.get_ints("pads", [])):
        return "it has an offset, and is moved around before a convolution that pads"
    if product.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "it has an offset, and the padding of its convolution is automatic"
    return None


def bias_of(product: ir.Node) -> tuple[Any | None, ir.Value]:
    """The constant bias [C] of a product, its own or that of an Add behind it; and the value that includes it.

    None where there is none, or it is computed: see :func:`computes_bias`.
    """
    output = product.outputs[0]
    if len(product.inputs) > 2 and product.inputs[2] is not None:
        bias = constant_of(product.inputs[2])
        if bias is None:
            return None, output
        return bias.astype(np.float64).reshape(-1) * product.attributes.get_float("beta", 1.0), output
    uses = output.uses()
    if product.op_type == "MatMul" and len(uses) == 1 and not output.is_graph_output():
        node, index = next(iter(uses))
        bias = constant_of(node.inputs[1 - index]) if node.op_type == "Add" and len(node.inputs) == 2 else None
        if bias is not None and bias.ndim == 1 and output.shape is not None and bias.shape[0] == output.shape[-1]:
            return bias.astype(np.float64), node.outputs[0]
    return None, output


def computes_bias(product: ir.Node) -> bool:
    """Whether the bias of a product is no constant."""
    return len(product.inputs) > 2 and product.inputs[2] is not None and constant_of(product.inputs[2]) is None
