"""What a failed calibration has to give back beyond the quantizers' own attributes."""

from __future__ import annotations

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SigmaDenoiser, TinyDenoiser, calls, fast_config, loop, quantized
from support.unchanged import converted, unchanged_by
from torch import Tensor, nn

from modelopt_tdq import TdqError
from modelopt_tdq.model.timestep import find_timestep


class _OwnError(Exception):
    """What the user's forward_loop raises."""


def _never(model: nn.Module) -> None:
    pass


def _one_time(model: nn.Module) -> None:
    loop(calls(times=[300.0]))(model)


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

    unchanged_by(model, failing)
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
    model = converted()
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

    unchanged_by(model, failing)
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
