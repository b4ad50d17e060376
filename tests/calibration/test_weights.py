"""Scales of weights: `mse` is the best on its grid, never below `max`, and costs nothing where nothing is gained."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.calibration import weights
from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits, code_range, fake_quantize


def _weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(48, 96, generator=generator)
    return {
        "gaussian": gaussian,
        "heavy": gaussian**3,
        "uniform": torch.rand(48, 96, generator=generator) - 0.5,
        "outliers": gaussian + 20.0 * (torch.rand(48, 96, generator=generator) < 1e-2),
    }[kind]


def _model(bits: NumBits, weight: Tensor) -> Any:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone())
    return mtq.quantize(nn.Sequential(layer), {**tdq.make_config(bits, 8, high_precision=()), "algorithm": None})


def _error(weight: Tensor, amax: Tensor, bits: NumBits) -> Tensor:
    """[out] squared error of each channel, by the package's own arithmetic."""
    scale = amax.reshape(-1, 1) / code_range(bits)[1]
    return (fake_quantize(weight, scale, None, bits) - weight).double().square().sum(1)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "uniform", "outliers"])
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2, FP8_E4M3])
def test_mse_is_the_best_multiple_of_the_grid_and_never_below_max(bits: NumBits, kind: str) -> None:
    weight, grid = _weights(kind), weights._grid(bits)
    largest = weight.abs().amax(1)
    model = _model(bits, weight)
    calibrate_weights(model, "mse")
    found = _error(weight, model[0].weight_quantizer._amax, bits)
    # ModelOpt multiplies where we divide, which moves a code in a million
    assert (found <= _error(weight, largest, bits) * 1.0001).all()
    if grid is None:
        assert torch.equal(model[0].weight_quantizer._amax.flatten(), largest)
        return
    multiples = torch.arange(grid.start, grid.stop + grid.step / 2, grid.step)
    assert float((multiples - 1.0).abs().min()) < 1e-6
    assert isinstance(bits, tuple) or grid.stop == 1.0
    best = torch.stack([_error(weight, largest * m, bits) for m in multiples]).amin(0)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.11), (7, 0.1), (6, 0.1), (5, 0.1), (4, 0.1), (3, 0.1), (2, 0.1)])
def test_little_is_lost_against_a_fine_grid(bits: int, most: float) -> None:
    """In dB, over channels of 512 weights; integers gain nothing above the largest magnitude."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    model = _model(bits, weight)
    calibrate_weights(model, "mse")
    found = _error(weight, model[0].weight_quantizer._amax, bits).sum()
    fine = torch.arange(0.15, 1.0001, 0.01)
    best = torch.stack([_error(weight, weight.abs().amax(1) * m, bits) for m in fine]).amin(0).sum()
    assert float(10 * torch.log10(found / best)) < most


def test_formats_of_one_model_have_their_own_grids_and_nothing_else_changes() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    rules = tdq.make_config(8, 8, high_precision=())["quant_cfg"]
    rules += [
        {"quantizer_name": "1.weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
        {"quantizer_name": "2.weight_quantizer", "cfg": {"num_bits": 3, "axis": 0}},
        {"quantizer_name": "3.*", "enable": False},
    ]
    quantized: Any = mtq.quantize(model, {"quant_cfg": rules, "algorithm": None})
    kept = [layer.weight_quantizer._calibrator for layer in quantized]
    calibrate_weights(quantized, "mse")
    for layer, bits in zip(quantized, (8, 4, 3), strict=False):
        alone = _model(bits, layer.weight.detach())
        calibrate_weights(alone, "mse")
        assert torch.equal(layer.weight_quantizer._amax, alone[0].weight_quantizer._amax)
    assert [layer.weight_quantizer.is_enabled for layer in quantized] == [True, True, True, False]
    assert all(layer.weight_quantizer._calibrator is own for layer, own in zip(quantized, kept, strict=True))


def test_eight_bits_take_no_pass_over_the_weights_beyond_that_of_max(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(weights, "mse_calibrate", lambda *args, **kwargs: called.append(True))
    calibrate_weights(_model(8, _weights("gaussian")), "mse")
    assert not called
    calibrate_weights(_model(4, _weights("gaussian")), "mse")
    assert called


def test_formats_in_blocks_are_never_below_max() -> None:
    weight = _weights("outliers")
    errors = []
    for method in ("max", "mse"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight.clone())
        rule = {"num_bits": 4, "axis": None, "block_sizes": {-1: 16}}
        config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight*", "cfg": rule}]}
        model: Any = mtq.quantize(nn.Sequential(layer), {**config, "algorithm": None})
        calibrate_weights(model, method)
        errors.append(float((model[0].weight_quantizer(weight) - weight).square().sum()))
    assert errors[1] < errors[0]


def test_the_grid_of_formats_that_are_not_listed_contains_one() -> None:
    for num_bits in ((2, 1), 3, 7, FP8_E4M3):
        grid = weights._grid(num_bits)
        assert grid is not None
        steps = round((grid.stop - grid.start) / grid.step)
        assert float((torch.linspace(grid.start, grid.stop, steps + 1) - 1.0).abs().min()) < 1e-6
    assert weights._grid(16) is None
