"""Each kind of layer, with and without bias and offset, at one time and at a time per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, codes_by_definition, lowered, set_table, trace
from support.slow import slow_but
from support.zoo import ATTENTIONS, ROWS, Zoo, quantized_zoo, sample
from torch import Tensor

from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

#: Name: times to run, dynamic batch.
CASES: dict[str, tuple[list[Tensor], bool]] = {
    "scalar": ([torch.tensor(t) for t in (0.0, 125.0, 125.1, 600.0, 5000.0, -1.0)], False),
    "one": ([torch.tensor([t]) for t in (0, 400, 999)], True),
    "per_sample": ([torch.tensor(t) for t in ([0.0, 999.0], [374.9, 130.0, 1e9], [-5.0], [300.0] * 5)], True),
}


@dataclass(frozen=True)
class Traced:
    model: Zoo
    graph: MarkerGraph
    times: list[Tensor]
    dynamic: bool

    def inputs(self, time: Tensor) -> dict[str, Tensor]:
        batch = time.numel() if time.numel() > 1 or (self.dynamic and time.dtype.is_floating_point) else 2
        return {"sample": sample(batch, seed=7), "timestep": time}


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest) -> Traced:
    model = quantized_zoo()
    times, dynamic = CASES[request.param]
    graph = trace(model, {"sample": sample(), "timestep": times[0]}, dynamic_batch=dynamic)
    return Traced(model, graph, times, dynamic)


#: Bits, offsets, and whether some quantizers have scales (and offsets) of their own to turn their codes back.
FORMATS = [
    (8, False, False),
    (8, True, False),
    (4, False, False),
    (4, True, False),
    (3, True, False),
    ((4, 3), False, False),
    (8, False, True),
    (8, True, True),
    (4, True, True),
    ((4, 3), False, True),
]

#: Each number format, and each of the others with and without an offset.
QUICK = [FORMATS[i] for i in (0, 3, 4, 5, 7, 9)]


@pytest.mark.parametrize(("bits", "offset", "dequant"), slow_but(FORMATS, *QUICK))
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equals_torch(traced: Traced, lowering: str, bits: Any, offset: bool, dequant: bool) -> None:
    set_table(traced.model, ROWS, bits=bits, offset=offset, dequant=dequant)
    graph = lowered(traced.graph, lowering, traced.model)
    session = OnnxRuntimeSession(graph.proto)
    for time in traced.times:
        inputs = traced.inputs(time)
        with torch.no_grad():
            expected = traced.model(**inputs)
        found = session(inputs)
        assert len(found) == len(expected) == len(traced.model.names)
        for name, want, got in zip(traced.model.names, expected, found.values(), strict=True):
            error = np.abs(got - want.numpy()).max() / want.abs().max()
            assert error < 3e-6, (name, time)


@pytest.mark.parametrize(("bits", "offset", "dequant"), slow_but(FORMATS, *QUICK))
def test_lowerings_agree_in_float64(traced: Traced, bits: Any, offset: bool, dequant: bool) -> None:
    set_table(traced.model, ROWS, bits=bits, offset=offset, dequant=dequant, seed=1)
    graphs = [lowered(traced.graph, lowering, traced.model) for lowering in LOWERINGS]
    for time in traced.times[:2]:
        inputs = {name: value.numpy() for name, value in traced.inputs(time).items()}
        reference, ratio = (run_double(graph.proto, inputs) for graph in graphs)
        for name, want, got in zip(traced.model.names, reference.values(), ratio.values(), strict=True):
            # exact but for offsets, which are multiples of their scales only up to float32 rounding
            assert np.abs(got - want).max() / np.abs(want).max() < (2e-6 if offset else 1e-12), name


@pytest.mark.parametrize("dequant", [False, True])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_follow_the_definition(traced: Traced, lowering: str, dequant: bool) -> None:
    set_table(traced.model, ROWS, bits=4, offset=True, dequant=dequant)
    graph = lowered(traced.graph, lowering, traced.model)
    for time in traced.times:
        compared, mismatched = codes_by_definition(graph, traced.model, traced.inputs(time), time.numpy())
        assert compared > 1000
        assert mismatched == 0


@pytest.mark.parametrize("dequant", [False, True])
def test_ratio_skips_nothing_without_offsets(traced: Traced, dequant: bool) -> None:
    set_table(traced.model, ROWS, dequant=dequant)
    skipped = lowered(traced.graph, "ratio", traced.model).context.skipped
    # the softmax is not quantized, so its product with v computes in float
    reason = "the other operand of its product is not quantized"
    assert skipped == {f"{name}.v_bmm_quantizer": reason for name in ATTENTIONS}


def test_ratio_says_which_layers_only_some_backends_compute_in_low_precision(traced: Traced) -> None:
    set_table(traced.model, ROWS)
    limited = lowered(traced.graph, "ratio", traced.model).context.limited
    assert set(limited) == {"images.transposed.input_quantizer", "images.transposed_grouped.input_quantizer"}
    assert "disable_quantizer(model, 'images.transposed.*')" in limited["images.transposed.input_quantizer"]


def test_ratio_says_what_an_offset_keeps_in_float(traced: Traced) -> None:
    set_table(traced.model, ROWS, offset=True)
    skipped = lowered(traced.graph, "ratio", traced.model).context.skipped
    layers = {name.rpartition(".")[0] for name in skipped}
    expected = {"images.transposed", "images.transposed_grouped", "attention", "attention_bmm"}
    assert layers - {"images.same", "images.reflected"} == expected
    assert all("offset" in reason or "floating point" in reason for reason in skipped.values())


def test_a_layer_can_be_left_out_after_calibration() -> None:
    """The cure that the report names."""
    model = quantized_zoo()
    mtq.disable_quantizer(model, "images.transposed*")
    graph = lowered(trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)}), "ratio")
    assert graph.context.limited == {}
    assert "images.plain.input_quantizer" in graph.context.low_precision
    assert not [node.name for node in graph.proto.graph.node if "images.transposed.input_quantizer" in node.name]
    with torch.no_grad():
        expected = model(sample(seed=7), torch.tensor(500.0))
    found = OnnxRuntimeSession(graph.proto)({"sample": sample(seed=7), "timestep": 500.0})
    for name, want, got in zip(model.names, expected, found.values(), strict=True):
        assert np.abs(got - want.numpy()).max() / want.abs().max() < 3e-6, name
