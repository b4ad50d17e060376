"""OpenVINO: the ratio lowering keeps its INT8 kernels, and everything else computes in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.models import noise, quantized
from support.precisions import integer_kernels
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

pytest.importorskip("openvino")
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def paths(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)}
    folder = tmp_path_factory.mktemp("openvino")
    return {
        lowering: tdq.export_onnx(model, folder / f"{lowering}.onnx", inputs, lowering=lowering).path
        for lowering in ("reference", "ratio")
    }


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {"sample": noise(2, 3, 8, 8, seed=3), "timestep": 600.0}


def test_outputs_are_those_of_onnx_runtime(paths: dict[str, Path], inputs: dict[str, Any]) -> None:
    """OpenVINO multiplies by the reciprocal of a scale, so a code may differ; here none does."""
    for path in paths.values():
        session = OpenVinoSession(path, num_threads=1)
        assert session.inputs == {"sample": np.dtype(np.float32), "timestep": np.dtype(np.float32)}
        assert session.outputs == ["output"]
        found, expected = session(inputs)["output"], OnnxRuntimeSession(path)(inputs)["output"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_inputs_have_the_names_of_the_file(tmp_path: Path) -> None:
    """OpenVINO leaves out the product with ones, and calls the input by the name of the product as well."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ones = helper.make_tensor("ones", kind, [2], [1.0, 1.0])
    x, y = (helper.make_tensor_value_info(name, kind, [2]) for name in ("x", "y"))
    nodes = [helper.make_node("Mul", ["x", "ones"], ["a"]), helper.make_node("Cos", ["a"], ["y"])]
    graph = helper.make_graph(nodes, "graph", [x], [y], [ones])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    session = OpenVinoSession(tmp_path / "m.onnx", num_threads=1)
    assert list(session.inputs) == ["x"] == list(session.shapes)
    assert session.outputs == ["y"]
    np.testing.assert_allclose(session({"x": np.zeros(2, np.float32)})["y"], 1.0)


def test_results_outlive_the_next_call(paths: dict[str, Path], inputs: dict[str, Any]) -> None:
    session = OpenVinoSession(paths["ratio"])
    first = session(inputs)["output"]
    kept = first.copy()
    session({**inputs, "timestep": 20.0})
    np.testing.assert_array_equal(first, kept)


def test_ratio_keeps_int8_kernels_and_a_looked_up_scale_does_not(paths: dict[str, Path]) -> None:
    kernels = {name: integer_kernels(OpenVinoSession(path)) for name, path in paths.items()}
    assert kernels["ratio"].count("Convolution i8") == 2  # conv1 and conv2
    assert kernels["ratio"].count("FullyConnected i8") == 1  # mix
    assert kernels["ratio"].count("Convolution f32") == 2  # conv_in and conv_out, not quantized
    assert kernels["reference"].count("Convolution i8") == 0


def test_nothing_computes_in_half_precision(paths: dict[str, Path]) -> None:
    precisions = {kernel.split()[-1] for kernel in OpenVinoSession(paths["ratio"]).executed_precisions().values()}
    assert not precisions & {"bf16", "f16"}


def test_errors(paths: dict[str, Path], tmp_path: Path, inputs: dict[str, Any]) -> None:
    with pytest.raises(tdq.TdqError, match="no such file"):
        OpenVinoSession(tmp_path / "missing.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(tdq.TdqError, match="cannot compile"):
        OpenVinoSession(broken)
    with pytest.raises(tdq.TdqError, match="not the inputs of the graph"):
        OpenVinoSession(paths["ratio"])({"sample": inputs["sample"]})
