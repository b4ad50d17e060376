#!/usr/bin/env python3
"""Graphs with QuantizeLinear and DequantizeLinear that ONNX Runtime's optimizer changes or refuses.

Needs onnx and onnxruntime only. Prints, for each graph and each optimization level, the largest difference from the
graph without optimizations in steps of the result's scale, or why the graph does not load. Seen with 1.31.1 and 1.32.0
on x86-64:

- "linear layer, opset 21": does not load from ORT_ENABLE_EXTENDED on. MatMulAddFusion puts a Reshape behind
  DequantizeLinear, QDQPropagation repeats QuantizeLinear behind that with output_dtype = INT8 and the zero point, and
  QDQS8ToU8 makes the zero point UINT8 and leaves output_dtype as it is. With opset 20, or a bias [1, 1, C], it loads.
  "transposed, opset 21" is the same without the fusion.
- "bias in front of QuantizeLinear": differs from ORT_ENABLE_BASIC on. WeightBiasQuantization rounds the bias to a
  multiple of the product of the scales.
- "float weight in front of QuantizeLinear": the same transformer makes the weight INT8, per tensor.
- "weight alone": differs from ORT_ENABLE_EXTENDED on. MatMulNBits quantizes the activation, too (accuracy level 4).
- "FP8": does not load from ORT_ENABLE_EXTENDED on in 1.31, but in 1.32: MatMulIntegerToFloat does not take FP8.

usage: python onnxruntime_qdq.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
ROWS, WIDTH, CHANNELS = 64, 32, 16
X_SCALE, W_SCALE, Y_SCALE = 0.0531, 0.0127, 0.0233


class Graph:
    """Collects nodes and constants. The input is "x" [2, ROWS, WIDTH], or [ROWS, WIDTH], or an image."""

    def __init__(self, opset: int, shape: tuple[int, ...], fp8: bool = False) -> None:
        self.opset, self.shape = opset, shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.type = TensorProto.FLOAT8E4M3FN if fp8 else TensorProto.INT8
        self.constants.append(helper.make_tensor("zero", self.type, [], [0]))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def quantized(self, value: str, scale: float) -> str:
        name = self.constant(scale)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, name, "zero"), name, "zero")

    def weight(self, *shape: int) -> str:
        codes = np.random.default_rng(0).integers(-127, 128, shape)
        name = f"weight_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, self.type, shape, codes.reshape(-1)))
        return self.node("DequantizeLinear", name, self.constant(W_SCALE), "zero")

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * len(self.shape))],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def linear(opset: int = 21, bias: tuple[int, ...] = (CHANNELS,), fp8: bool = False) -> onnx.ModelProto:
    graph = Graph(opset, (2, ROWS, WIDTH), fp8)
    product = graph.node("MatMul", graph.quantized("x", X_SCALE), graph.weight(WIDTH, CHANNELS))
    return graph.model(graph.node("Add", product, graph.constant(np.linspace(-1, 1, CHANNELS).reshape(bias))))


def transposed(opset: int = 21) -> onnx.ModelProto:
    graph = Graph(opset, (2, WIDTH, ROWS))
    moved = graph.node("Transpose", graph.quantized("x", X_SCALE), perm=[0, 2, 1])
    return graph.model(graph.node("MatMul", moved, graph.weight(WIDTH, CHANNELS)))


def convolution(biased: bool, quantized_weight: bool) -> onnx.ModelProto:
    graph = Graph(20, (2, WIDTH, 8, 8))
    weight = graph.weight(CHANNELS, WIDTH, 1, 1)
    if not quantized_weight:
        weight = graph.constant(np.random.default_rng(1).normal(size=(CHANNELS, WIDTH, 1, 1)))
    inputs = [graph.quantized("x", X_SCALE), weight]
    if biased:
        inputs.append(graph.constant(np.linspace(-1, 1, CHANNELS)))
    return graph.model(graph.quantized(graph.node("Conv", *inputs), Y_SCALE))


def weight_alone() -> onnx.ModelProto:
    graph = Graph(20, (2, ROWS, WIDTH))
    return graph.model(graph.node("MatMul", "x", graph.weight(WIDTH, CHANNELS)))


GRAPHS = {
    "linear layer, opset 21": linear,
    "linear layer, opset 20": lambda: linear(opset=20),
    "linear layer, opset 21, bias [1, 1, C]": lambda: linear(bias=(1, 1, CHANNELS)),
    "transposed, opset 21": transposed,
    "transposed, opset 20": lambda: transposed(opset=20),
    "bias in front of QuantizeLinear": lambda: convolution(True, True),
    "no bias in front of QuantizeLinear": lambda: convolution(False, True),
    "float weight in front of QuantizeLinear": lambda: convolution(False, False),
    "weight alone": weight_alone,
    "FP8": lambda: linear(opset=20, bias=(1, 1, CHANNELS), fp8=True),
}


def run(model: onnx.ModelProto, level: str) -> np.ndarray[Any, Any] | str:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error).strip()
    shape = session.get_inputs()[0].shape
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    result: np.ndarray[Any, Any] = session.run(None, {"x": x})[0]
    return result


def main() -> None:
    print("onnx", onnx.__version__, "onnxruntime", ort.__version__)
    for name, make in GRAPHS.items():
        expected = run(make(), LEVELS[0])
        print(name)
        for level in LEVELS:
            found = run(make(), level)
            said = found if isinstance(found, str) else f"{np.abs(found - expected).max() / Y_SCALE:.6f} steps"
            print(f"    {level}: {said}")


if __name__ == "__main__":
    main()
