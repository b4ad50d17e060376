"""Rows fall back to static scales unless their own are convincingly better; the other statistics of the config."""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch

import modelopt_tdq as tdq
from modelopt_tdq.calibration.protect import _convincing
from tests.support.models import TIMES, TinyDenoiser, calls, fast_config, loop, quantized


def test_convincing_needs_more_than_a_standard_error() -> None:
    static = {0: torch.tensor([4.0, 4.0, 4.0, 4.0]), 1: torch.tensor([4.0, 4.0, 4.0, 4.0]), 2: torch.tensor([1.0])}
    temporal = {0: torch.tensor([3.0, 3.1, 2.9, 3.0]), 1: torch.tensor([3.0, 5.0, 3.2, 4.7]), 2: torch.tensor([2.0])}
    assert _convincing({k: v.double() for k, v in static.items()}, temporal, 4).tolist() == [True, False, False, False]


def test_a_row_that_predicts_worse_takes_the_static_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_tdq.calibration import calibrate

    original = calibrate.columns

    def spoiled(evidence, config, temporal, *rest):  # type: ignore[no-untyped-def]
        scale, offset = original(evidence, config, temporal, *rest)
        if temporal:
            scale = scale.clone()
            scale[1] *= 40
        return scale, offset

    fields = {"statistic": "mse", "smoothing": 0.0}
    static = tdq.scale_table(quantized(bins=1, **fields))
    monkeypatch.setattr(calibrate, "columns", spoiled)
    protected = tdq.scale_table(quantized(protect_steps=True, **fields))
    assert torch.equal(protected.scale[1], static.scale[1])
    unprotected = tdq.scale_table(quantized(protect_steps=False, **fields))
    assert (unprotected.scale[1] > 5 * static.scale[1]).all()


@pytest.mark.parametrize("statistic", ["max", "mse", "percentile", "entropy", "output"])
@pytest.mark.parametrize("num_bits", [8, 3, (4, 3)])
def test_every_statistic_gives_a_working_model(statistic: str, num_bits: int) -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    reference = copy.deepcopy(model)
    config = tdq.make_config(8, num_bits, statistic=statistic, asymmetric="auto", progress=False)
    mtq.quantize(model, config, loop(calls()))
    table = tdq.scale_table(model)
    assert table.timesteps.tolist() == sorted(TIMES)
    for sample, time in calls(seed=50):
        expected = reference(sample, time)
        noise = (model(sample, time) - expected).square().sum()
        assert 10 * torch.log10(expected.square().sum() / noise) > (4 if num_bits == 3 else 20)


def test_bins_and_static_decision() -> None:
    uniform = tdq.scale_table(quantized(bins=2))
    assert (uniform.scale[0] == uniform.scale[1]).all()
    assert (uniform.scale[2] == uniform.scale[3]).all()
    optimal = tdq.scale_table(quantized(statistic="mse", bins="optimal", max_bins=3))
    assert max(len(column.unique()) for column in optimal.scale.T) <= 3
    assert tdq.scale_table(quantized(statistic="mse", keep_static_below=60.0)).is_static.all()
    assert not tdq.scale_table(quantized(statistic="mse", keep_static_below=0.0, smoothing=0.0)).is_static.all()


def test_output_statistic_minimises_the_error_of_the_layers_output() -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    data = calls(samples=8, batch=8)
    found = {}
    for statistic in ("output", "mse", "max"):
        config = fast_config(statistic=statistic, smoothing=0.0, temporal=["conv1*"])
        config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "mix*", "enable": False}]
        config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "conv2*", "enable": False}]
        config = {**config, "quant_cfg": [r if "cfg" not in r else _bits(r, 4) for r in config["quant_cfg"]]}
        copied = mtq.quantize(copy.deepcopy(model), config, loop(data))
        outputs: list[torch.Tensor] = []

        def keep(module: object, inputs: object, output: torch.Tensor, outputs: list[torch.Tensor] = outputs) -> None:
            outputs.append(output.detach())

        for target in (copied, model):
            handle = target.conv1.register_forward_hook(keep)
            loop(data)(target)
            handle.remove()
        half = len(outputs) // 2
        found[statistic] = sum(
            float((a - b).double().square().sum()) for a, b in zip(outputs[:half], outputs[half:], strict=True)
        )
    assert found["output"] <= found["mse"] * 1.02
    assert found["output"] < found["max"]


def _bits(rule: dict, bits: int) -> dict:  # type: ignore[type-arg]
    return {**rule, "cfg": {**rule["cfg"], "num_bits": bits}}
