"""How a graph becomes files: what is in them, and what is in memory meanwhile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.models import TinyDenoiser, noise, quantized

import modelopt_tdq as tdq
from modelopt_tdq.export.markers import with_markers
from modelopt_tdq.export.onnx_file import write_onnx
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.export.spec import WeightSpec


def _graph(sizes: tuple[int, ...] = (3, 500, 70_000)) -> ir.Model:
    """The sum of constants, each as long as told and one after another in a file."""
    text = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    nodes, last, weights = [], text, []
    for size in sizes:
        values = np.arange(size, dtype=np.float32)
        weight = ir.Value(name=f"w{size}", const_value=ir.tensor(values, name=f"w{size}"))
        node = ir.node("Add", [last, weight], name=f"add{size}")
        node.outputs[0].name, node.outputs[0].dtype = f"y{size}", ir.DataType.FLOAT
        nodes.append(ir.node("ReduceMax", [node.outputs[0]], {"keepdims": 1}, name=f"max{size}"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = f"m{size}", ir.DataType.FLOAT
        nodes[-1].outputs[0].shape = ir.Shape([1])
        nodes.insert(-1, node)
        weights.append(weight)
        last = nodes[-1].outputs[0]
    graph = ir.Graph([text], [last], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="sums")
    return ir.Model(graph, ir_version=10, producer_name="test")


@pytest.mark.parametrize("small", [0, 256, 1 << 20])
def test_one_file_holds_what_protobuf_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr("modelopt_tdq.export.onnx_file.STAYS_IN_GRAPH", small)
    monkeypatch.setattr("modelopt_tdq.export.onnx_file._PIECE", 1000)
    write_onnx(_graph(), tmp_path / "sums.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["sums.onnx"]
    assert onnx.load(tmp_path / "sums.onnx") == ir.to_proto(_graph())


def test_weights_apart(tmp_path: Path) -> None:
    big = _graph((3, 300_000))
    write_onnx(big, tmp_path / "sums.onnx", apart=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sums.onnx", "sums.onnx.data"]
    assert (tmp_path / "sums.onnx").stat().st_size < 2000
    assert (tmp_path / "sums.onnx.data").stat().st_size == 4 * 300_000
    for found, expected in zip(onnx.load(tmp_path / "sums.onnx").graph.initializer, (3, 300_000), strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(found), np.arange(expected, dtype=np.float32))


def test_the_copy_for_export_has_the_weights_of_the_model() -> None:
    model = quantized()
    copied = with_markers(model)
    assert copied is not model
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert own == {name: parameter.data_ptr() for name, parameter in copied.named_parameters()}
    assert type(copied.conv1.input_quantizer) is not type(model.conv1.input_quantizer)
    assert "_amax" in model.conv1.weight_quantizer._buffers
    assert "_amax" not in copied.conv1.weight_quantizer._buffers  # torch would trace it
    assert torch.equal(copied.conv1.weight_quantizer._amax, model.conv1.weight_quantizer._amax)


def test_codes_are_computed_once_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: Counter[str] = Counter()
    codes = WeightSpec.codes.fget

    def counting(spec: WeightSpec) -> Any:
        computed[spec.name] += 1
        return codes(spec)  # type: ignore[misc]

    monkeypatch.setattr(WeightSpec, "codes", property(counting))
    model = quantized(TinyDenoiser(16).eval())
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)})
    assert computed == dict.fromkeys(read_quantization(model).weights, 1)
