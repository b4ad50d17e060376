"""ModelOpt's SmoothQuant in front of the tdq algorithm: the pre_quant_scale of each input is exported too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.export import LOWERINGS, codes_by_definition, layer_results, lowered, trace
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


class Mlp(nn.Module):
    """Linear layers on tokens whose channels differ in size, which is what SmoothQuant evens out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)
        self.register_buffer("channels", torch.logspace(-1, 1, 16))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = sample * self.channels * (0.1 + timestep.reshape(-1, 1, 1) / 1000).to(sample)
        out: Tensor = self.second(nn.functional.silu(self.first(h)))
        return out


@pytest.fixture(scope="module", params=[torch.float32, torch.float16])
def smoothed(request: pytest.FixtureRequest) -> nn.Module:
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    model = Mlp().eval().to(request.param)
    fast = {"method": "tdq", "statistic": "mse", "protect_steps": False, "progress": False}
    config = {**tdq.make_config(8, 8), "algorithm": ["smoothquant", fast]}

    def forward_loop(quantized: nn.Module) -> None:
        for time in (0.0, 300.0, 900.0):
            quantized(torch.randn(4, 5, 16).to(request.param), torch.tensor(time))

    return mtq.quantize(model, config, forward_loop)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_smoothquant_is_exported(smoothed: Any, lowering: str) -> None:
    dtype = next(smoothed.parameters()).dtype
    assert float(smoothed.first.input_quantizer.pre_quant_scale.std()) > 0.01
    inputs = {"sample": torch.randn(4, 5, 16).to(dtype), "timestep": torch.tensor([0.0, 200.0, 500.0, 1000.0])}
    graph = lowered(trace(smoothed, inputs), lowering)
    assert graph.context.skipped == {}
    compared, mismatched = codes_by_definition(graph, smoothed, inputs, inputs["timestep"].numpy())
    assert compared == 4 * 5 * (16 + 32)
    assert mismatched == 0
    with torch.no_grad():
        expected = smoothed(**inputs).float().numpy()
    found = OnnxRuntimeSession(graph.proto)(inputs)["output"].astype(np.float32)
    # float16 sums differ, and a difference flips codes of the second layer
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("smoothed", [torch.float32], indirect=True)
def test_smoothed_layers_equal_torch_on_the_same_input(smoothed: Any) -> None:
    """The graph's input of a quantizer is scaled already, so torch does not scale it again."""
    inputs = {"sample": torch.randn(2, 5, 16), "timestep": torch.tensor(500.0)}
    graph = lowered(trace(smoothed, inputs), "ratio")
    timestep = find_timestep(smoothed)
    assert timestep is not None
    timestep.begin(torch.tensor([500.0]))
    for layer, (x, y) in layer_results(graph, inputs).items():
        module = smoothed.get_submodule(layer)
        with torch.no_grad(), module.input_quantizer.disable_pre_quant_scale():
            expected = module(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
