"""Runs an exported graph in float64, where two graphs that mean the same agree to many digits.

In float32 they do not: a rounding difference in one layer flips a code in the next, and a handful of
flips looks like a small bug.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that holds float64 wherever ``model`` holds float32."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    for tensor in graph.initializer:
        _convert(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _convert(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
        if node.op_type in ("LayerNormalization", "GroupNormalization"):
            kept = [attribute for attribute in node.attribute if attribute.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("stash_type", int(TensorProto.DOUBLE))])
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return double


def _convert(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


class QuantizeLinear(OpRun):
    op_domain = ""

    def _run(self, x: Any, scale: Any, zero_point: Any, **_: Any) -> tuple[Any]:
        quotient = x / np.reshape(scale, ())
        if zero_point.dtype == np.int8:
            return (np.clip(np.rint(quotient), -128, 127),)
        return (torch.from_numpy(np.clip(quotient, -448, 448)).to(torch.float8_e4m3fn).double().numpy(),)


class DequantizeLinear(OpRun):
    op_domain = ""

    def _run(self, x: Any, scale: Any, zero_point: Any, axis: int | None = None, **_: Any) -> tuple[Any]:
        shape = [1] * x.ndim
        if np.ndim(scale) and np.size(scale) > 1:
            shape[1 if axis is None else axis] = -1
        return (x.astype(np.float64) * np.reshape(scale, shape),)


class LayerNormalization(OpRun):
    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
        centered = x - x.mean(axis, keepdims=True)
        y = centered / np.sqrt(np.square(centered).mean(axis, keepdims=True) + float(epsilon)) * scale
        return (y if bias is None else y + bias,)


class Conv(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Any,
        w: Any,
        b: Any = None,
        dilations: Any = None,
        group: Any = None,
        pads: Any = None,
        strides: Any = None,
        **_: Any,
    ) -> tuple[Any]:
        rank = x.ndim - 2
        pads = pads or [0] * 2 * rank
        amounts = [n for axis in reversed(range(rank)) for n in (pads[axis], pads[axis + rank])]
        function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        arguments = [functional.pad(torch.from_numpy(np.ascontiguousarray(x)), amounts), torch.from_numpy(w)]
        bias = None if b is None else torch.from_numpy(b)
        return (
            function(
                *arguments, bias, tuple(strides or [1] * rank), 0, tuple(dilations or [1] * rank), group or 1
            ).numpy(),
        )


class ConvTranspose(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Any,
        w: Any,
        b: Any = None,
        dilations: Any = None,
        group: Any = None,
        output_padding: Any = None,
        pads: Any = None,
        strides: Any = None,
        **_: Any,
    ) -> tuple[Any]:
        rank = x.ndim - 2
        function = (functional.conv_transpose1d, functional.conv_transpose2d)[rank - 1]
        bias = None if b is None else torch.from_numpy(b)
        padding = tuple((pads or [0] * 2 * rank)[:rank])
        outer = tuple(output_padding or [0] * rank)
        arguments = (torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(w), bias)
        return (
            function(
                *arguments, tuple(strides or [1] * rank), padding, outer, group or 1, tuple(dilations or [1] * rank)
            ).numpy(),
        )


def run_double(model: onnx.ModelProto, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of ``model`` computed in float64, by name."""
    operators = [QuantizeLinear, DequantizeLinear, LayerNormalization, Conv, ConvTranspose]
    evaluator = ReferenceEvaluator(to_double(model), new_ops=operators)
    feeds = {}
    for name, value in inputs.items():
        array = np.asarray(value)
        feeds[name] = array.astype(np.float64) if array.dtype == np.float32 else array
    return dict(zip((o.name for o in model.graph.output), evaluator.run(None, feeds), strict=True))
