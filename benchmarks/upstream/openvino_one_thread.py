#!/usr/bin/env python3
"""Quantized linear layers in a row that OpenVINO's CPU plugin computes wrongly, or does not compile, with one thread.

Needs onnx, openvino and NumPy only. Prints, for each graph and number of threads, the largest difference from the graph
computed in NumPy, relative to the largest value, and how many FullyConnected kernels OpenVINO runs; or why it does not
compile. Seen with 2026.4.1 on x86-64 with AVX512-VNNI:

- "two layers": with one thread, both become one Subgraph, and the result is garbage. With two threads it is right, and
  with 8 rows wrong again. Needs weights with a scale per channel: with equal scales the numbers are right.
- "bias and factor": with one thread, "Can't allocate registers for a snippet: not enough registers".
- "[M, 1, K] between": codes of another rank between the layers; right, in two INT8 kernels. The workaround.

usage: python openvino_one_thread.py
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx.reference
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

SCALE = 0.03


def graph(sizes: tuple[int, ...], rows: int = 1, *, biased: bool = False, apart: bool = False) -> onnx.ModelProto:
    """Layers of INT8 codes, ``sizes[0]`` to ``sizes[1]`` and so on, of an input "x" [rows, sizes[0]]."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{operator}_{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def constant(values: Any, dtype: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), f"constant_{len(constants)}"))
        return str(constants[-1].name)

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, sizes[0]])]
    if biased:
        inputs.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1, 1]))
    scale, zero, axis, value = constant(SCALE), constant(0, np.int8), constant([1], np.int64), "x"
    for number, (width, channels) in enumerate(itertools.pairwise(sizes)):
        between = apart and number > 0
        codes = node("QuantizeLinear", node("Unsqueeze", value, axis) if between else value, scale, zero)
        activation = node("DequantizeLinear", node("Squeeze", codes, axis) if between else codes, scale, zero)
        stored = constant(random.integers(-127, 128, (channels, width)), np.int8)
        scales = constant(random.uniform(0.5, 1.5, channels) / 127 / np.sqrt(width))
        weight = node("DequantizeLinear", stored, scales, constant(np.zeros(channels), np.int8), axis=0)
        value = node("Gemm", activation, weight, transB=1)
        if biased:
            value = node("Add", node("Mul", value, "factor"), constant(random.normal(size=(1, channels))))
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [rows, sizes[-1]])]
    made = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


GRAPHS = {
    "two layers": lambda: graph((24, 12, 24)),
    "two layers, 8 rows": lambda: graph((64, 16, 64), 8),
    "two layers, bias and factor": lambda: graph((96, 8, 12), 3, biased=True),
    "two layers, [M, 1, K] between": lambda: graph((24, 12, 24), apart=True),
    "two layers, 8 rows, [M, 1, K] between": lambda: graph((64, 16, 64), 8, apart=True),
    "two layers, bias and factor, [M, 1, K] between": lambda: graph((96, 8, 12), 3, biased=True, apart=True),
}


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    values = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    return values | ({"factor": np.full((1, 1), 0.8, np.float32)} if len(model.graph.input) > 1 else {})


def difference(model: onnx.ModelProto, threads: int) -> tuple[float, int] | str:
    """From NumPy, relative to the largest value, and the number of FullyConnected kernels; or OpenVINO's message."""
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    try:
        read = ov.Core().read_model(model.SerializeToString())
        compiled = ov.compile_model(read, "CPU", config | {"INFERENCE_NUM_THREADS": threads})
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    inputs = feeds(model)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, inputs)[0]
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(next(iter(compiled(inputs).values())) - expected).max() / np.abs(expected).max()
    return float(np.nan_to_num(error, nan=np.inf)), kinds.count("FullyConnected")


def main() -> None:
    print("onnx", onnx.__version__, "openvino", ov.__version__)
    for name, make in GRAPHS.items():
        print(name)
        for threads in (1, 2):
            found = difference(make(), threads)
            said = (
                found if isinstance(found, str) else f"{found[0]:.3g} of the largest value, {found[1]} FullyConnected"
            )
            print(f"    {threads} thread{'s' * (threads > 1)}: {said}")


if __name__ == "__main__":
    main()
