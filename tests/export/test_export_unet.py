"""The bundled, trained UNet: both lowerings against torch, against the oracle, and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, codes_by_definition, layer_results

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

#: At a small size: test_export_families.py.
pytestmark = pytest.mark.slow

TIMES = (0.0, 199.0, 333.0, 500.5, 800.0, 1200.0)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_all_layers_are_quantized(bundled: Any, lowering: str) -> None:
    context = bundled.graphs[lowering].context
    assert context.skipped == {}
    assert set(context.low_precision) == set(tdq.scale_table(bundled.model).names)
    assert len(context.low_precision) == 50


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_follow_the_definition_in_every_layer(bundled: Any, lowering: str, time: float) -> None:
    inputs = bundled.inputs(time)
    compared, mismatched = codes_by_definition(bundled.graphs[lowering], bundled.model, inputs, time)
    assert compared > 2_000_000
    assert mismatched == 0


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_layer_equals_torch_on_the_same_input(bundled: Any, lowering: str) -> None:
    time = 333.0
    results = layer_results(bundled.graphs[lowering], bundled.inputs(time))
    assert len(results) == 50
    find_timestep(bundled.model).begin(torch.tensor([time]))
    for layer, (x, y) in results.items():
        with torch.no_grad():
            expected = bundled.model.get_submodule(layer)(x)
        assert y.shape == expected.shape, layer
        assert float((y - expected).abs().max() / expected.abs().max()) < 2e-6, layer


@pytest.mark.parametrize("time", [0.0, 333.0, 800.0])
def test_lowerings_agree_in_float64(bundled: Any, time: float) -> None:
    inputs = {name: value.numpy() for name, value in bundled.inputs(time).items()}
    reference, ratio = (run_double(bundled.graphs[name].proto, inputs)["output"] for name in LOWERINGS)
    assert np.abs(reference).max() > 0.1
    assert np.abs(ratio - reference).max() < 1e-12


def _sqnr(result: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(result - exact).sum()))


def test_quantization_noise_is_that_of_torch(bundled: Any) -> None:
    """In float32 single codes flip; what must not change is the distance to full precision."""
    sessions = {name: OnnxRuntimeSession(bundled.graphs[name].proto) for name in LOWERINGS}
    found: dict[str, list[float]] = {name: [] for name in ("torch", *LOWERINGS)}
    for time in (0.0, 200.0, 400.0, 600.0, 800.0):
        inputs = bundled.inputs(time)
        with torch.no_grad():
            exact = bundled.full_precision(**inputs).sample.numpy()
            found["torch"].append(_sqnr(bundled.model(**inputs).sample.numpy(), exact))
        for name, session in sessions.items():
            found[name].append(_sqnr(session(inputs)["output"], exact))
    for name in LOWERINGS:
        assert np.abs(np.subtract(found[name], found["torch"])).max() < 0.25
        assert abs(np.mean(found[name]) - np.mean(found["torch"])) < 0.1
