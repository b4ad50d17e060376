"""Side by side with ModelOpt's own algorithms: equal where it should be, composed, one after the other."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import FAMILIES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from support.slow import slow_but
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits, code_range, fake_quantize


def _pair(bits: NumBits, family: str) -> tuple[nn.Module, nn.Module]:
    """The same model, calibrated by ModelOpt's "max" and by ours with one bin."""
    chosen = FAMILIES[family]
    torch.manual_seed(0)
    model = chosen.make().eval()
    config = tdq.make_config(bits, bits, statistic="max", bins=1, weights="max", correction="none", progress=False)
    theirs = mtq.quantize(copy.deepcopy(model), {**config, "algorithm": "max"}, chosen.forward_loop())
    return theirs, mtq.quantize(model, config, chosen.forward_loop())


PAIRS = list(product((8, 4, FP8_E4M3), ("plain", "unet_condition", "flux")))


@pytest.mark.parametrize(("bits", "family"), slow_but(PAIRS, *PAIRS[::3], (8, "unet_condition"), (FP8_E4M3, "flux")))
def test_one_bin_and_max_are_modelopts_max_calibration_bit_for_bit(bits: NumBits, family: str) -> None:
    theirs, ours = _pair(bits, family)
    quantizers = tdq.temporal_quantizers(ours)
    assert len(quantizers) >= 3
    for name, quantizer in quantizers.items():
        amax = theirs.get_submodule(name)._amax
        assert torch.equal(quantizer._scale, (amax / code_range(bits)[1]).expand_as(quantizer._scale)), name
    for name, quantizer in theirs.named_modules():
        if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and name not in quantizers:
            assert torch.equal(quantizer._amax, ours.get_submodule(name)._amax), name


def test_weights_are_calibrated_as_by_modelopts_mse_on_a_grid_up_to_the_largest_magnitude() -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    config = fast_config(weights="mse", weight_bits=4)
    grid = {"method": "mse", "start_multiplier": 0.4, "stop_multiplier": 1.0, "step_size": 0.02}
    theirs = mtq.quantize(copy.deepcopy(model), {**config, "algorithm": grid}, loop(calls()))
    ours = mtq.quantize(model, config, loop(calls()))
    for layer in ("conv1", "mix", "conv2"):
        found = ours.get_submodule(layer).weight_quantizer._amax
        assert torch.equal(found, theirs.get_submodule(layer).weight_quantizer._amax)


def test_weights_that_are_calibrated_already_are_kept() -> None:
    model = quantized()
    model.conv1.weight_quantizer._amax.mul_(1.5)
    before = model.conv1.weight_quantizer._amax.clone()
    mtq.calibrate(model, fast_config(weights="keep")["algorithm"], loop(calls()))
    assert torch.equal(model.conv1.weight_quantizer._amax, before)


def _with_outlier_channels() -> nn.Module:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    with torch.no_grad():
        model.conv1.bias[2] += 40.0  # reaches the input of `mix` in one channel
    return model


def test_smoothquant_before_ours_keeps_its_scales() -> None:
    config = fast_config()
    config["algorithm"] = [{"method": "smoothquant", "alpha": 0.5}, config["algorithm"]]
    model = mtq.quantize(_with_outlier_channels(), config, loop(calls()))
    quantizer = model.mix.input_quantizer
    assert isinstance(quantizer, tdq.TemporalQuantizer)
    assert quantizer.pre_quant_scale is not None
    assert quantizer.pre_quant_scale.shape == (8,)
    assert float(quantizer.pre_quant_scale.max() / quantizer.pre_quant_scale.min()) > 1.5
    assert quantizer._scale.shape == (4,)

    # the table is that of the smoothed activation
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = quantizer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    sample, time = calls()[0]
    model(sample, time)
    handle.remove()
    activation, found = seen[0]
    expected = fake_quantize(activation * quantizer.pre_quant_scale, quantizer._scale[-1:], None, 8)
    assert torch.equal(found, expected)
    exact = _with_outlier_channels()(sample, time)
    error = (model(sample, time) - exact).square().sum() / exact.square().sum()
    assert float(error) < 1e-3


def test_smoothquant_and_ours_are_saved_together(tmp_path: Path) -> None:
    config = fast_config()
    config["algorithm"] = ["smoothquant", config["algorithm"]]
    model = mtq.quantize(_with_outlier_channels(), config, loop(calls()))
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(TinyDenoiser().eval(), tmp_path / "model.pt")
    for sample, time in calls():
        assert torch.equal(restored(sample, time), model(sample, time))


def test_smoothquant_after_ours_is_refused_with_the_right_order() -> None:
    model = quantized()
    with pytest.raises(TdqError, match=r'algorithm = \["smoothquant", \{"method": "tdq"\}\]'):
        mtq.calibrate(model, "smoothquant", loop(calls()))


def test_max_after_ours_gives_a_static_table() -> None:
    model = quantized(asymmetric=True)
    config = fast_config()
    expected = mtq.quantize(_fresh(), {**config, "algorithm": "max"}, loop(calls(seed=5)))
    mtq.calibrate(model, "max", loop(calls(seed=5)))
    table = tdq.scale_table(model)
    assert len(table) == 1
    assert table.offset is None
    for column, name in enumerate(table.names):
        assert torch.equal(table.scale[0, column], expected.get_submodule(name)._amax / 127)
    sample, time = calls()[0]
    exact, theirs = model(sample, time), expected(sample, time)
    torch.testing.assert_close(exact, theirs, rtol=0, atol=1e-2)


def _fresh() -> nn.Module:
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def test_ours_after_max_starts_from_nothing() -> None:
    config = fast_config()
    model = mtq.quantize(_fresh(), {**config, "algorithm": "max"}, loop([(9 * s, t) for s, t in calls()]))
    mtq.calibrate(model, config["algorithm"], loop(calls()))
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(quantized()).scale)


def test_another_format_on_a_calibrated_model() -> None:
    model = quantized()
    config = tdq.make_config(
        8, 4, statistic="max", weights="max", correction="none", progress=False, protect_steps=False
    )
    mtq.quantize(model, config, loop(calls()))
    torch.manual_seed(0)
    expected = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(expected).scale)
    assert torch.equal(model(noise(1, 3, 8, 8), 20), expected(noise(1, 3, 8, 8), 20))


def test_other_kinds_of_activation_quantizers_are_left_to_modelopt() -> None:
    """Per channel and dynamic ones stay as they are, beside ours."""
    config = fast_config()
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "mix.input_quantizer", "cfg": {"num_bits": 8, "axis": -1}},
        {"quantizer_name": "conv2.input_quantizer", "cfg": {"num_bits": 8, "axis": None, "type": "dynamic"}},
    ]
    config["quant_cfg"] = config["quant_cfg"] + rules
    model = mtq.quantize(_fresh(), config, loop(calls()))
    assert list(tdq.temporal_quantizers(model)) == ["conv1.input_quantizer"]
    assert type(model.mix.input_quantizer) is TensorQuantizer
    assert model.mix.input_quantizer._amax.numel() == 8
    assert torch.isfinite(model(*calls()[0])).all()


def test_layers_that_never_run_are_left_unquantized() -> None:
    class Spare(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 4)

    model = mtq.quantize(Spare().eval(), fast_config(), loop(calls()))
    assert "spare.input_quantizer" not in tdq.scale_table(model).names
    assert torch.isfinite(model.spare(torch.ones(1, 4))).all()
