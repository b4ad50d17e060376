"""Shifted channels in the graph: codes as by the definition, outputs as of torch, nothing more on the activation."""

from __future__ import annotations

from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.export import (
    LOWERINGS,
    Lowered,
    calibrated_at,
    codes_by_definition,
    layer_results,
    lowered,
    set_table,
    trace,
)
from support.models import at, fast_config, loop, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.onnx_export import lower
from modelopt_tdq.export.plugin import plugin_free
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.model.output_correction import output_channels
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

TIMES = (0.0, 15.0, 450.0, 900.0)

#: Times of shifts that are not those of the scales.
OTHERS = (10.0, 300.0, 600.0)

#: The layers whose channels may be shifted.
SHIFTED = ("shortcut", "grouped", "q", "k")


class Layers(nn.Module):
    """Convolutions without padding, one in groups, and linear layers that read one tensor; a padded one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.shortcut, self.grouped = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = sample * (0.2 + timestep.reshape(-1, 1, 1, 1) / 1000).to(sample)
        h = self.conv(h) + self.shortcut(h + torch.arange(4.0).to(h).reshape(-1, 1, 1))
        tokens = (h + self.grouped(h)).flatten(2).transpose(1, 2)
        return self.q(tokens) * torch.tanh(self.k(tokens))


calibrated = partial(calibrated_at, Layers, TIMES)


def shifted(times: tuple[float, ...], divided: bool = False, **fields: Any) -> Any:
    """With random shifts, and divisors, of all layers that do not pad; q and k have the same."""
    model = calibrated(**fields)
    generator = torch.Generator().manual_seed(0)
    of_width: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for name in SHIFTED:
        layer = model.get_submodule(name)
        trailing, width = layer.weight.dim() - 2, layer.weight.shape[1] * getattr(layer, "groups", 1)
        made = torch.randn(len(times), width, generator=generator), torch.rand(width, generator=generator) + 0.5
        shift, divisor = of_width.setdefault((width, trailing), made)
        behind = (1,) * trailing
        layer.input_quantizer.set_channels(
            divisor.reshape(-1, *behind) if divided else None,
            shift.reshape(*shift.shape, *behind) * 0.5,
            torch.tensor(times),
        )
    return model


INPUTS = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}

CASES: dict[str, dict[str, Any]] = {
    "static": {"times": TIMES[:1]},
    "same times": {"times": TIMES},
    "same times, divided": {"times": TIMES, "divided": True},
    "other times": {"times": OTHERS},
    "offsets": {"times": TIMES, "asymmetric": True},
    "offsets, divided": {"times": TIMES, "divided": True, "asymmetric": True},
    "offsets, other times, divided": {"times": OTHERS, "divided": True, "asymmetric": True},
    "offsets, static": {"times": TIMES[:1], "divided": True, "asymmetric": True},
    "static scales": {"times": TIMES, "divided": True, "bins": 1, "asymmetric": True},
    "A4": {"times": TIMES, "activation_bits": 4},
    "FP8": {"times": TIMES, "weight_bits": (4, 3), "activation_bits": (4, 3)},
    "float16": {"times": TIMES, "dtype": torch.float16},
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: shifted(**fields) for name, fields in CASES.items()}


def _equal_torch(low: Lowered, model: nn.Module, inputs: dict[str, Any], times: Tensor, tolerance: float) -> None:
    """Layers for the inputs that they have in the graph, and the whole."""
    dtype = next(model.parameters()).dtype
    results = layer_results(low, inputs)
    assert set(results) >= set(SHIFTED)
    for layer, (x, y) in results.items():
        with torch.no_grad(), at(model, times):
            expected = model.get_submodule(layer)(x.to(dtype)).float()
        torch.testing.assert_close(y.float(), expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
    with torch.no_grad():
        whole = model(**inputs).float().numpy()
    found = OnnxRuntimeSession(low.proto)(inputs)["output"].astype(np.float32)
    assert np.linalg.norm(found - whole) < 0.01 * np.linalg.norm(whole)  # a code that rounds the other way is no fault


@pytest.mark.parametrize("times", [[450.0], [15.0, 700.0]])
@pytest.mark.parametrize("case", CASES)
def test_codes_and_layers_are_those_of_torch(models: dict[str, nn.Module], case: str, times: list[float]) -> None:
    model = models[case]
    dtype = next(model.parameters()).dtype
    inputs = {"sample": INPUTS["sample"].to(dtype), "timestep": torch.tensor(times)}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        low = lowered(graph, lowering)
        assert low.context.skipped == {}
        compared, mismatched = codes_by_definition(low, model, inputs, np.asarray(times))
        assert compared >= 2 * 8 * 8 * (4 + 4 + 8 + 8)
        assert mismatched == 0
        _equal_torch(low, model, inputs, torch.tensor(times), 8e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_scales_and_offsets_of_the_way_back(offset: bool) -> None:
    model = shifted(TIMES, divided=True)
    set_table(model, list(TIMES), offset=offset, dequant=True, base=0.05)
    graph = trace(model, INPUTS)
    for lowering in LOWERINGS:
        low = lowered(graph, lowering)
        assert codes_by_definition(low, model, INPUTS, 450.0)[1] == 0
        _equal_torch(low, model, INPUTS, torch.tensor([450.0]), 1e-5)


def test_an_activation_that_goes_elsewhere_as_well(models: dict[str, nn.Module]) -> None:
    """The quantized activation itself has the shift again."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = self.layer.input_quantizer(sample) if hasattr(self.layer, "input_quantizer") else sample
            return self.layer(sample) + x.square() * (timestep.reshape(-1, 1) > 0)

    data = [(noise(8, 4, seed=int(t)), torch.tensor(t)) for t in TIMES]
    model = mtq.quantize(Squared().eval(), fast_config(), loop(data))
    model.layer.input_quantizer.set_channels(
        None, torch.tensor([[0.3, 0.0, -2.0, 1.0]]).repeat(4, 1), torch.tensor(TIMES)
    )
    inputs = {"sample": noise(8, 4, seed=1), "timestep": torch.tensor(450.0)}
    with torch.no_grad():
        expected = model(**inputs).numpy()
    for lowering in LOWERINGS:
        found = OnnxRuntimeSession(lowered(trace(model, inputs), lowering).proto)(inputs)["output"]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def _corrected(model: nn.Module, times: tuple[float, ...], rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    gain, bias = {}, {}
    for name in (*SHIFTED, "conv"):
        width = output_channels(model.get_submodule(name))
        gain[name] = 0.5 + torch.rand(rows, width, generator=generator)
        bias[name] = torch.randn(rows, width, generator=generator)
    tdq.set_layer_correction(model, tdq.LayerCorrection(torch.tensor(times), gain, bias))


@pytest.mark.parametrize("times", [[450.0], [15.0, 700.0]])
@pytest.mark.parametrize(
    ("case", "of_correction", "rows"),
    [
        ("same times", TIMES, 4),
        ("offsets, divided", TIMES, 4),
        ("offsets, other times, divided", TIMES, 4),
        ("other times", OTHERS, 3),
        ("same times", TIMES, 1),
        ("static", TIMES, 4),
    ],
)
def test_corrections_behind_them(case: str, of_correction: tuple[float, ...], rows: int, times: list[float]) -> None:
    model = shifted(**CASES[case])
    _corrected(model, of_correction, rows)
    inputs = {**INPUTS, "timestep": torch.tensor(times)}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        low = lowered(graph, lowering)
        assert codes_by_definition(low, model, inputs, np.asarray(times))[1] == 0
        _equal_torch(low, model, inputs, torch.tensor(times), 2e-5)


def _nodes(low: Lowered) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in low.proto.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_one_subtraction_and_no_lookup_of_their_own() -> None:
    """The addition behind a product has the bias anyway; where there was none, it is new."""
    plain = _nodes(lowered(trace(calibrated(), INPUTS), "ratio"))
    moved = _nodes(lowered(trace(shifted(TIMES), INPUTS), "ratio"))
    without_bias = 2
    changed = {kind: moved[kind] - plain.get(kind, 0) for kind in moved if moved[kind] != plain.get(kind, 0)}
    layouts = changed.pop("Reshape", 0)  # rows of a convolution's channels, and of a linear layer's
    assert changed == {"Sub": len(SHIFTED), "Add": without_bias}  # the rows are beside the scales
    assert layouts <= len(SHIFTED) * 2


def test_the_plugin_looks_up_the_same(models: dict[str, nn.Module]) -> None:
    graph = trace(models["offsets, divided"], INPUTS)
    found = OnnxRuntimeSession(plugin_free(lowered(graph, "plugin").proto))(INPUTS)["output"]
    np.testing.assert_array_equal(found, OnnxRuntimeSession(lowered(graph, "ratio").proto)(INPUTS)["output"])


@pytest.mark.parametrize("case", ["same times", "offsets, divided", "offsets, other times, divided", "static"])
def test_a_table_that_is_an_input(models: dict[str, nn.Module], case: str) -> None:
    model = models[case]
    graph = trace(model, INPUTS)
    plain = lowered(graph, "ratio").proto
    lower(graph, "ratio", table_input=True)
    proto = ir.to_proto(graph.model)
    found = OnnxRuntimeSession(proto)({**INPUTS, **tdq.engine_table(proto, model)})["output"]
    expected = OnnxRuntimeSession(plain)(INPUTS)["output"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(tdq.TdqError, match="other channels"):
        tdq.engine_table(proto, calibrated())


def test_a_padded_convolution_is_refused() -> None:
    model = calibrated()
    model.conv.input_quantizer.set_channels(None, torch.ones(1, 4, 1, 1))
    with pytest.raises(tdq.TdqError, match="pads with zeros"):
        lowered(trace(model, INPUTS), "ratio")


def test_shifts_of_other_times_are_refused() -> None:
    model = shifted(TIMES)
    model.q.input_quantizer.set_channels(None, torch.ones(3, 8), torch.tensor(OTHERS))
    with pytest.raises(tdq.TdqError, match="rows are not those"):
        read_quantization(model)


def test_times_that_are_not_those_of_the_table_are_looked_up_for_themselves() -> None:
    """A table of another schedule leaves the shifts where they are."""
    model = shifted(OTHERS, divided=True)
    table = tdq.scale_table(model)
    tdq.set_scale_table(model, table.resample([5.0, 100.0, 200.0, 500.0, 800.0]))
    for time in (4.0, 250.0, 350.0, 460.0, 990.0):
        inputs = {**INPUTS, "timestep": torch.tensor(time)}
        low = lowered(trace(model, inputs), "ratio")
        assert codes_by_definition(low, model, inputs, time)[1] == 0
        _equal_torch(low, model, inputs, torch.tensor([time]), 1e-5)
    assert len(temporal_quantizers(model)) == 5
