"""The entries of an engine as TensorRT lists them: fused kernels, the types they read, the ONNX nodes they serve."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modelopt_tdq.errors import TdqError

__all__ = ["LOW_PRECISION_TYPES", "EngineLayer", "parse_layers"]

#: The types of a quantized operand, as TensorRT prints them.
LOW_PRECISION_TYPES = frozenset({"Int8", "FP8", "Int4", "FP4"})

# Entries of the list that launch nothing: events between streams.
_NOT_A_KERNEL = frozenset({"signal", "wait"})
# Generated elementwise code. It may read codes only to turn them into floats, so it proves nothing.
_ELEMENTWISE = frozenset({"kgen", "PointWise", "PointWiseV2", "Reformat", "Scale", "NoOp"})
# TensorRT 11 and TensorRT-RTX print "Datatype: Int8", TensorRT 10 "Format/Datatype: ... Int8 format".
_TYPE_NAMES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT4": "Int4"}
_TYPE = re.compile(r"(?<![A-Za-z])Datatype: (.*?)(?:, [A-Z][A-Za-z]*: | \}|$)")
_TYPE_WORD = re.compile(r"\b(Float|Half|BFloat16|FP32|FP16|BF16|FP8|FP4|Int(?:4|8|32|64)|Bool|UInt8)\b", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\s|\x1e|\[|$)")


@dataclass(frozen=True)
class EngineLayer:
    """One entry of the engine, usually a kernel that several ONNX nodes were fused into.

    Attributes:
        name: TensorRT's name.
        kind: TensorRT's layer type: ``correlation`` (convolution), ``gemm``, ``kgen`` (elementwise) ...
        inputs: Types of the tensors it reads, constants excluded: ``Int8``, ``FP8``, ``Float``, ``Half`` ...
        outputs: Types of the tensors it writes.
        onnx_nodes: Names of the ONNX nodes it does (part of) the work of.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether it launches anything."""
        return self.kind not in _NOT_A_KERNEL

    @property
    def elementwise(self) -> bool:
        """Whether it is generated elementwise code, which multiplies no matrices (save tiny ones, in float)."""
        return self.kind in _ELEMENTWISE

    @property
    def low_precision(self) -> bool:
        """Whether it multiplies codes: a convolution or product with a quantized operand."""
        return not self.elementwise and not LOW_PRECISION_TYPES.isdisjoint(self.inputs)


def parse_layers(message: str) -> tuple[EngineLayer, ...]:
    """The entries of TensorRT's verbose ``Layers:`` message, printed when profiling verbosity is DETAILED.

    Raises:
        TdqError: An entry has another form.
    """
    lines = message.removeprefix("Layers:").lstrip("\n").split("\n\n", 1)[0].split("\n")
    return tuple(_parse_layer(line) for line in lines if line.strip())


def _parse_layer(line: str) -> EngineLayer:
    head = re.match(r"Name: (.*?), LayerType: (.*?), ", line)
    inputs, outputs = _bracket(line, ", Inputs: "), _bracket(line, ", Outputs: ")
    if head is None or inputs is None or outputs is None:
        raise TdqError(
            "layers",
            line,
            "TensorRT describes its layers in a form not known here",
            "Please report it with the version of TensorRT",
        )
    nodes = tuple(dict.fromkeys(_NODE.findall(line.rpartition("Metadata:")[2])))
    return EngineLayer(head[1], head[2], _types(inputs), _types(outputs), nodes)


def _bracket(line: str, field: str) -> str | None:
    """The bracketed list after ``field``."""
    start = line.find(field + "[")
    if start < 0:
        return None
    start += len(field)
    depth = 0
    for position in range(start, len(line)):
        depth += {"[": 1, "]": -1}.get(line[position], 0)
        if depth == 0:
            return line[start + 1 : position]
    return None


def _types(tensors: str) -> tuple[str, ...]:
    names = []
    for value in _TYPE.findall(tensors):
        word = _TYPE_WORD.search(value)
        name = word[1] if word else value
        names.append(_TYPE_NAMES.get(name.upper(), name))
    return tuple(names)
