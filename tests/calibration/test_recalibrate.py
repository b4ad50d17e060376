"""recalibrate_weights: the scales of weights that changed, and nothing else."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from model.test_weight_fit import add_low_rank, weights
from support.models import TinyDenoiser, calls, fast_config, loop, quantized
from support.unchanged import picture, same
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.weight_fit import changed_weights


def _amax(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight_quantizer.amax.clone() for name in weights(model)}


def _float() -> nn.Module:
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def _sqnr(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(model(*call), reference(*call)) for call in calls(seed=7)]
    noise = sum(float((y - x).double().square().sum()) for y, x in pairs)
    return 10 * math.log10(sum(float(x.double().square().sum()) for _, x in pairs) / noise)


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_scales_are_those_of_a_calibration_with_the_new_weights(bits: int, method: str) -> None:
    model, other = quantized(weight_bits=bits, weights=method), _float()
    table, before = tdq.scale_table(model), _amax(model)
    for changed in (model, other):
        add_low_rank(weights(changed)["mix"], 0.5)
        add_low_rank(weights(changed)["conv2"], 0.3, seed=8)
    assert tdq.recalibrate_weights(model) == ("mix.weight_quantizer", "conv2.weight_quantizer")
    expected = _amax(quantized(other, weight_bits=bits, weights=method))
    now = _amax(model)
    assert torch.equal(now["conv1"], before["conv1"])
    for name in ("mix", "conv2"):
        assert torch.equal(now[name], expected[name])
        assert not torch.equal(now[name], before[name])
    for field in ("timesteps", "scale"):
        assert torch.equal(getattr(tdq.scale_table(model), field), getattr(table, field))
    assert changed_weights(model) == []
    assert tdq.recalibrate_weights(model) == ()


def test_a_merged_lora_costs_nothing_once_the_weights_are_calibrated_again() -> None:
    model, other = quantized(statistic="mse"), _float()
    fresh = _sqnr(model, other)
    for changed in (model, other):
        for weight in weights(changed).values():
            add_low_rank(weight, 0.25)
    merged = _sqnr(model, other)
    tdq.recalibrate_weights(model)
    mended = _sqnr(model, other)
    assert merged < fresh - 5
    assert mended > fresh - 1.5


def test_weights_of_another_size_ask_for_a_whole_calibration() -> None:
    model, other = quantized(), _float()
    for changed in (model, other):
        with torch.no_grad():
            weights(changed)["conv1"].mul_(3)
    with pytest.warns(tdq.TdqWarning, match=r"conv1 \(3\.00 times as large.*calibrate the model again"):
        tdq.recalibrate_weights(model)
    (change,) = changed_weights(model)
    assert change.is_resized  # what is left to do is still said
    assert not change.misfits
    expected = quantized(other)
    mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))
    assert changed_weights(model) == []
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(expected).scale)
    assert torch.equal(model(*calls()[0]), expected(*calls()[0]))


def test_rounding_that_was_learned_stays_where_nothing_changed() -> None:
    config = tdq.make_config(
        3, 8, method="tdq_reconstruct", statistic="max", weights="mse", iterations=8, samples=8, progress=False
    )
    model = mtq.quantize(_float(), config, loop(calls()))
    before, kept = _amax(model), {name: w.detach().clone() for name, w in weights(model).items()}
    add_low_rank(weights(model)["mix"], 0.5)
    assert tdq.recalibrate_weights(model) == ("mix.weight_quantizer",)
    assert torch.equal(_amax(model)["conv1"], before["conv1"])
    assert torch.equal(model.conv1.weight_quantizer(model.conv1.weight), kept["conv1"])


def test_other_quantizers_of_the_same_layers_are_left_alone() -> None:
    config = fast_config()
    config["quant_cfg"] += [{"quantizer_name": "mix.input_quantizer", "cfg": {"num_bits": 8, "axis": -1}}]
    model = mtq.quantize(_float(), config, loop(calls()))
    model.mix.input_quantizer.amax = model.mix.input_quantizer.amax * 2
    before = model.mix.input_quantizer.amax.clone()
    add_low_rank(weights(model)["mix"], 0.5)
    assert tdq.recalibrate_weights(model) == ("mix.weight_quantizer",)
    assert torch.equal(model.mix.input_quantizer.amax, before)
    assert model.mix.input_quantizer.is_enabled


def test_another_method_on_demand() -> None:
    model = quantized(weights="mse")
    add_low_rank(weights(model)["mix"], 0.5)
    tdq.recalibrate_weights(model, "max")
    assert torch.equal(model.mix.weight_quantizer.amax.reshape(-1), weights(model)["mix"].detach().abs().amax(1))


def _kept() -> nn.Module:
    """Calibrated by ModelOpt, and taken as it is."""
    algorithm = fast_config(weights="keep")["algorithm"]
    model = mtq.quantize(_float(), {**fast_config(), "algorithm": ["max", algorithm]}, loop(calls()))
    add_low_rank(weights(model)["mix"], 0.5)
    return model


def _learned() -> nn.Module:
    config = tdq.make_config(8, 8, method="tdq_qat", statistic="max", weights="max", progress=False)
    return mtq.quantize(_float(), config, loop(calls()))


_REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no quantized weight": (_float, {}, "no weight of it is quantized"),
    "an unknown method": (quantized, {"method": "entropy"}, "Use 'max' or 'mse'"),
    "another algorithm's": (_kept, {}, r"recalibrate_weights\(model, method='mse'\)"),
    "learned": (_learned, {}, r"modelopt_tdq\.stop_learning\(model\)"),
}


@pytest.mark.parametrize("what", _REFUSED)
def test_refused_with_a_cure_and_nothing_changed(what: str) -> None:
    make, arguments, cure = _REFUSED[what]
    model = make()
    before = picture(model)
    with pytest.raises(TdqError, match=cure):
        tdq.recalibrate_weights(model, **arguments)
    after = picture(model)
    assert all(same(before[name], after[name]) for name in before)


def test_the_cures_help() -> None:
    model = _kept()
    assert tdq.recalibrate_weights(model, "mse") == ("mix.weight_quantizer",)
    model = _learned()
    tdq.stop_learning(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tdq.TdqWarning)
        assert tdq.recalibrate_weights(copy.deepcopy(model)) == ()
    add_low_rank(weights(model)["mix"], 0.5)
    assert tdq.recalibrate_weights(model) == ("mix.weight_quantizer",)


def test_corrections_of_changed_layers_are_taken_off() -> None:
    model = quantized(data=calls(samples=8), weight_bits=4, correction="per_step")
    with torch.no_grad():
        model.mix.weight.mul_(1.01).add_(0.02 * torch.randn_like(model.mix.weight))
    assert tdq.recalibrate_weights(model) == ("mix.weight_quantizer",)
    correction = tdq.layer_correction(model)
    assert correction is not None
    assert correction.names == ("conv1", "conv2", "conv_out")
