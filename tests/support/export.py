"""Exported graphs for tests, and a way to look inside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.activation import CODES_SUFFIX
from modelopt_tdq.export.context import LoweringContext
from modelopt_tdq.export.onnx_export import MarkerGraph, lower, marker_graph
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession, add_outputs
from support import oracle
from support.models import fast_config, loop, noise
from support.tables import with_dequantization

LOWERINGS = ("reference", "ratio")

#: Behind these a value is still the same layer's input or output.
_MOVES = ("Transpose", "Reshape", "Cast", "Pad")


@dataclasses.dataclass(frozen=True)
class Lowered:
    """One lowering of a model."""

    proto: onnx.ModelProto
    context: LoweringContext


def calibrated_at(
    kind: type[nn.Module], times: Sequence[float], dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    """A model of images of 4 x 8 x 8, quantized, and calibrated on four of them at each time."""
    torch.manual_seed(0)
    data = [(noise(4, 4, 8, 8, seed=int(time)).to(dtype), torch.tensor(time)) for time in times]
    return mtq.quantize(kind().eval().to(dtype), fast_config(**fields), loop(data))


def trace(model: nn.Module, inputs: dict[str, Any], dynamic_batch: bool = False) -> MarkerGraph:
    """The marker graph, which takes torch seconds; lowering it takes milliseconds."""
    return marker_graph(model, inputs, dynamic_batch=dynamic_batch)


def lowered(graph: MarkerGraph, lowering: str, model: nn.Module | None = None, *, table_input: bool = False) -> Lowered:
    """A lowering of ``graph``, which stays as it is; with the present scales of ``model`` if given.

    It has passed the full checker.
    """
    spec = graph.spec if model is None else read_quantization(model)
    copy = dataclasses.replace(graph, model=ir.from_proto(ir.to_proto(graph.model)), spec=spec)
    context = lower(copy, lowering, table_input=table_input)
    proto = ir.to_proto(copy.model)
    onnx.checker.check_model(proto, full_check=True)
    return Lowered(proto, context)


def set_table(
    model: nn.Module,
    times: list[float],
    *,
    offset: bool = False,
    dequant: bool = False,
    spread: float = 4.0,
    base: float = 0.02,
    bits: Any = 8,
    seed: int = 0,
) -> tdq.ScaleTable:
    """Give every temporal quantizer random scales, and offsets that are multiples of them; returns the table.

    With ``dequant``, two in three turn their codes back by scales and offsets of their own.
    """
    quantizers = tdq.temporal_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.num_bits = bits
    generator = torch.Generator().manual_seed(seed)
    shape = (len(times), len(quantizers))
    levels = oracle.code_limits(bits)[1] / 127
    scale = base / levels * spread ** torch.rand(*shape, generator=generator)
    low, high = oracle.code_limits(bits)
    steps = torch.randint(-(high // 2), -(low // 2), shape, generator=generator) if isinstance(bits, int) else 0
    table = tdq.ScaleTable(torch.tensor(times), scale, tuple(quantizers), scale * steps if offset else None)
    if dequant:
        table = with_dequantization(table)
    tdq.set_scale_table(model, table)
    return table


def codes_by_definition(graph: Lowered, model: nn.Module, inputs: dict[str, Any], time: Any) -> tuple[int, int]:
    """Compare the codes of every quantizer, for the inputs that it saw, with the oracle's.

    Returns:
        Values compared, and mismatches.
    """
    sources = _sources(graph.proto)
    session = OnnxRuntimeSession(add_outputs(graph.proto, [*sources, *set(sources.values())]))
    results = session(inputs)
    spec = graph.context.spec
    times = np.asarray(time).reshape(-1)
    table_times = tdq.scale_table(model).timesteps.numpy()
    compared = mismatched = 0
    for name, source in sources.items():
        activation = spec.activations[name.rpartition(CODES_SUFFIX)[0]]
        x = results[source]
        samples = np.split(x, len(times)) if len(times) > 1 else [x]
        for part, found, t in zip(samples, np.split(results[name], len(samples)), times, strict=True):
            index = oracle.row(float(t), table_times)
            scale = activation.scale[index if activation.scale.size > 1 else 0]
            offset = 0.0
            if activation.offset is not None:
                offset = activation.offset[index if activation.offset.size > 1 else 0]
            if activation.shift is not None:
                times_of_shift = graph.context.spec.shift_times
                at = oracle.row(float(t), times_of_shift) if len(activation.shift) > 1 else 0
                offset = np.float32(offset) + activation.shift[at]
            if activation.divisor is not None:
                scale, offset = (np.float32(value) * activation.divisor for value in (scale, offset))
            expected = oracle.codes(part, scale, offset, activation.num_bits)
            compared += expected.size
            mismatched += int((expected != found).sum())
    return compared, mismatched


def _sources(proto: onnx.ModelProto) -> dict[str, str]:
    """For each tensor of codes, the tensor that is quantized (with its padding, where that is explicit)."""
    producer = {output: node for node in proto.graph.node for output in node.output}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        prefix = node.output[0].rpartition(CODES_SUFFIX)[0] + "/"
        source = node.input[0]
        while source.startswith(prefix) and not source.startswith(f"{prefix}padded"):
            source = producer[source].input[0]
        found[node.output[0]] = source
    return found


def layer_results(graph: Lowered, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer with a quantized input saw and gave in ONNX Runtime, by the layer's name."""
    proto = graph.proto
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    producer = {output: node for node in proto.graph.node for output in node.output}
    constants = {tensor.name for tensor in proto.graph.initializer}
    pairs = {}
    for codes, quantized in _sources(proto).items():
        if not codes.endswith(f".input_quantizer{CODES_SUFFIX}"):
            continue
        layer = codes.removesuffix(f".input_quantizer{CODES_SUFFIX}")
        padded = quantized == f"{layer}.input_quantizer/padded"
        source = producer[quantized].input[0] if padded else quantized
        pairs[layer] = (source, _result(layer, codes, consumers, constants))
    session = OnnxRuntimeSession(add_outputs(proto, sorted({name for pair in pairs.values() for name in pair})))
    results = session(inputs)
    return {layer: tuple(torch.from_numpy(results[n]) for n in pair) for layer, pair in pairs.items()}


def _result(layer: str, name: str, consumers: dict[str, list[onnx.NodeProto]], constants: set[str]) -> str:
    """Follow the codes through the product of their layer, and what the lowering put behind it."""
    seen_product = False
    while True:
        following = consumers.get(name, [])
        if len(following) != 1:
            return name
        node = following[0]
        product = node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")
        own = node.output[0].startswith(f"{layer}/") or node.output[0].startswith(f"{layer}.input_quantizer/")
        moves = node.op_type in _MOVES and not seen_product
        bias = node.op_type == "Add" and any(n.startswith(layer) and n in constants for n in node.input)
        if not (own or (product and not seen_product) or moves or bias):
            return name
        seen_product = seen_product or product
        name = node.output[0]
