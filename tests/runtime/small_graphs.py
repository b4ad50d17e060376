"""One quantized convolution in the forms that matter to a builder, written with onnx.helper."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

INT8 = np.dtype(np.int8)
FP8 = h.tensor_dtype_to_np_dtype(T.FLOAT8E4M3FN)
CHANNELS = 32


class Graph:
    def __init__(self, inputs: dict[str, list[int | str]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [h.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in inputs.items()]

    def constant(self, value: np.ndarray | np.generic | float, dtype: object = None) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(nh.from_array(np.asarray(value, dtype or np.asarray(value).dtype), name))
        return name

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"{operator}_{len(self.nodes)}"
        self.nodes.append(h.make_node(operator, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def save(self, path: Path, output: str, shape: list[int | str], opset: int = 21) -> Path:
        value = h.make_tensor_value_info(output, T.FLOAT, shape)
        graph = h.make_graph(self.nodes, "graph", self.inputs, [value], self.initializers)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def row(graph: Graph, time: str, rows: int) -> str:
    """Row of the table: the number of edges below the time."""
    edges = graph.constant(np.linspace(50, 950, rows - 1, dtype=np.float32))
    below = graph.add("Less", edges, graph.add("Unsqueeze", time, graph.constant(np.array([1]))))
    return graph.add(
        "ReduceSum", graph.add("Cast", below, to=T.INT64), graph.constant(np.array([1])), keepdims=0, name="row"
    )


def conv(path: Path, form: str, *, code: np.dtype = INT8, batch: int | str = 2) -> Path:
    """SiLU, quantize, dequantize, a convolution named "conv", residual add.

    ``form``: "static"; "ratio" (the lowering); "gather" (QuantizeLinear's scale looked up in the table);
    "gather0d" (the same, as a scalar).
    """
    rng = np.random.default_rng(0)
    shape: list[int | str] = [batch, CHANNELS, 8, 8]
    graph = Graph({"x": shape} | ({} if form == "static" else {"timestep": [1]}))
    x = graph.add("Mul", "x", graph.add("Sigmoid", "x"))
    table = np.linspace(0.02, 0.05, 8, dtype=np.float32)
    zero, zeros = graph.constant(np.zeros((), code)), graph.constant(np.zeros(1, code))
    rows = None if form == "static" else row(graph, "timestep", len(table))
    if form == "static":
        scale = graph.constant(np.float32(0.02))
        codes = graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, scale, zero), scale, zero)
    elif form == "ratio":
        columns = np.stack([table, table / table.min()], 1).reshape(-1, 2, 1, 1)
        s, ratio = (graph.add("Gather", graph.constant(columns[:, [i]]), rows, axis=0) for i in range(2))
        quantized = graph.add("QuantizeLinear", graph.add("Div", x, s), graph.constant(np.float32(1)), zero)
        codes = graph.add("DequantizeLinear", quantized, graph.constant(table.min()), zero)
    else:
        scale = graph.add("Gather", graph.constant(table), rows, axis=0)
        if form == "gather0d":
            scale, zeros = graph.add("Squeeze", scale, graph.constant(np.array([0]))), zero
        axis = {} if form == "gather0d" else {"axis": 0}
        quantized = graph.add("QuantizeLinear", x, scale, zeros, **axis)
        codes = graph.add("DequantizeLinear", quantized, scale, zeros, **axis)
    weight = graph.add(
        "DequantizeLinear",
        graph.constant(rng.integers(-8, 8, (CHANNELS, CHANNELS, 3, 3)).astype(code)),
        graph.constant(np.full(CHANNELS, 0.01, np.float32)),
        graph.constant(np.zeros(CHANNELS, code)),
        axis=0,
    )
    bias = np.ones((1, CHANNELS, 1, 1), np.float32)
    y = graph.add("Conv", codes, weight, pads=[1, 1, 1, 1], name="conv")
    if form == "ratio":
        y = graph.add("Mul", y, ratio)
    y = graph.add("Add", graph.add("Add", y, graph.constant(bias)), x)
    return graph.save(path, y, shape)
