"""A calibration that fails says why, and leaves the model as it was.

ModelOpt converts the model before it looks at the algorithm, so ``mtq.quantize`` with a bad algorithm leaves
a converted model; the calibration itself changes nothing, and a second call with a mended config works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import TIMES, SigmaDenoiser, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.timestep import find_timestep

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


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (dict, list, set, tuple)) or type(value).__module__.startswith("modelopt"):
        inner = vars(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else value
        if isinstance(inner, dict):
            return {k: _value(v) if not isinstance(v, nn.Module) else id(v) for k, v in inner.items()}
        return [_value(v) for v in inner] if isinstance(inner, (list, tuple)) else repr(inner)
    return id(value) if isinstance(value, nn.Module) else repr(value)


def _picture(model: nn.Module) -> dict[str, Any]:
    """Everything about every module: class, attributes, hooks, buffers, what calibrators hold."""
    picture: dict[str, Any] = {}
    for name, module in model.named_modules():
        picture[name] = (id(module), type(module), {k: _value(v) for k, v in vars(module).items()})
    return picture


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _converted() -> nn.Module:
    """A model that ModelOpt has converted; nothing is calibrated."""
    torch.manual_seed(0)
    return mtq.quantize(TinyDenoiser().eval(), {**fast_config(), "algorithm": None})


def _unchanged_by(model: nn.Module, failing: Callable[[], Any]) -> None:
    sample, time = calls()[0]
    model(sample, time)
    modes = repr(mto.modelopt_state(model)["modelopt_state_dict"])
    before = _picture(model)
    output = model(sample, time)
    failing()
    assert repr(mto.modelopt_state(model)["modelopt_state_dict"]) == modes
    after = _picture(model)
    assert after.keys() == before.keys()
    for name in before:
        assert _same(before[name], after[name]), name
    assert torch.equal(model(sample, time), output)


@pytest.mark.parametrize("calibrated", [False, True], ids=["converted", "calibrated"])
@pytest.mark.parametrize("case", _CASES)
def test_names_the_field_and_changes_nothing(case: str, calibrated: bool) -> None:
    fields, forward_loop, field = _CASES[case]
    model = quantized(asymmetric=True) if calibrated else _converted()

    def failing() -> None:
        with pytest.raises(TdqError) as error:
            mtq.calibrate(model, {**fast_config()["algorithm"], **fields}, forward_loop)
        assert error.value.field == field
        assert error.value.problem
        assert error.value.cure

    _unchanged_by(model, failing)


@pytest.mark.parametrize("calibrated", [False, True], ids=["converted", "calibrated"])
@pytest.mark.parametrize(("forward_loop", "error"), [(_raises, _OwnError), (_interrupted, KeyboardInterrupt)])
def test_the_users_own_exception_passes_through(
    calibrated: bool, forward_loop: Loop, error: type[BaseException]
) -> None:
    model = quantized() if calibrated else _converted()

    def failing() -> None:
        with pytest.raises(error):
            mtq.calibrate(model, fast_config()["algorithm"], forward_loop)

    _unchanged_by(model, failing)


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

    _unchanged_by(model, failing)


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
    before = _picture(model)
    with pytest.raises(TdqError, match=r"conv1\.input_quantizer") as error:
        mtq.calibrate(model, config["algorithm"], loop(calls()))
    assert error.value.field == field
    assert _same(_picture(model), before)


def test_no_activation_quantizer_at_all() -> None:
    config = fast_config()
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]
    with pytest.raises(TdqError, match="enables no per-tensor activation quantizer"):
        mtq.quantize(TinyDenoiser(), config, loop(calls()))


def test_a_mended_config_works_on_the_same_model() -> None:
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


def test_submodules_that_modelopt_adds_while_calibrating_are_taken_back() -> None:
    """Queries, keys and values get a shared state from ModelOpt's calibration of the weights."""

    class Attention(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            h = self.conv_in(sample).flatten(2).movedim(1, 2)
            h = nn.functional.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h))
            return self.conv_out(h.movedim(2, 1).reshape(len(sample), 8, 8, 8))

    torch.manual_seed(0)
    model = mtq.quantize(Attention().eval(), {**fast_config(), "algorithm": None})

    def failing() -> None:
        with pytest.raises(TdqError):
            mtq.calibrate(model, fast_config()["algorithm"], _never)

    _unchanged_by(model, failing)
    names = [name for name, _ in model.named_modules()]
    mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))
    assert [name for name, _ in model.named_modules()] != names  # else this tests nothing


def test_a_failed_change_of_the_time_argument_keeps_the_old_one() -> None:
    class Both(SigmaDenoiser):
        def forward(self, sample: Tensor, sigma: Tensor, timestep: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(sample, sigma)

    torch.manual_seed(0)
    model = mtq.quantize(Both().eval(), fast_config(timestep_argument="sigma"), loop(calls()))
    with pytest.raises(TdqError):
        mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))
    timestep = find_timestep(model)
    assert timestep is not None
    assert (timestep.argument, timestep.position) == ("sigma", 1)
    model(*calls()[0])


def test_handles_of_the_users_hooks_still_remove_them() -> None:
    model = _converted()
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(1))
    with pytest.raises(TdqError):
        mtq.calibrate(model, fast_config()["algorithm"], _never)
    model(*calls()[0])
    handle.remove()
    model(*calls()[0])
    assert len(seen) == 1


def test_scales_of_weights_that_modelopt_overwrites_in_place_come_back() -> None:
    model = quantized()
    amax = model.conv1.weight_quantizer._amax
    amax.mul_(1.5)

    def failing() -> None:
        with pytest.raises(TdqError):
            mtq.calibrate(model, fast_config()["algorithm"], _one_time)

    _unchanged_by(model, failing)
    assert model.conv1.weight_quantizer._amax is amax


def test_calibrators_of_modelopt_forget_what_they_saw() -> None:
    """A per-channel activation quantizer, which ModelOpt calibrates: loud data must not stay in it."""
    config = fast_config()
    rule = {"quantizer_name": "mix.input_quantizer", "cfg": {"num_bits": 8, "axis": -1}}
    config["quant_cfg"] = [*config["quant_cfg"], rule]

    def loud(model: nn.Module) -> None:
        loop([(100 * sample, time) for sample, time in calls()])(model)
        raise _OwnError

    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), {**config, "algorithm": None})
    with pytest.raises(_OwnError):
        mtq.calibrate(model, config["algorithm"], loud)
    mtq.calibrate(model, config["algorithm"], loop(calls()))
    torch.manual_seed(0)
    expected = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    assert torch.equal(model.mix.input_quantizer._amax, expected.mix.input_quantizer._amax)


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
