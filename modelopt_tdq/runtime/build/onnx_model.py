"""What has to be known of an ONNX file before it is built: its inputs, types and quantized layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.plugin import PLUGIN_DOMAIN
from modelopt_tdq.export.product import LAYOUT, PRODUCTS

__all__ = ["OnnxFacts", "PluginNode", "external_file", "quantized_layers", "read_onnx"]

#: Operators whose output is as large as the numbers of their input say.
_SIZED_BY_NUMBERS = ("NonZero", "Compress", "Unique", "NonMaxSuppression")

#: What they give does not depend on numbers.
_SIZES = ("Shape", "Size")


@dataclass(frozen=True, order=True)
class PluginNode:
    """A plugin that the graph needs, as TensorRT's registry knows it."""

    namespace: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.namespace}::{self.name}" if self.namespace else self.name


@dataclass(frozen=True)
class OnnxFacts:
    """Facts of an ONNX file.

    Attributes:
        inputs: Name to shape; an open dimension is its name, or ``"?"``.
        quantized: Nodes with two quantized operands, name to operator; see :func:`quantized_layers`.
        quantized_types: ``INT8``, ``FP8`` or others, those that some QuantizeLinear produces.
        external_data: Files with weights stored beside the model.
        plugins: Plugins of TensorRT that its nodes name.
        metadata: What the file says about itself, by key.
        sized_by: Inputs whose numbers decide how large tensors of the graph are.
    """

    inputs: Mapping[str, tuple[int | str, ...]]
    quantized: Mapping[str, str]
    quantized_types: frozenset[str]
    external_data: tuple[Path, ...]
    plugins: tuple[PluginNode, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    sized_by: tuple[str, ...] = ()


def read_onnx(path: Path) -> OnnxFacts:
    """Read an ONNX file, without the weights it stores elsewhere.

    Raises:
        TdqError: There is no such file, it holds no ONNX model, or it names weights outside of its folder.
        MissingExtraError: ``onnx`` is not installed.
    """
    onnx = require("onnx", "onnx")
    if not path.is_file():
        raise TdqError("onnx_path", str(path), "no such file", "Write it with modelopt_tdq.export_onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except require("google.protobuf.message", "onnx").DecodeError as error:
        raise TdqError("onnx_path", str(path), f"not an ONNX model ({error})", "Pass an .onnx file") from error
    if not model.graph.node:
        raise TdqError("onnx_path", str(path), "an empty graph, or no ONNX model at all", "Pass an .onnx file")
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in initializers}
    files = {
        external_file(path, entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    existing = tuple(sorted(file for file in files if file.is_file()))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return OnnxFacts(
        inputs,
        quantized_layers(model),
        _quantized_types(onnx, model),
        existing,
        _plugins(model),
        metadata,
        _sized_by(model, inputs),
    )


def external_file(path: Path, location: str) -> Path:
    """The file beside ``path`` that its graph names for weights.

    Raises:
        TdqError: It is not below the folder of ``path``: whoever wrote the graph would have files read that are none of
            its business. Links are followed, as caches of downloads keep files elsewhere.
    """
    if Path(location).is_absolute() or os.path.normpath(location).startswith(os.pardir):
        raise TdqError(
            "onnx_path",
            str(path),
            f"its weights are said to be in {location!r}, outside of its folder",
            "Do not use a file that you do not trust; export it again with modelopt_tdq.export_onnx",
        )
    return path.parent / location


def _sized_by(model: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order of the inputs."""
    producer = {output: node for node in model.graph.node for output in node.output}
    waiting = [name for node in model.graph.node if node.op_type in _SIZED_BY_NUMBERS for name in node.input]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        node = producer.get(name)
        if name not in seen and (node is None or node.op_type not in _SIZES):
            seen.add(name)
            waiting += node.input if node is not None else []
    return tuple(name for name in inputs if name in seen)


def _plugins(model: Any) -> tuple[PluginNode, ...]:
    found = set()
    for node in model.graph.node:
        if node.domain == PLUGIN_DOMAIN:
            texts = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.s}
            found.add(PluginNode(texts.get("plugin_namespace", ""), node.op_type, texts.get("plugin_version", "1")))
    return tuple(sorted(found))


def quantized_layers(model: Any) -> dict[str, str]:
    """Convolutions and products whose two operands are both codes (they come from a DequantizeLinear).

    Returns:
        Name of the node (``node_of_<output>`` where it has none, as TensorRT's parser calls it) to operator.
    """
    producer = {output: node for node in model.graph.node for output in node.output}

    def dequantized(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in LAYOUT:  # what may stand between the codes and their product
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    return {
        node.name or f"node_of_{node.output[0]}": node.op_type
        for node in model.graph.node
        if node.op_type in PRODUCTS and all(dequantized(name) for name in node.input[:2])
    }


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or "?"
        for size in value.type.tensor_type.shape.dim
    )


def _quantized_types(onnx: Any, model: Any) -> frozenset[str]:
    """Types of the zero points of all QuantizeLinear nodes, which are the types of their results."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                types[node.output[0]] = attribute.t.data_type
    names = set()
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        declared = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype" and attribute.i]
        code = declared[0] if declared else types.get(node.input[2]) if len(node.input) > 2 else None
        name = onnx.TensorProto.DataType.Name(onnx.TensorProto.UINT8 if code is None else code)
        names.add("FP8" if name.startswith("FLOAT8") else name)
    return frozenset(names)
