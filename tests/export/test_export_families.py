"""One small random model of each family: both lowerings against torch, layer by layer, and each other in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, Lowered, codes_by_definition, layer_results, lowered, trace
from support.models import FAMILIES, SMALL_UNET_CONDITION, fast_config
from support.slow import slow_but
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    inputs: dict[str, Any]
    graphs: dict[str, Lowered]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module", params=slow_but(("unet_condition", "dit", "sd3", "flux"), "dit"))
def exported(request: pytest.FixtureRequest) -> Exported:
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    family = SMALL_UNET_CONDITION if request.param == "unet_condition" else FAMILIES[request.param]
    model = family.make().eval()
    data = family.data()

    def forward_loop(quantized: nn.Module) -> None:
        for call in data:
            quantized(**call)

    mtq.quantize(model, fast_config(), forward_loop)
    inputs = family.inputs(2, torch.tensor(450.0), 50)
    graph = trace(model, inputs, dynamic_batch=True)
    return Exported(model, inputs, {name: lowered(graph, name) for name in LOWERINGS})


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_layer_equals_torch_on_the_same_input(exported: Exported, lowering: str) -> None:
    graph = exported.graphs[lowering]
    assert graph.context.skipped == {}
    names = set(tdq.scale_table(exported.model).names)
    assert set(graph.context.low_precision) == names
    results = layer_results(graph, exported.tensors)
    assert {f"{layer}.input_quantizer" for layer in results} == names
    timestep = find_timestep(exported.model)
    assert timestep is not None
    timestep.begin(exported.inputs["timestep"].reshape(-1))
    for layer, (x, y) in results.items():
        with torch.no_grad():
            expected = exported.model.get_submodule(layer)(x)
        assert y.shape == expected.shape, layer
        assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max()) + 1e-12, layer


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_follow_the_definition(exported: Exported, lowering: str) -> None:
    time = exported.inputs["timestep"]
    compared, mismatched = codes_by_definition(
        exported.graphs[lowering], exported.model, exported.tensors, time.numpy()
    )
    assert compared > 1000
    assert mismatched == 0


def test_lowerings_agree_in_float64(exported: Exported) -> None:
    inputs = {name: value.numpy() for name, value in exported.tensors.items()}
    reference, ratio = (run_double(exported.graphs[name].proto, inputs)["output"] for name in LOWERINGS)
    assert np.abs(ratio - reference).max() < 1e-11 * np.abs(reference).max()
