"""Smoothed channels in the graph: one division by the product of scale and vector, codes as by the definition."""

from __future__ import annotations

from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
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
from support.models import at, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.compare.runners import call_model
from modelopt_tdq.export.onnx_export import lower
from modelopt_tdq.export.plugin import plugin_free
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

TIMES = (0.0, 15.0, 450.0, 900.0)


class Layers(nn.Module):
    """Readers of one tensor among convolutions and linear layers, and outlier channels in front of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(4, 8, 1)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("size", torch.tensor([1.0, 40.0, 1.0, 0.1]))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = sample * self.size.reshape(-1, 1, 1) * (0.2 + timestep.reshape(-1, 1, 1, 1) / 1000).to(sample)
        h = nn.functional.silu(h)
        h = self.conv(h) + self.shortcut(h)
        tokens = h.flatten(2).transpose(1, 2)
        return self.q(tokens) * torch.tanh(self.k(tokens))


calibrated = partial(calibrated_at, Layers, TIMES)


def smoothed(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model = calibrated(dtype, **{"channel_smoothing": 0.6, **fields})
    assert sum(q.channel_divisor is not None for q in temporal_quantizers(model).values()) == 4
    return model


CASES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "FP8": {"weight_bits": (4, 3), "activation_bits": (4, 3)},
    "static": {"bins": 1},
    "static A4": {"bins": 1, "activation_bits": 4},
    "offsets": {"asymmetric": True},
    "static offsets": {"asymmetric": True, "bins": 1},
    "float16": {"dtype": torch.float16},
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: smoothed(**fields) for name, fields in CASES.items()}


@pytest.mark.parametrize(
    ("case", "samples"), [*((case, 1) for case in CASES), ("W8A8", 2), ("offsets", 2), ("float16", 2)]
)
def test_codes_are_those_of_the_definition(models: dict[str, nn.Module], case: str, samples: int) -> None:
    model = models[case]
    dtype = next(model.parameters()).dtype
    times = torch.tensor([15.0, 700.0])[:samples]
    inputs = {"sample": noise(2, 4, 8, 8, seed=3).to(dtype), "timestep": times}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        low = lowered(graph, lowering)
        assert low.context.skipped == {}
        compared, mismatched = codes_by_definition(low, model, inputs, times.numpy())
        assert compared >= 2 * 2 * 8 * 8 * (4 + 8)
        assert mismatched == 0
        _layers_equal_torch(low, model, inputs, times, 3e-3 if dtype == torch.float16 else 1e-5)
        with torch.no_grad():
            expected = model(**inputs).float().numpy()
        found = OnnxRuntimeSession(low.proto)(inputs)["output"].astype(np.float32)
        assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def _layers_equal_torch(low: Lowered, model: nn.Module, inputs: Any, times: Tensor, tolerance: float) -> None:
    for layer, (x, y) in layer_results(low, inputs).items():
        with torch.no_grad(), at(model, times):
            expected = model.get_submodule(layer)(x.to(next(model.parameters()).dtype))
        size = float(expected.abs().max())
        torch.testing.assert_close(y.float(), expected.float(), rtol=0.0, atol=tolerance * size)


def test_the_codes_of_torch_are_those_of_the_graph(models: dict[str, nn.Module]) -> None:
    """As `compare` takes them from both sides, of the layers that see the same numbers."""
    model = models["W8A8"]
    inputs = {"sample": noise(2, 4, 8, 8, seed=3).numpy(), "timestep": np.float32(450.0)}
    session = OnnxRuntimeSession(
        lowered(trace(model, {n: torch.as_tensor(v) for n, v in inputs.items()}), "ratio").proto, codes=True
    )
    ours, theirs = call_model(model, inputs, codes=True), session(inputs)
    for name in ("conv", "shortcut"):
        codes = f"{name}.input_quantizer/codes"
        np.testing.assert_array_equal(ours[f"{codes}:int8"], theirs[codes])


def _nodes(proto: onnx.ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in proto.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


@pytest.mark.parametrize(("case", "divisions", "products"), [("W8A8", 0, 2), ("static", 4, 0)])
def test_smoothing_adds_no_node_on_the_activation(
    models: dict[str, nn.Module], case: str, divisions: int, products: int
) -> None:
    """One small product per tensor that is read, nothing else: the division by the scale does both.

    Without time, it takes the place of a scale of QuantizeLinear.
    """
    inputs = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(450.0)}
    smooth = _nodes(lowered(trace(models[case], inputs), "ratio").proto)
    plain = _nodes(lowered(trace(calibrated(**CASES[case]), inputs), "ratio").proto)
    assert smooth == {**plain, "Mul": plain["Mul"] + products, "Div": plain.get("Div", 0) + divisions}


def test_the_plugin_looks_up_the_same(models: dict[str, nn.Module]) -> None:
    model = models["W8A8"]
    inputs = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}
    graph = trace(model, inputs)
    found = OnnxRuntimeSession(plugin_free(lowered(graph, "plugin").proto))(inputs)["output"]
    np.testing.assert_array_equal(found, OnnxRuntimeSession(lowered(graph, "ratio").proto)(inputs)["output"])


def test_a_table_that_is_an_input(models: dict[str, nn.Module]) -> None:
    model = models["W8A8"]
    inputs = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}
    graph = trace(model, inputs)
    plain = lowered(graph, "ratio").proto
    lower(graph, "ratio", table_input=True)
    proto = ir.to_proto(graph.model)
    found = OnnxRuntimeSession(proto)({**inputs, **tdq.engine_table(proto, model)})["output"]
    np.testing.assert_array_equal(found, OnnxRuntimeSession(plain)(inputs)["output"])
    for strength in ("none", 0.3):
        with pytest.raises(tdq.TdqError, match="other channels"):
            tdq.engine_table(proto, calibrated(channel_smoothing=strength))


def test_an_input_quantizer_that_is_disabled_later_still_divides() -> None:
    model = smoothed()
    mtq.disable_quantizer(model, "conv.*")
    inputs = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        found = OnnxRuntimeSession(lowered(graph, lowering).proto)(inputs)["output"]
        with torch.no_grad():
            expected = model(**inputs).numpy()
        assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4, (4, 3)])
def test_scales_and_offsets_of_the_way_back(bits: Any) -> None:
    """s' and o' of a learned quantizer are those of the quotient, whatever the channels are divided by."""
    model = smoothed(weight_bits=8, activation_bits=8)
    set_table(model, list(TIMES), offset=bits == 8, dequant=True, bits=bits, base=0.05)
    inputs = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        low = lowered(graph, lowering)
        assert codes_by_definition(low, model, inputs, 450.0)[1] == 0
        _layers_equal_torch(low, model, inputs, torch.tensor([450.0]), 1e-5)


def test_equal_scales_of_different_channels() -> None:
    """Quantizers with the same column of the table share what is looked up, and no more than that."""
    model = smoothed()
    names = tuple(temporal_quantizers(model))
    column = torch.tensor([[0.01], [0.02], [0.03], [0.05]])
    tdq.set_scale_table(model, tdq.ScaleTable(torch.tensor(TIMES), column.expand(4, len(names)), names))
    model.conv.input_quantizer.set_channels(torch.tensor([1.0, 2.0, 3.0, 0.3]).reshape(-1, 1, 1))
    inputs = {"sample": noise(2, 4, 8, 8, seed=3), "timestep": torch.tensor(450.0)}
    for lowering in LOWERINGS:
        low = lowered(trace(model, inputs), lowering)
        assert codes_by_definition(low, model, inputs, 450.0)[1] == 0


def test_bfloat16_is_exported() -> None:
    model = smoothed(torch.bfloat16)
    inputs = {"sample": noise(2, 4, 8, 8, seed=3).to(torch.bfloat16), "timestep": torch.tensor(450.0)}
    proto = lowered(trace(model, inputs), "ratio").proto
    assert _nodes(proto)["QuantizeLinear"] == 4
