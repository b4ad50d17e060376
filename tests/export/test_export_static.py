"""What does not depend on time is exported as any static quantization is: no lookup, no corrections."""

from __future__ import annotations

from collections import Counter
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from support.export import LOWERINGS, Lowered, lowered, set_table, trace
from support.models import TinyDenoiser, calls, fast_config, loop, quantized
from support.zoo import ROWS, Zoo, quantized_zoo, sample
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

#: What only scales that depend on time need: the lookup, division in front, correction behind.
TEMPORAL = ("time/", "/quotient", "/ratio", "/scaled")

ARRAYS = ("scale", "offset", "dequant_scale", "dequant_offset")


@pytest.fixture(scope="module")
def zoo() -> tuple[Zoo, MarkerGraph]:
    model = quantized_zoo()
    return model, trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)})


def _operators(graph: Lowered) -> list[str]:
    return [node.op_type for node in graph.proto.graph.node]


def _lookup(graph: Lowered) -> list[str]:
    return [node.op_type for node in graph.proto.graph.node if node.output[0].startswith("time/")]


def _constant_rows(model: nn.Module, rows: int, offset: bool = False, dequant: bool = False) -> None:
    table = set_table(model, ROWS, offset=offset, dequant=dequant)
    first = {n: None if (v := getattr(table, n)) is None else v[:1].expand(rows, -1) for n in ARRAYS}
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps[:rows], names=table.names, **first))


@pytest.mark.parametrize("dequant", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_constant_columns_are_the_graph_of_one_row(zoo: Any, lowering: str, offset: bool, dequant: bool) -> None:
    model, graph = zoo
    _constant_rows(model, 1, offset, dequant)
    one = lowered(graph, lowering, model)
    _constant_rows(model, len(ROWS), offset, dequant)
    many = lowered(graph, lowering, model)
    assert _operators(one) == _operators(many)
    assert one.proto.graph.initializer == many.proto.graph.initializer
    assert not [n.output[0] for n in one.proto.graph.node if any(part in n.output[0] for part in TEMPORAL)]


@pytest.mark.parametrize("dequant", [False, True])
def test_ratio_of_a_static_model_is_its_reference(zoo: Any, dequant: bool) -> None:
    model, graph = zoo
    _constant_rows(model, len(ROWS), dequant=dequant)
    reference, ratio = (lowered(graph, lowering, model) for lowering in LOWERINGS)
    assert Counter(_operators(ratio)) == Counter(_operators(reference))
    feeds = {"sample": sample(seed=3), "timestep": 500.0}
    found = [OnnxRuntimeSession(g.proto)(feeds) for g in (reference, ratio)]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_static_columns_stay_out_of_the_table(zoo: Any) -> None:
    model, graph = zoo
    table = set_table(model, ROWS)
    scale = table.scale.clone()
    scale[:, 2:] = scale[:1, 2:]
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps, scale, table.names))
    mixed = lowered(graph, "ratio", model)
    shapes = {tensor.name: list(tensor.dims) for tensor in mixed.proto.graph.initializer}
    assert shapes["time/table"] == [len(ROWS), 4, 1, 1]  # scale and ratio of two quantizers
    assert _lookup(mixed).count("Gather") == 1


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_lookup_serves_all_quantizers(zoo: Any, lowering: str) -> None:
    model, graph = zoo
    set_table(model, ROWS, offset=True)
    exported = lowered(graph, lowering, model)
    assert _lookup(exported) == ["Reshape", "Greater", "Cast", "ReduceSum", "Cast", "Gather", "Split"]


@pytest.mark.parametrize("bits", [8, 4])
def test_modelopts_own_static_quantizers_export_too(bits: int, tmp_path: Any) -> None:
    """Its quantizer multiplies by qmax / amax in place of dividing, so inputs with exact quotients are used."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv1d(8, 4, 1)).eval()
    model.pop(1)
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None}},
    ]
    largest = 2 ** (bits - 1) - 1
    x = torch.randint(-largest, largest + 1, (3, 16)) / 4.0
    x[0, 0] = largest / 4.0
    mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, lambda quantized: quantized(x))
    for lowering in LOWERINGS:
        report = tdq.export_onnx(model, tmp_path / "m.onnx", {"input": x}, lowering=lowering)
        assert report.quantized == ("0.input_quantizer", "0.weight_quantizer")
        with torch.no_grad():
            expected = model(x).numpy()
        session = OnnxRuntimeSession(report.path, codes=True)
        found = session({"input": x})
        np.testing.assert_allclose(found["output"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["0.input_quantizer/codes"], x * 4)
        assert [n.op_type for n in onnx.load(report.path).graph.node].count("QuantizeLinear") == 1


@pytest.mark.parametrize("bits", [8, (4, 3)])
def test_one_row_is_modelopts_static_graph_node_for_node(bits: Any) -> None:
    config = fast_config(weight_bits=bits, activation_bits=bits)
    static = mtq.quantize(TinyDenoiser().eval(), {**config, "algorithm": "max"}, loop(calls()))
    torch.manual_seed(0)
    temporal = quantized(weight_bits=bits, activation_bits=bits)
    temporal.load_state_dict(static.state_dict(), strict=False)
    names = tdq.scale_table(temporal).names
    scales = [static.get_submodule(n).amax / static.get_submodule(n).maxbound for n in names]
    tdq.set_scale_table(temporal, tdq.ScaleTable(torch.zeros(1), torch.stack(scales)[None], names))
    inputs = {"sample": calls()[0][0], "timestep": torch.tensor(300.0)}
    graphs = [lowered(trace(model, inputs), "ratio").proto.graph for model in (static, temporal)]
    assert [node.op_type for node in graphs[0].node].count("QuantizeLinear") == 3
    assert graphs[0].node == graphs[1].node
    assert {t.name: t for t in graphs[0].initializer} == {t.name: t for t in graphs[1].initializer}
