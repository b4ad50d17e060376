"""Delivery of the time: from every form of call, to the quantizers of that very model."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, SigmaDenoiser, TinyDenoiser, at, calls, fast_config, loop, noise, quantized
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
        with at(model, time):
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
    with pytest.raises(TdqError, match="Call that model itself"):
        fresh.conv1(noise(1, 8, 8, 8))


def test_a_copy_listens_to_its_own_calls(model: nn.Module) -> None:
    copied = copy.deepcopy(model)
    name, quantizer = next(iter(tdq.temporal_quantizers(model).items()))
    own = tdq.temporal_quantizers(copied)[name]
    x = noise(1, 8, 8, 8)
    with at(model, TIMES[0]):
        expected = quantizer(x)
        with at(copied, TIMES[-1]):
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


class _Wrapped(nn.Module):
    """A root that hands its time on to the part that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = TinyDenoiser()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.unet(sample, timestep)  # type: ignore[no-any-return]


def test_the_time_is_gone_when_the_call_is_over_or_has_failed(model: nn.Module) -> None:
    timestep = find_timestep(model)
    assert timestep is not None
    model(noise(1, 3, 8, 8), 300)
    assert timestep.value is None
    with pytest.raises(RuntimeError, match="channels"):
        model(noise(1, 5, 8, 8), 300)
    assert timestep.value is None


@pytest.mark.parametrize("how", ["part", "forward"])
def test_what_is_called_past_the_root_is_refused(how: str) -> None:
    root = quantized(_Wrapped().eval())
    sample = noise(2, 3, 8, 8)
    expected = root(sample, 20)
    call = root.unet if how == "part" else root.forward
    with pytest.raises(TdqError, match=r"Call that model itself, as model\(...\)") as raised:
        call(sample, 20)  # would have used the time of the call before
    assert raised.value.field == "timestep"
    assert torch.equal(root(sample, 20), expected)


def _in_threads(model: nn.Module, sample: Tensor) -> list[Any]:
    """What calls at all times give that are in flight together, in a thread each; or their errors."""
    meet = threading.Barrier(len(TIMES))

    def wait(module: nn.Module, args: Any) -> None:
        meet.wait(60)

    def run(time: float) -> Any:
        try:
            return model(sample, time)
        except TdqError as error:
            meet.abort()
            return error

    handle = model.conv1.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(len(TIMES)) as pool:
            return list(pool.map(run, TIMES))
    finally:
        handle.remove()


def test_calls_in_other_threads_have_their_own_times() -> None:
    model, sample = quantized(), noise(2, 3, 8, 8)
    mtq.fold_weight(model)
    expected = [model(sample, time) for time in TIMES]
    for found, own in zip(_in_threads(model, sample), expected, strict=True):
        assert torch.equal(found, own)


def test_threads_that_would_disturb_each_other_are_refused() -> None:
    model, sample = quantized(), noise(2, 3, 8, 8)
    expected = model(sample, TIMES[0])
    first, second = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        first.set()
        second.wait(60)

    handle = model.conv1.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(model, sample, TIMES[0])
        first.wait(60)
        with pytest.raises(TdqError, match="weights are quantized on the fly") as raised:
            model(sample, TIMES[0])
        second.set()
        assert torch.equal(other.result(), expected)
    handle.remove()
    assert "fold_weight" in raised.value.cure
    assert torch.equal(model(sample, TIMES[0]), expected)  # nothing is left behind


def test_a_call_inside_a_call_has_its_own_time(model: nn.Module) -> None:
    sample = noise(2, 3, 8, 8)
    expected = model(sample, TIMES[0])
    other = model(sample, TIMES[-1])
    seen: list[Tensor] = []

    def again(module: nn.Module, args: Any) -> None:
        if not seen:
            seen.append(torch.empty(0))
            seen.append(model(sample, TIMES[-1]))

    handle = model.conv1.register_forward_pre_hook(again)
    try:
        assert torch.equal(model(sample, TIMES[0]), expected)
    finally:
        handle.remove()
    assert torch.equal(seen[1], other)
    assert not torch.equal(other, expected)
