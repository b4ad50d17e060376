"""Corrections of layers' outputs in the graph: equal to torch, in the nodes that are there without them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, Lowered, codes_by_definition, lowered, set_table, trace
from support.models import TIMES, quantized
from support.zoo import ROWS, Zoo, quantized_zoo, sample
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.onnx_export import MarkerGraph, lower
from modelopt_tdq.export.plugin import plugin_free
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.model.output_correction import correctable_layers, output_channels
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

#: Every third layer has a correction that does not depend on time.
STATIC = 3

CASES: dict[str, tuple[list[Tensor], bool]] = {
    "scalar": ([torch.tensor(t) for t in (0.0, 125.1, 600.0, -1.0)], False),
    "per_sample": ([torch.tensor(t) for t in ([0.0, 999.0], [374.9, 130.0, 1e9], [300.0] * 4)], True),
}


def correction_of(model: nn.Module, times: list[float], seed: int = 0) -> tdq.LayerCorrection:
    generator = torch.Generator().manual_seed(seed)
    gain, bias = {}, {}
    for number, (name, layer) in enumerate(correctable_layers(model).items()):
        shape = (1 if number % STATIC == 0 else len(times), output_channels(layer))
        gain[name] = 0.5 + torch.rand(*shape, generator=generator)
        bias[name] = torch.randn(*shape, generator=generator)
    return tdq.LayerCorrection(torch.tensor(times), gain, bias)


def corrected_zoo(times: list[float] = ROWS, **fields: Any) -> Zoo:
    model = quantized_zoo(**fields)
    tdq.set_layer_correction(model, correction_of(model, times))
    return model


@dataclasses.dataclass(frozen=True)
class Traced:
    model: Zoo
    graph: MarkerGraph
    times: list[Tensor]

    def inputs(self, time: Tensor) -> dict[str, Tensor]:
        return {"sample": sample(max(time.numel(), 2), seed=7), "timestep": time}


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest) -> Traced:
    model = corrected_zoo()
    times, dynamic = CASES[request.param]
    return Traced(model, trace(model, {"sample": sample(), "timestep": times[0]}, dynamic_batch=dynamic), times)


def differences(model: Zoo, found: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each layer's output, relative to its largest value."""
    with torch.no_grad():
        expected = model(**inputs)
    pairs = zip(model.names, expected, found.values(), strict=True)
    return {name: float(np.abs(got - want.numpy()).max() / want.abs().max()) for name, want, got in pairs}


@pytest.mark.parametrize(("bits", "offset", "dequant"), [(8, False, False), (4, True, False), ((4, 3), False, True)])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equals_torch(traced: Traced, lowering: str, bits: Any, offset: bool, dequant: bool) -> None:
    set_table(traced.model, ROWS, bits=bits, offset=offset, dequant=dequant)
    graph = lowered(traced.graph, lowering, traced.model)
    session = OnnxRuntimeSession(graph.proto)
    for time in traced.times:
        inputs = traced.inputs(time)
        wrong = {n: e for n, e in differences(traced.model, session(inputs), inputs).items() if e > 4e-6}
        assert not wrong, time


def test_corrections_matter(traced: Traced) -> None:
    """What the other tests compare would not be equal without them."""
    set_table(traced.model, ROWS)
    inputs = traced.inputs(traced.times[0])
    found = OnnxRuntimeSession(lowered(traced.graph, "ratio", traced.model).proto)(inputs)
    correction = tdq.layer_correction(traced.model)
    tdq.set_layer_correction(traced.model, None)
    changed = {name for name, error in differences(traced.model, found, inputs).items() if error > 0.05}
    tdq.set_layer_correction(traced.model, correction)
    assert changed >= set(traced.model.names) - {"attention", "attention_bmm"}


@pytest.mark.parametrize("offset", [False, True])
def test_lowerings_agree_in_float64(traced: Traced, offset: bool) -> None:
    set_table(traced.model, ROWS, offset=offset, seed=1)
    graphs = [lowered(traced.graph, lowering, traced.model) for lowering in LOWERINGS]
    inputs = {name: value.numpy() for name, value in traced.inputs(traced.times[1]).items()}
    reference, ratio = (run_double(graph.proto, inputs) for graph in graphs)
    for name, want, got in zip(traced.model.names, reference.values(), ratio.values(), strict=True):
        # factors and addends are rounded to float32 once, gains and biases too
        assert np.abs(got - want).max() / np.abs(want).max() < 2e-6, name


def test_codes_follow_the_definition(traced: Traced) -> None:
    set_table(traced.model, ROWS, bits=4, offset=True)
    graph = lowered(traced.graph, "ratio", traced.model)
    compared, mismatched = codes_by_definition(
        graph, traced.model, traced.inputs(traced.times[1]), traced.times[1].numpy()
    )
    assert compared > 1000
    assert mismatched == 0


def operators(graph: Lowered) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.proto.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


#: Several of its output channels share a scale of the weight, which cannot hold a gain of each.
IN_PLACE = "images.transposed_grouped"


def foldable(times: list[float]) -> tuple[Zoo, tdq.LayerCorrection, dict[str, Any]]:
    model = quantized_zoo(**({} if len(times) > 1 else {"bins": 1}))
    correction = correction_of(model, times)
    inputs = {"sample": sample(), "timestep": torch.tensor(0.0)}
    return model, correction.only(set(correction.names) - {IN_PLACE}), inputs


def test_no_node_is_added_behind_a_quantized_product() -> None:
    model, correction, inputs = foldable(ROWS)
    set_table(model, ROWS)
    before = lowered(trace(model, inputs), "ratio")
    tdq.set_layer_correction(model, correction)
    after = lowered(trace(model, inputs), "ratio")
    plain, corrected = operators(before), operators(after)
    bare = [name for name in correction.names if model.get_submodule(name).bias is None]
    large = [sum("/scaled" in node.name for node in graph.proto.graph.node) for graph in (before, after)]
    assert large[0] == large[1]  # the others multiply vectors of channels
    assert corrected["Add"] <= plain["Add"] + len(bare)
    assert corrected["Gather"] == plain["Gather"]  # one table for scales and corrections


def test_static_corrections_of_static_scales_leave_the_static_graph() -> None:
    model, correction, inputs = foldable([0.0])
    plain = operators(lowered(trace(model, inputs), "ratio"))
    tdq.set_layer_correction(model, correction)
    graph = lowered(trace(model, inputs), "ratio")
    added = {o: n - plain.get(o, 0) for o, n in operators(graph).items() if n != plain.get(o, 0)}
    assert added == {"Add": 1}  # tokens.linear3d_bare: a MatMul without a bias
    found = OnnxRuntimeSession(graph.proto)(inputs)
    assert max(differences(model, found, inputs).values()) < 4e-6


def test_rows_at_other_times_than_the_scales() -> None:
    model = corrected_zoo()
    graph = trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)})
    set_table(model, ROWS, offset=True)
    for times in ([0.0, 500.0], [100.0, 300.0, 600.0, 700.0, 900.0]):
        tdq.set_layer_correction(model, correction_of(model, times))
        session = OnnxRuntimeSession(lowered(graph, "ratio", model).proto)
        for time in (0.0, 249.0, 251.0, 460.0, 999.0):
            inputs = {"sample": sample(seed=7), "timestep": torch.tensor(time)}
            assert max(differences(model, session(inputs), inputs).values()) < 4e-6, (times, time)


def test_scales_that_do_not_depend_on_time() -> None:
    model = corrected_zoo(bins=1)
    graph = trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)})
    for lowering in LOWERINGS:
        session = OnnxRuntimeSession(lowered(graph, lowering).proto)
        for time in (0.0, 700.0):
            inputs = {"sample": sample(seed=7), "timestep": torch.tensor(time)}
            assert max(differences(model, session(inputs), inputs).values()) < 4e-6, time


def copy_of(traced: Traced) -> MarkerGraph:
    """To be lowered in place, with the present scales."""
    model = ir.from_proto(ir.to_proto(traced.graph.model))
    return dataclasses.replace(traced.graph, model=model, spec=read_quantization(traced.model))


@pytest.mark.parametrize("offset", [False, True])
def test_table_as_input(traced: Traced, offset: bool) -> None:
    set_table(traced.model, ROWS, offset=offset)
    copy = copy_of(traced)
    context = lower(copy, "ratio", table_input=True)
    assert context.table_input
    proto = ir.to_proto(copy.model)
    session = OnnxRuntimeSession(proto)
    for seed, spread in ((0, 4.0), (3, 2.0)):  # another table, with the corrections of the graph
        table = set_table(traced.model, ROWS, offset=offset, seed=seed, spread=spread)
        inputs = traced.inputs(traced.times[1])
        found = session({**inputs, **tdq.engine_table(proto, table)})
        assert max(differences(traced.model, found, inputs).values()) < 4e-6


def test_plugin_has_the_same_numbers(traced: Traced) -> None:
    set_table(traced.model, ROWS, offset=True)
    ratio = lowered(traced.graph, "ratio", traced.model)
    copy = copy_of(traced)
    lower(copy, "plugin")
    inputs = traced.inputs(traced.times[1])
    twin = OnnxRuntimeSession(plugin_free(ir.to_proto(copy.model)))(inputs)
    for name, want in OnnxRuntimeSession(ratio.proto)(inputs).items():
        assert np.array_equal(twin[name], want), name


def test_halves() -> None:
    model = corrected_zoo(dtype=torch.float16)
    inputs = {"sample": sample(seed=7).half(), "timestep": torch.tensor(250.0)}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        found = OnnxRuntimeSession(lowered(graph, lowering).proto)(inputs)
        assert max(differences(model, found, inputs).values()) < 3e-3


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("rows", [1, 4])
def test_the_last_layer_is_corrected_in_float(lowering: str, rows: int) -> None:
    model = quantized()
    gain, bias = {"conv_out": 1 + torch.rand(rows, 3)}, {"conv_out": torch.randn(rows, 3)}
    tdq.set_layer_correction(model, tdq.LayerCorrection(torch.tensor(sorted(TIMES)), gain, bias))
    inputs = {"sample": sample(2)[:, :3], "timestep": torch.tensor(300.0)}
    found = OnnxRuntimeSession(lowered(trace(model, inputs), lowering).proto)(inputs)
    with torch.no_grad():
        expected = model(**inputs)
        tdq.set_layer_correction(model, None)
        plain = model(**inputs)
    (value,) = found.values()
    assert np.allclose(value, expected, atol=1e-4)
    assert not np.allclose(plain, expected, atol=0.1)
