"""Layer by layer: every layer is given the reference's codes, and answers with its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.compare.metrics import interior
from modelopt_tdq.errors import require

if TYPE_CHECKING:
    import onnx

__all__ = ["code_tensors", "given_codes", "with_given_codes"]

#: Suffix of the graph inputs that take the place of a layer's own codes.
GIVEN = ":given"


def code_tensors(model: onnx.ModelProto) -> dict[str, bool]:
    """The tensors of codes of a graph, in order; whether they are FP8."""
    onnx = require("onnx", "onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    fp8 = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}
    return {
        node.output[0]: types.get(node.input[2] if len(node.input) > 2 else "") in fp8
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def with_given_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with one float32 input ``"<codes>:given"`` per tensor of codes, read in its place.

    The tensors of codes themselves remain, and depend on the given codes of the layers before them only.
    """
    onnx = require("onnx", "onnx")
    cut = copy.deepcopy(model)
    tensors = code_tensors(model)
    for node in cut.graph.node:
        for position, name in enumerate(node.input):
            if name in tensors:
                node.input[position] = f"{name}{GIVEN}/cast"
    casts = []
    for name, fp8 in tensors.items():
        to = onnx.TensorProto.FLOAT8E4M3FN if fp8 else onnx.TensorProto.INT8
        cut.graph.input.append(onnx.helper.make_tensor_value_info(name + GIVEN, onnx.TensorProto.FLOAT, None))
        casts.append(
            onnx.helper.make_node("Cast", [name + GIVEN], [f"{name}{GIVEN}/cast"], name=f"{name}{GIVEN}/cast", to=to)
        )
    nodes = [*casts, *cut.graph.node]
    del cut.graph.node[:]
    cut.graph.node.extend(nodes)
    return cut


def given_codes(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What a layer gets to see in place of its own codes: the reference's, with its own padding around them.

    Args:
        reference: The reference's codes by name.
        own: Codes of the implementation under test by name, from a plain run on the same inputs.

    Returns:
        One array per entry of ``own``, of its shape; its own codes where the reference has none.
    """
    given = {}
    for name, codes in own.items():
        result = np.array(codes, np.float32)
        inside = interior(np.shape(reference[name]), result.shape) if name in reference else None
        if inside is not None:
            result[inside] = reference[name]
        given[name] = result
    return given
