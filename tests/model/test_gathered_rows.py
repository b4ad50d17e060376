"""What all quantizers have in the row of a call is gathered at once, and is what each would have read by itself."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import calls, noise, quantized
from support.operators import Operators
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.model.rows import CallRows, TimesKey
from modelopt_tdq.model.timestep import find_timestep

ONE, SEVERAL = torch.tensor([300.0]), torch.tensor([10.0, 900.0])


@pytest.fixture(params=[False, True], ids=["symmetric", "offsets"])
def model(request: pytest.FixtureRequest) -> Any:
    model = quantized(asymmetric=request.param)
    mtq.fold_weight(model)
    return model


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Calls a model whose quantizers find and read their rows each by itself."""

    def called(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(TimesKey, "__call__", lambda self, bits: None)
            y: Tensor = model(x, t)
        return y

    return called


def _gathers(model: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, list[str]]:
    with torch.no_grad(), Operators() as operators:
        y = model(x, t)
    return y, operators.names


@pytest.mark.parametrize("t", [ONE, SEVERAL])
def test_one_operator_reads_the_row_of_all_quantizers(model: Any, t: Tensor, alone: Any) -> None:
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        model(x, t)
    y, names = _gathers(model, x, t)
    assert names.count("aten.stack.default") == names.count("aten.index.Tensor") == 1
    assert torch.equal(y, alone(model, x, t))


def _new_scales(model: Any) -> None:
    table = tdq.scale_table(model)
    tdq.set_scale_table(model, dataclasses.replace(table, scale=table.scale * 1.7))


def _new_times(model: Any) -> None:
    table = tdq.scale_table(model)
    tdq.set_scale_table(model, dataclasses.replace(table, timesteps=table.timesteps + 290.0))


def _one_quantizer_alone(model: Any) -> None:
    quantizer = list(temporal_quantizers(model).values())[1]
    quantizer.set_rows(quantizer._timesteps, quantizer._scale * 3.0)


def _fewer_rows(model: Any) -> None:
    quantizer = next(iter(temporal_quantizers(model).values()))
    quantizer.set_rows(quantizer._timesteps[1:].clone(), quantizer._scale[1:] * 2.0)


def _one_row(model: Any) -> None:
    quantizer = next(iter(temporal_quantizers(model).values()))
    quantizer.set_rows(quantizer._timesteps[:1].clone(), quantizer._scale[:1] * 2.0)


def _turned_back_by_others(model: Any) -> None:
    for quantizer in temporal_quantizers(model).values():
        quantizer.set_rows(
            quantizer._timesteps, quantizer._scale, quantizer.offset, quantizer._scale * 1.1, quantizer._scale * 0.5
        )


def _loaded(model: Any) -> None:
    other = copy.deepcopy(model)
    _new_scales(other)
    model.load_state_dict(other.state_dict())


def _assigned(model: Any) -> None:
    other = copy.deepcopy(model)
    _new_scales(other)
    model.load_state_dict(other.state_dict(), assign=True)


def _copied_past_the_count_of_writes(model: Any) -> None:
    """As ``mine.data.copy_(its.data)`` does, which no version tells of."""
    other = copy.deepcopy(model)
    _new_scales(other)
    for mine, its in zip(model.buffers(), other.buffers(), strict=True):
        mine.data.copy_(its.data)


def _new_storage(model: Any) -> None:
    other = copy.deepcopy(model)
    _new_scales(other)
    for mine, its in zip(model.buffers(), other.buffers(), strict=True):
        mine.data = its.data


def _smoothed(model: Any) -> None:
    name = "conv1.input_quantizer"
    temporal_quantizers(model)[name].set_channels(torch.linspace(0.5, 2.0, 8).reshape(8, 1, 1))


def _disabled(model: Any) -> None:
    next(iter(temporal_quantizers(model).values())).disable()


CHANGES = [
    _new_scales, _new_times, _one_quantizer_alone, _fewer_rows, _one_row, _turned_back_by_others, _loaded, _assigned,
    _copied_past_the_count_of_writes, _new_storage, _smoothed, _disabled,
]  # fmt: skip


@pytest.mark.parametrize("t", [ONE, SEVERAL])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_between_two_calls_is_read_anew(
    model: Any, t: Tensor, change: Callable[[Any], None], alone: Any
) -> None:
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        model(x, t)
        before = model(x, t)
        change(model)
        expected = alone(model, x, t)
        assert not torch.equal(expected, before)
        for _ in range(3):  # read by each; gathered from what was asked for then
            assert torch.equal(model(x, t), expected)


@pytest.mark.parametrize("change", [_new_scales, _one_quantizer_alone, _loaded, _fewer_rows, _new_storage])
def test_what_changes_within_a_call_is_read_anew(model: Any, change: Callable[[Any], None], alone: Any) -> None:
    """The rows of all quantizers are gathered by the first: what is written after that counts for those behind."""
    x, other = noise(2, 3, 8, 8), copy.deepcopy(model)

    def called(model: Any, call: Callable[..., Tensor]) -> Tensor:
        hook = model.conv2.register_forward_pre_hook(lambda module, args: change(model))
        y = call(model, x, ONE)
        hook.remove()
        return y

    with torch.no_grad():
        before = model(x, ONE)
        assert torch.equal(before, model(x, ONE))
        found = called(model, lambda model, x, t: model(x, t))
    assert torch.equal(found, called(other, alone))
    if change in (_new_scales, _loaded, _new_storage):
        assert not torch.equal(found, before)


def test_memory_that_is_filled_right_before_a_layer_runs(model: Any) -> None:
    """As by hooks that keep buffers on disk: what is gathered ahead of that is of no use."""
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x, ONE)
        for quantizer in temporal_quantizers(model).values():
            kept = {name: (buffer, buffer.clone()) for name, buffer in quantizer.named_buffers()}

            def fill(module: nn.Module, args: Any, kept: Any = kept) -> None:
                for buffer, values in kept.values():
                    buffer.data = values.clone()

            def drop(module: nn.Module, args: Any, output: Any, kept: Any = kept) -> None:
                for buffer, _ in kept.values():
                    buffer.data = torch.full_like(buffer, 0x3F800000)

            quantizer.register_forward_pre_hook(fill)
            quantizer.register_forward_hook(drop)
            drop(quantizer, (), None)
        for _ in range(3):
            assert torch.equal(model(x, ONE), expected)


def test_copies_gather_their_own(model: Any, alone: Any) -> None:
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x, ONE)
        copied = copy.deepcopy(model)
        _new_scales(copied)
        expected = alone(copied, x, ONE)
        assert not torch.equal(expected, before)
        for _ in range(2):
            assert torch.equal(copied(x, ONE), expected)
            assert torch.equal(model(x, ONE), before)


def test_other_dtypes_keep_the_scales(model: Any, alone: Any) -> None:
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        model(x, ONE)
        scales = [quantizer._scale.clone() for quantizer in temporal_quantizers(model).values()]
        model.bfloat16()
        x = x.bfloat16()
        expected = alone(model, x, ONE)
        for _ in range(2):
            assert torch.equal(model(x, ONE), expected)
    for quantizer, scale in zip(temporal_quantizers(model).values(), scales, strict=True):
        assert torch.equal(quantizer._scale, scale)


def test_threads_have_times_of_their_own(model: Any, alone: Any) -> None:
    x, times = noise(2, 3, 8, 8), [ONE, SEVERAL, torch.tensor([900.0]), torch.tensor([20.0, 300.0])]
    expected = [alone(model, x, t) for t in times]
    start, wrong = threading.Barrier(len(times)), []

    def run(number: int) -> None:
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(x, times[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(times))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_modes_of_autograd_in_turns(model: Any, alone: Any) -> None:
    x = noise(2, 3, 8, 8)
    expected = alone(model, x, SEVERAL)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        image = x.clone()
        with mode():
            y = model(image.requires_grad_(mode is torch.enable_grad), SEVERAL)
            assert torch.equal(y, expected)
        if mode is torch.enable_grad:
            y.sum().backward()
            assert bool(image.grad.isfinite().all())


def test_buffers_made_in_inference_mode_are_not_counted_and_not_gathered(alone: Any) -> None:
    with torch.inference_mode():
        model = quantized()
        x = noise(2, 3, 8, 8)
        before = model(x, ONE)
        assert torch.equal(model(x, ONE), before)
        quantizer = next(iter(temporal_quantizers(model).values()))
        quantizer._scale_bits.view(torch.float32).mul_(2.0)
        quantizer._sign()
        found = model(x, ONE)
        assert not torch.equal(found, before)
    assert torch.equal(alone(model, x, ONE), found)


def test_transforms_of_functions(model: Any) -> None:
    """Batched calls, and calls with other buffers than the model's."""
    x = noise(3, 2, 3, 8, 8)
    other = copy.deepcopy(model)
    _new_scales(other)
    with torch.no_grad():
        before = torch.stack([model(part, SEVERAL) for part in x])
        batched = torch.vmap(lambda part: model(part, SEVERAL))(x)
        torch.testing.assert_close(batched, before)
        expected = other(x[0], SEVERAL)
        for _ in range(2):
            found = torch.func.functional_call(model, dict(other.named_buffers()), (x[0], SEVERAL))
            assert torch.equal(found, expected)
            assert torch.equal(model(x[0], SEVERAL), before[0])


def test_compiled_calls_between_others() -> None:
    model, x = quantized(), noise(2, 3, 8, 8)
    mtq.fold_weight(model)
    with torch.no_grad():
        expected = model(x, SEVERAL)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(x, SEVERAL), expected)
        assert torch.equal(model(x, SEVERAL), expected)
        _new_scales(model)
        before, expected = expected, model(x, SEVERAL)
        torch.testing.assert_close(compiled(x, SEVERAL), expected)
        assert not torch.allclose(expected, before)


def test_times_of_tokens() -> None:
    """Tokens of linear layers take rows of their own."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).tanh())
            return y

    data = [(noise(2, 4, 8, seed=i) * (1 + i), time) for i, (_, time) in enumerate(calls(samples=1, batch=1))]
    model = quantized(Tokens().eval(), data, high_precision=[])
    times, x = torch.tensor([[20.0, 300.0, 600.0, 900.0], [900.0, 20.0, 20.0, 300.0]]), noise(2, 4, 8)
    with torch.no_grad():
        single = torch.stack(
            [torch.stack([model(x[b : b + 1, n : n + 1], times[b, n])[0, 0] for n in range(4)]) for b in range(2)]
        )
        for _ in range(2):
            torch.testing.assert_close(model(x, times), single)
    assert len(temporal_quantizers(model)) == 2


def test_what_is_kept_between_calls_is_that_of_the_last(model: Any) -> None:
    timestep = find_timestep(model)
    assert timestep is not None
    with torch.no_grad():
        for shift in range(3):
            model(noise(2, 3, 8, 8), ONE)
            table = tdq.scale_table(model)
            tdq.set_scale_table(model, dataclasses.replace(table, timesteps=table.timesteps + 1.0 + shift))
    assert len(timestep.asked_before) == 1


def test_columns_of_other_kinds_are_left_to_their_quantizers() -> None:
    keys = [TimesKey() for _ in range(5)]
    columns = {key: (torch.tensor([1.0, 2.0 + i]).view(torch.int32),) for i, key in enumerate(keys)}
    columns[keys[3]] = (torch.zeros(3, dtype=torch.int32),)
    columns[keys[4]] = (torch.empty(2, dtype=torch.int32, device="meta"),)
    rows = CallRows(torch.tensor([1]), columns)
    found = [rows.values(key, columns[key]) for key in keys]
    assert [None if values is None else values[0].tolist() for values in found] == [[2.0], [3.0], [4.0], None, None]
    assert rows.values(keys[0], (*columns[keys[0]], columns[keys[1]][0])) is None
    assert rows.values(keys[0], (columns[keys[0]][0].clone(),)) is None
    columns[keys[0]][0].add_(1)
    assert rows.values(keys[0], columns[keys[0]]) is None
    assert rows.asked.keys() == set(keys)
