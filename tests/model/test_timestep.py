"""Delivery of the time: from every form of call, to the quantizers of that very model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, SigmaDenoiser, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.timestep import deliver_timestep, find_timestep


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.mark.parametrize(
    "time",
    [
        300,
        300.0,
        torch.tensor(300),
        torch.tensor(300.0),
        torch.tensor([300]),
        torch.tensor([300.0], dtype=torch.float16),
        torch.tensor([300, 300]),
        torch.tensor([300.0, 300.0], dtype=torch.float64),
    ],
    ids=repr,
)
def test_every_form_of_the_time_gives_the_same_output(model: nn.Module, time: Any) -> None:
    sample = noise(2, 3, 8, 8)
    expected = model(sample, 300)
    assert torch.equal(model(sample, time), expected)
    assert torch.equal(model(sample, timestep=time), expected)
    assert torch.equal(model(timestep=time, sample=sample), expected)


def test_the_row_changes_the_output(model: nn.Module) -> None:
    quantizer = next(iter(tdq.temporal_quantizers(model).values()))
    x = noise(2, 8, 8, 8)
    outputs = []
    for time in TIMES:
        model(noise(2, 3, 8, 8), time)
        outputs.append(quantizer(x))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_a_named_argument() -> None:
    torch.manual_seed(0)
    model = mtq.quantize(SigmaDenoiser().eval(), fast_config(timestep_argument="sigma"), loop(calls()))
    expected = quantized()
    sample = noise(2, 3, 8, 8)
    assert torch.equal(model(sample, sigma=300), expected(sample, 300))
    assert tdq.scale_table(model).metadata["timestep_argument"] == "sigma"


def test_an_argument_that_only_kwargs_hold() -> None:
    class Wrapper(TinyDenoiser):
        def forward(self, sample: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(sample, kwargs["timestep"])

    def run(model: nn.Module) -> None:
        for sample, time in calls():
            model(sample, timestep=time)

    torch.manual_seed(0)
    model = mtq.quantize(Wrapper().eval(), fast_config(), run)
    assert torch.equal(model(noise(2, 3, 8, 8), timestep=20), quantized()(noise(2, 3, 8, 8), 20))


def test_a_call_without_a_time_names_the_cure(model: nn.Module) -> None:
    class Optional(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
            return super().forward(sample, 500 if timestep is None else timestep)

    optional = quantized(Optional().eval())
    for call in (lambda: optional(noise(1, 3, 8, 8)), lambda: optional(noise(1, 3, 8, 8), timestep=None)):
        with pytest.raises(TdqError, match="timestep_argument") as error:
            call()
        assert error.value.field == "timestep_argument"


def test_an_argument_that_forward_lacks_changes_nothing() -> None:
    model = TinyDenoiser()
    before = list(model._forward_pre_hooks.values())
    with pytest.raises(TdqError, match="it has sample, timestep, context"):
        deliver_timestep(model, "sigma")
    assert list(model._forward_pre_hooks.values()) == before


def test_delivering_twice_installs_one_hook() -> None:
    model = TinyDenoiser()
    first = deliver_timestep(model, "timestep")
    assert deliver_timestep(model, "timestep") is first
    assert len(model._forward_pre_hooks) == 1


def test_a_part_of_the_model_does_not_know_the_time() -> None:
    model = quantized()
    fresh = copy.deepcopy(model)  # nothing was called on this copy
    with pytest.raises(TdqError, match="Call the quantized model itself"):
        fresh.conv1(noise(1, 8, 8, 8))


def test_a_copy_listens_to_its_own_calls(model: nn.Module) -> None:
    copied = copy.deepcopy(model)
    name, quantizer = next(iter(tdq.temporal_quantizers(model).items()))
    own = tdq.temporal_quantizers(copied)[name]
    x = noise(1, 8, 8, 8)
    model(noise(1, 3, 8, 8), TIMES[0])
    expected = quantizer(x)
    copied(noise(1, 3, 8, 8), TIMES[-1])
    assert torch.equal(quantizer(x), expected)
    assert not torch.equal(own(x), expected)
    assert find_timestep(copied) is not find_timestep(model)
    shared = {id(q._timestep) for q in tdq.temporal_quantizers(copied).values()}
    assert shared == {id(find_timestep(copied))}


def test_changing_a_copy_leaves_the_original(model: nn.Module) -> None:
    before = tdq.scale_table(model)
    copied = copy.deepcopy(model)
    tdq.set_scale_table(copied, tdq.ScaleTable(before.timesteps, before.scale * 2, before.names))
    assert torch.equal(tdq.scale_table(model).scale, before.scale)
