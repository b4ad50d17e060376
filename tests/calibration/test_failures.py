"""A calibration that fails says why, and leaves the model as it was.

ModelOpt converts the model before it looks at the algorithm, so ``mtq.quantize`` with a bad algorithm leaves
a converted model; the calibration itself changes nothing, and a second call with a mended config works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from support.unchanged import converted, picture, same, unchanged_by
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

Loop = Callable[[nn.Module], Any] | None


class _OwnError(Exception):
    """What the user's forward_loop raises."""


def _never(model: nn.Module) -> None:
    pass


def _one_time(model: nn.Module) -> None:
    for sample, _ in calls():
        model(sample, torch.tensor(300.0))


def _nan(model: nn.Module) -> None:
    loop(calls())(model)
    model(torch.full((1, 3, 8, 8), torch.nan), torch.tensor(5.0))


def _infinite_at_once(model: nn.Module) -> None:
    model(torch.full((1, 3, 8, 8), torch.inf), torch.tensor(5.0))


def _raises(model: nn.Module) -> None:
    loop(calls())(model)
    raise _OwnError("the user's own")


def _interrupted(model: nn.Module) -> None:
    loop(calls())(model)
    raise KeyboardInterrupt


def _part_of_the_model(model: nn.Module) -> None:
    model.conv1(noise(1, 8, 8, 8))


#: What is wrong, the config that it is wrong in, the loop, and the field that the error names.
_CASES: dict[str, tuple[dict[str, Any], Loop, str]] = {
    "no loop": ({}, None, "forward_loop"),
    "never calls the model": ({}, _never, "forward_loop"),
    "one time only": ({}, _one_time, "forward_loop"),
    "NaN": ({}, _nan, "forward_loop"),
    "infinity": ({}, _infinite_at_once, "forward_loop"),
    "calls a part of the model": ({}, _part_of_the_model, "forward_loop"),
    "more times than allowed": ({"max_steps": 3}, loop(calls()), "max_steps"),
    "pattern that matches nothing": ({"temporal": ["*nothing*"]}, loop(calls()), "temporal"),
    "one of two patterns": ({"temporal": ["conv1*", "nothing"]}, loop(calls()), "temporal"),
    "argument that forward lacks": ({"timestep_argument": "t"}, loop(calls()), "timestep_argument"),
    "argument that the call lacks": ({"timestep_argument": "context"}, loop(calls()), "timestep_argument"),
    "unknown statistic": ({"statistic": "median"}, loop(calls()), "statistic"),
    "no bins": ({"bins": 0}, loop(calls()), "bins"),
    "negative bins": ({"bins": -3}, loop(calls()), "bins"),
    "bins in words": ({"bins": "many"}, loop(calls()), "bins"),
    "negative smoothing": ({"smoothing": -0.1}, loop(calls()), "smoothing"),
    "NaN smoothing": ({"smoothing": float("nan")}, loop(calls()), "smoothing"),
    "percentile out of range": ({"statistic": "percentile", "percentile": 101.0}, loop(calls()), "percentile"),
    "negative threshold": ({"keep_static_below": -1.0}, loop(calls()), "keep_static_below"),
    "unknown field": ({"statistics": "max"}, loop(calls()), "statistics"),
    "unknown weights": ({"weights": "awq"}, loop(calls()), "weights"),
    "no samples": ({"replay_samples": 0}, loop(calls()), "replay_samples"),
}


@pytest.mark.parametrize("calibrated", [False, True], ids=["converted", "calibrated"])
@pytest.mark.parametrize("case", _CASES)
def test_names_the_field_and_changes_nothing(case: str, calibrated: bool) -> None:
    fields, forward_loop, field = _CASES[case]
    model = quantized(asymmetric=True) if calibrated else converted()

    def failing() -> None:
        with pytest.raises(TdqError) as error:
            mtq.calibrate(model, {**fast_config()["algorithm"], **fields}, forward_loop)
        assert error.value.field == field
        assert error.value.problem
        assert error.value.cure

    unchanged_by(model, failing)


@pytest.mark.parametrize("calibrated", [False, True], ids=["converted", "calibrated"])
@pytest.mark.parametrize(("forward_loop", "error"), [(_raises, _OwnError), (_interrupted, KeyboardInterrupt)])
def test_the_users_own_exception_passes_through(
    calibrated: bool, forward_loop: Loop, error: type[BaseException]
) -> None:
    model = quantized() if calibrated else converted()

    def failing() -> None:
        with pytest.raises(error):
            mtq.calibrate(model, fast_config()["algorithm"], forward_loop)

    unchanged_by(model, failing)


@pytest.mark.parametrize("calibrated", [False, True], ids=["converted", "calibrated"])
@pytest.mark.parametrize("statistic", ["max", "output"])
def test_a_failure_after_the_pass_over_the_data(calibrated: bool, statistic: str) -> None:
    """The model breaks when it is run again, on replayed inputs."""
    budget = [10**6]

    class Tired(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            budget[0] -= 1
            if budget[0] < 0:
                raise _OwnError("tired")
            return super().forward(sample, timestep)

    torch.manual_seed(0)
    model = mtq.quantize(Tired().eval(), {**fast_config(), "algorithm": None})
    if calibrated:
        mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))

    def failing() -> None:
        budget[0] = len(calls()) + 3
        algorithm = fast_config(statistic=statistic, protect_steps=True)["algorithm"]
        with pytest.raises(_OwnError):
            mtq.calibrate(model, algorithm, loop(calls()))
        budget[0] = 10**6

    unchanged_by(model, failing)


_FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "too many bits": ({"num_bits": 9, "axis": None}, "num_bits"),
    "unsigned": ({"num_bits": 8, "axis": None, "unsigned": True}, "unsigned"),
}


@pytest.mark.parametrize("case", _FORMATS)
def test_formats_that_are_not_supported(case: str) -> None:
    cfg, field = _FORMATS[case]
    config = fast_config()
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "conv1.input_quantizer", "cfg": cfg}]
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), {**config, "algorithm": None})
    before = picture(model)
    with pytest.raises(TdqError, match=r"conv1\.input_quantizer") as error:
        mtq.calibrate(model, config["algorithm"], loop(calls()))
    assert error.value.field == field
    assert same(picture(model), before)


def test_no_activation_quantizer_at_all() -> None:
    config = fast_config()
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]
    with pytest.raises(TdqError, match="enables no per-tensor activation quantizer"):
        mtq.quantize(TinyDenoiser(), config, loop(calls()))


def test_a_mended_config_works_on_thesame_model() -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    for fields, forward_loop, _ in _CASES.values():
        config = fast_config()
        config["algorithm"] = {**config["algorithm"], **fields}
        with pytest.raises(TdqError):
            mtq.quantize(model, config, forward_loop)
    mtq.quantize(model, fast_config(), loop(calls()))
    expected = quantized()
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(expected).scale)
    sample, time = calls()[0]
    assert torch.equal(model(sample, time), expected(sample, time))


def test_presets_made_by_hand_are_checked_when_made() -> None:
    for bits in (1, 9, 8.5, True, (5, 2), "8"):
        with pytest.raises(TdqError, match="activation_bits"):
            tdq.make_config(8, bits)  # type: ignore[arg-type]
    with pytest.raises(TdqError, match="weight_bits"):
        tdq.make_config(0, 8)
    with pytest.raises(TdqError, match="statistic"):
        tdq.make_config(statistic="median")
    with pytest.raises(TdqError, match="recipe"):
        tdq.recipe("int7")


def test_flags_of_all_quantizers_are_those_before_calibration() -> None:
    """After a calibration that works: nothing is left collecting or switched off."""
    model = quantized(statistic="output", protect_steps=True)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            assert module._if_quant, name
            assert not module._if_calib, name
    assert len(TIMES) == len(tdq.scale_table(model))
