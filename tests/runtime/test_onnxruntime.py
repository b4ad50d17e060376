"""The ONNX Runtime session: outputs by name, codes on demand, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.models import noise, quantized
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession, with_codes


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)}
    return tdq.export_onnx(model, tmp_path_factory.mktemp("ort") / "m.onnx", inputs, lowering="reference").path


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {"sample": noise(2, 3, 8, 8, seed=3), "timestep": 600}


def test_outputs_by_name(model: nn.Module, path: Path, inputs: dict[str, Any]) -> None:
    session = OnnxRuntimeSession(path, num_threads=1)
    assert session.inputs == {"sample": np.dtype(np.float32), "timestep": np.dtype(np.float32)}
    assert session.outputs == ["output"]
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(torch.from_numpy(session(inputs)["output"]), expected, rtol=1e-4, atol=2e-5)


def test_codes_are_integers_within_their_range(path: Path, inputs: dict[str, Any]) -> None:
    results = OnnxRuntimeSession(path, codes=True)(inputs)
    codes = {name: value for name, value in results.items() if name.endswith("/codes")}
    assert set(codes) == {f"{layer}.input_quantizer/codes" for layer in ("conv1", "conv2", "mix")}
    for value in codes.values():
        assert value.dtype == np.float32
        assert np.array_equal(value, np.rint(value))
        assert np.abs(value).max() <= 128


def test_codes_change_nothing(path: Path, inputs: dict[str, Any]) -> None:
    plain, observed = OnnxRuntimeSession(path)(inputs), OnnxRuntimeSession(path, codes=True)(inputs)
    np.testing.assert_array_equal(plain["output"], observed["output"])


def test_with_codes_leaves_its_argument_alone(path: Path) -> None:
    proto = onnx.load(path)
    before = proto.SerializeToString(deterministic=True)
    assert len(with_codes(proto).graph.output) == 4
    assert proto.SerializeToString(deterministic=True) == before


def test_basic_optimizations_keep_the_codes(path: Path, inputs: dict[str, Any]) -> None:
    none, basic = (OnnxRuntimeSession(path, codes=True, optimization=level)(inputs) for level in ("none", "basic"))
    for name in none:
        if name.endswith("/codes"):
            assert (none[name] != basic[name]).mean() < 1e-3, name


def test_integer_inputs_take_no_fractions(model: nn.Module, tmp_path: Path) -> None:
    sample = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300)}
    session = OnnxRuntimeSession(tdq.export_onnx(model, tmp_path / "m.onnx", sample).path)
    session({**sample, "timestep": 17.0})
    with pytest.raises(tdq.TdqError, match=r"timestep.*int64, which cannot hold this"):
        session({**sample, "timestep": 17.5})


def test_errors(path: Path, tmp_path: Path, inputs: dict[str, Any]) -> None:
    with pytest.raises(tdq.TdqError, match="no such file"):
        OnnxRuntimeSession(tmp_path / "missing.onnx")
    with pytest.raises(tdq.TdqError, match="no such level"):
        OnnxRuntimeSession(path, optimization="fast")  # type: ignore[arg-type]
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(tdq.TdqError, match="cannot load"):
        OnnxRuntimeSession(broken)
    with pytest.raises(tdq.TdqError, match="not the inputs of the graph"):
        OnnxRuntimeSession(path)({"sample": inputs["sample"]})


def test_an_operator_without_a_kernel_is_not_blamed_on_the_export() -> None:
    """Its types are right, and this version of ONNX Runtime has none for them."""
    names = ("condition", "yes", "no")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, [2]) for name in (*names, "y")]
    node = onnx.helper.make_node("Where", names, ["y"])
    graph = onnx.helper.make_graph([node], "choice", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(TdqError, match="another backend") as error:
        OnnxRuntimeSession(model)
    assert "Export" not in str(error.value)
