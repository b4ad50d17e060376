"""Lowering "plugin" and its twin without the plugin: the graph of "ratio", looked up by one node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.export import lowered, set_table, trace
from support.zoo import ROWS, quantized_zoo, sample

import modelopt_tdq as tdq
from modelopt_tdq.export import plugin_free
from modelopt_tdq.export.plugin import PLUGIN_DOMAIN
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession, add_outputs

#: Rows, half-way between rows, just beside that, outside.
TIMES = [*ROWS, 125.0, float(np.nextafter(np.float32(125), np.float32(126))), 2000.0, -1.0]


@pytest.fixture(scope="module")
def zoo() -> tuple[Any, Any]:
    model = quantized_zoo()
    return model, trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)})


@pytest.fixture(scope="module")
def per_sample() -> tuple[Any, Any]:
    model = quantized_zoo()
    return model, trace(model, {"sample": sample(), "timestep": torch.tensor([0.0, 0.0])}, dynamic_batch=True)


def plugin_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "TdqScaleLookup"]


def equal(first: OnnxRuntimeSession, second: OnnxRuntimeSession, inputs: dict[str, Any]) -> None:
    one, other = first(inputs), second(inputs)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize(("offset", "dequant"), [(False, False), (True, False), (True, True)])
def test_twin_equals_ratio(zoo: Any, offset: bool, dequant: bool) -> None:
    model, graph = zoo
    set_table(model, ROWS, offset=offset, dequant=dequant)
    plugin = lowered(graph, "plugin", model).proto
    assert len(plugin_nodes(plugin)) == 1
    twin = plugin_free(plugin)
    onnx.checker.check_model(twin, full_check=True)
    assert not plugin_nodes(twin)
    assert {o.domain for o in twin.opset_import} == {""}
    ratio = lowered(graph, "ratio", model).proto
    sessions = OnnxRuntimeSession(ratio, codes=True), OnnxRuntimeSession(twin, codes=True)
    for time in TIMES:
        equal(*sessions, {"sample": sample(seed=3), "timestep": torch.tensor(time)})


def test_time_per_sample(per_sample: Any) -> None:
    model, graph = per_sample
    set_table(model, ROWS, offset=True)
    ratio, plugin = (lowered(graph, lowering, model).proto for lowering in ("ratio", "plugin"))
    sessions = OnnxRuntimeSession(ratio, codes=True), OnnxRuntimeSession(plugin_free(plugin), codes=True)
    for times in ([0.0, 600.0], [125.0, 999.0, 374.9]):
        equal(*sessions, {"sample": sample(len(times), seed=4), "timestep": torch.tensor(times)})


def test_node_is_what_the_parser_looks_up(zoo: Any) -> None:
    model, graph = zoo
    table = set_table(model, ROWS, offset=True)
    proto = lowered(graph, "plugin", model).proto
    (node,) = plugin_nodes(proto)
    assert node.domain == PLUGIN_DOMAIN == "trt.plugins"
    assert {a.name: a.s.decode() for a in node.attribute} == {"plugin_namespace": "tdq", "plugin_version": "1"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    packed, timesteps = constants[node.input[1]], constants[node.input[2]]
    np.testing.assert_array_equal(timesteps, np.array(ROWS, np.float32))
    assert packed.dtype == timesteps.dtype == np.float32
    # each scale and each offset once: scales are not stored a second time as ratios
    columns = {c.tobytes() for values in (table.scale, table.offset) for c in values.numpy().T if np.ptp(c)}
    assert {np.ascontiguousarray(c).tobytes() for c in packed.T} == columns


def test_ratios_are_those_of_the_ratio_graph(zoo: Any) -> None:
    model, graph = zoo
    set_table(model, ROWS, dequant=True)
    lowerings = {name: lowered(graph, name, model) for name in ("ratio", "plugin")}
    inputs = {"sample": sample(seed=3), "timestep": torch.tensor(250.0)}
    found = {}
    for name, graph_of in lowerings.items():
        proto = graph_of.proto if name == "ratio" else plugin_free(graph_of.proto)
        lookup, outputs = graph_of.context.lookup, []
        names = [n for n in graph_of.context.spec.activations if lookup.is_temporal(n, "ratio")]
        for quantizer in names:
            outputs.append(lookup.value(quantizer, "ratio", 4).name)
        results = OnnxRuntimeSession(add_outputs(proto, sorted(set(outputs))))(inputs)
        found[name] = np.array([results[output].item() for output in outputs])
    assert len(found["ratio"]) > 10
    np.testing.assert_array_equal(found["plugin"], found["ratio"])


def test_file(zoo: Any, tmp_path: Path) -> None:
    model, _ = zoo
    set_table(model, ROWS)
    inputs = {"sample": sample(), "timestep": torch.tensor(0.0)}
    report = tdq.export_onnx(model, tmp_path / "plugin.onnx", inputs, lowering="plugin")
    assert report.lowering == "plugin"
    twin = OnnxRuntimeSession(plugin_free(report.path))
    assert set(twin(inputs)) == set(OnnxRuntimeSession(lowered(zoo[1], "ratio", model).proto)(inputs))
    with pytest.raises(tdq.TdqError, match=r"TdqScaleLookup"):  # and not a word of a bug
        OnnxRuntimeSession(report.path)


def test_static_scales_need_no_plugin(zoo: Any) -> None:
    model, graph = zoo
    set_table(model, [500.0])
    plugin, ratio = (lowered(graph, lowering, model).proto for lowering in ("plugin", "ratio"))
    assert plugin.graph == ratio.graph
    with pytest.raises(tdq.TdqError, match="it has no node TdqScaleLookup"):
        plugin_free(plugin)


def test_parser_of_tensorrt_rtx_takes_the_twin_and_misses_the_plugin(zoo: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, graph = zoo
    set_table(model, ROWS)
    plugin, ratio = (lowered(graph, lowering, model).proto for lowering in ("plugin", "ratio"))
    for name, proto in {"plugin": plugin, "twin": plugin_free(plugin), "ratio": ratio}.items():
        onnx.save(proto, tmp_path / f"{name}.onnx")
    with pytest.raises(tdq.TdqError, match="TensorRT-RTX takes none"):
        tdq.build_engine(tmp_path / "plugin.onnx", tmp_path / "plugin.engine")
    twin, expected = (
        tdq.build_engine(tmp_path / f"{n}.onnx", tmp_path / f"{n}.engine", allow_float=True) for n in ("twin", "ratio")
    )
    assert twin.kernels <= expected.kernels
    assert sum(map(twin.low_precision, twin.quantized)) == sum(map(expected.low_precision, expected.quantized))
