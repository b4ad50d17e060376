"""Layer by layer: every layer is given the reference's codes, and answers with its own.

Behind the first layer that differs, all codes differ. So the graph under test is cut in front of every layer: what
a layer computes with are the reference's codes, and a difference is that of this layer alone. Both functions make
ordinary ONNX graphs, for ``polygraphy run`` as well as for :func:`~modelopt_tdq.compare.compare_model`.

    "<quantizer>/codes:int8" or ":fp8"   outputs, float32: the codes (NumPy has no FP8)
    "<quantizer>/codes:given"            inputs, float32: the codes that the layer computes with
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelopt_tdq.errors import TdqError, require

if TYPE_CHECKING:
    import onnx

__all__ = ["Codes", "codes_by_quantizer", "given_codes", "returning_codes", "with_given_codes"]

#: Suffix of the graph inputs that take the place of a layer's own codes.
GIVEN = ":given"

#: Suffix of what layers read in place of their own codes.
_READ = ":read"

_OUTPUT = re.compile(r"(?P<quantizer>.+)/codes(?P<call>_\d+)?:(?P<format>int8|fp8)")


@dataclass(frozen=True)
class Codes:
    """The codes of one quantizer, as a graph returned them.

    Attributes:
        values: Any shape.
        fp8: Whether they are FP8 E4M3 values; otherwise they are integers.
    """

    values: np.ndarray[Any, Any]
    fp8: bool


def codes_by_quantizer(outputs: Iterable[tuple[str, Any]]) -> dict[str, Codes]:
    """The codes among the outputs of a graph, by quantizer, in the order of the outputs.

    Args:
        outputs: Pairs of name and array. Other outputs are left out.
    """
    found = {}
    for name, values in outputs:
        match = _OUTPUT.fullmatch(name)
        if match is not None:
            found[match["quantizer"] + (match["call"] or "")] = Codes(np.asarray(values), match["format"] == "fp8")
    return found


def given_codes(outputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of :func:`with_given_codes` for one call.

    Args:
        outputs: What the reference made by :func:`returning_codes` returned.
    """
    return {
        name.rpartition(":")[0] + GIVEN: np.asarray(values, np.float32)
        for name, values in outputs.items()
        if _OUTPUT.fullmatch(name)
    }


def returning_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` that also returns the codes of all activation quantizers, as float32."""
    kinds = _code_tensors(model)
    return _with_nodes(model, kinds, {name: [_output_node(name, kind)] for name, kind in kinds.items()})


def with_given_codes(model: onnx.ModelProto, reference: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose layers compute with codes that they are given, and which returns their own.

    An input "<quantizer>/codes:given" takes the place of the codes of each quantizer, quantized with scale 1: it
    changes nothing, and backends keep their low-precision kernels. A layer that pads explicitly (as those with
    an offset do) is given its interior, and keeps its own border.

    Args:
        model: The graph under test.
        reference: The graph that the given codes come from; its names and shapes of codes are looked at.

    Raises:
        TdqError: The two have no quantizer in common.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    kinds, wanted = _code_tensors(model), _code_tensors(reference)
    tensors = {name: kind for name, kind in kinds.items() if wanted.get(name) == kind}
    if not tensors:
        raise TdqError(
            "model",
            list(kinds)[:3],
            f"no quantizer in common with the reference, which has {list(wanted)[:3]}",
            "Export both from the same model, and leave their tensors' names as they are",
        )
    producers = {output: node for node in model.graph.node for output in node.output}
    behind = {}
    for name, kind in tensors.items():
        source, pads, border = name + GIVEN, _pads(producers, name), []
        if pads is not None:
            border = _in_own_border(name, pads, kind)
            source = border[-1].output[0]
        behind[name] = [_output_node(name, kind), *border, _node("QuantizeLinear", source, f"{name}{_READ}", kind)]
    cut = _with_nodes(model, tensors, behind)
    for node in cut.graph.node:
        for position, name in enumerate(node.input):
            if name in tensors and node.output[0] != f"{name}:{tensors[name]}":
                node.input[position] = f"{name}{_READ}"
    shapes = _shapes(reference)
    cut.graph.input.extend(_value(name + GIVEN, shapes.get(name)) for name in tensors)
    return cut


def _code_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """The tensors of codes of a graph, in order; their number formats, "int8" or "fp8"."""
    onnx = require("onnx", "onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    fp8 = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}
    return {
        node.output[0]: "fp8" if types.get(node.input[2] if len(node.input) > 2 else "") in fp8 else "int8"
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


#: Names of the constants of the added nodes.
_ONE, _ZERO, _NAN = "given_codes/one", "given_codes/zero_", "given_codes/nan"


def _with_nodes(
    model: onnx.ModelProto, returned: Mapping[str, str], behind: Mapping[str, list[onnx.NodeProto]]
) -> onnx.ModelProto:
    """A copy with further nodes behind those that compute some tensors of codes, and these codes as outputs."""
    onnx = require("onnx", "onnx")
    extended = copy.deepcopy(model)
    del extended.graph.node[:]
    for node in model.graph.node:
        extended.graph.node.append(node)
        extended.graph.node.extend(behind.get(node.output[0], []))
    shapes = _shapes(model)
    extended.graph.output.extend(_value(f"{name}:{kind}", shapes.get(name)) for name, kind in returned.items())
    types, make = onnx.TensorProto, onnx.helper.make_tensor
    zeros = {"int8": types.INT8, "fp8": types.FLOAT8E4M3FN}
    constants = [make(_ONE, types.FLOAT, [], [1.0]), make(_NAN, types.FLOAT, [], [math.nan])]
    constants += [make(_ZERO + kind, zeros[kind], [], [0.0 if kind == "fp8" else 0]) for kind in set(returned.values())]
    used = {name for node in extended.graph.node for name in node.input}
    extended.graph.initializer.extend(constant for constant in constants if constant.name in used)
    return extended


def _node(op_type: str, source: str, target: str, kind: str) -> onnx.NodeProto:
    """QuantizeLinear or DequantizeLinear with scale 1: codes from their values in float32, and back."""
    helper = require("onnx", "onnx").helper
    node: onnx.NodeProto = helper.make_node(op_type, [source, _ONE, _ZERO + kind], [target], name=target)
    return node


def _output_node(name: str, kind: str) -> onnx.NodeProto:
    return _node("DequantizeLinear", name, f"{name}:{kind}", kind)


def _shapes(model: onnx.ModelProto) -> dict[str, Any]:
    """Those that a graph tells of the tensors in it."""
    values = model.graph.value_info
    return {v.name: v.type.tensor_type.shape for v in values if v.type.tensor_type.HasField("shape")}


def _value(name: str, shape: Any | None) -> Any:
    """float32, of this shape."""
    onnx = require("onnx", "onnx")
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    if shape is not None:
        value.type.tensor_type.shape.CopyFrom(shape)
    return value


def _pads(producers: Mapping[str, onnx.NodeProto], codes: str) -> str | None:
    """Tensor of the sizes by which a quantizer pads its input, if it does."""
    prefix = codes.rpartition("/")[0] + "/"
    node = producers[codes]
    while node.input and node.input[0] in producers and node.input[0].startswith(prefix):
        node = producers[node.input[0]]
        if node.op_type == "Pad":
            return str(node.input[1])
    return None


def _in_own_border(name: str, pads: str, kind: str) -> list[onnx.NodeProto]:
    """The given codes inside, a layer's own around them."""
    make, base = require("onnx", "onnx").helper.make_node, f"{name}{GIVEN}"
    return [
        make("Pad", [base, pads, _NAN], [f"{base}/interior"], name=f"{base}/interior"),
        make("IsNaN", [f"{base}/interior"], [f"{base}/is_border"], name=f"{base}/is_border"),
        make(
            "Where",
            [f"{base}/is_border", f"{name}:{kind}", f"{base}/interior"],
            [f"{base}/padded"],
            name=f"{base}/padded",
        ),
    ]
