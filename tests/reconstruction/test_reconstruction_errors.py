"""What goes wrong is said, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from small_runs import FAST
from support.models import TinyDenoiser, calls, fast_config, loop
from support.unchanged import converted, unchanged_by
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.reconstruction import reconstruct
from modelopt_tdq.reconstruction.learn import BlockParts
from modelopt_tdq.reconstruction.reconstruct import tdq_reconstruct


def _fails(model: nn.Module, match: str, **fields: Any) -> TdqError:
    algorithm = {**fast_config(**{**FAST, **fields})["algorithm"]}
    with pytest.raises(TdqError, match=match) as error:
        mtq.calibrate(model, algorithm, loop(calls(4, 4)))
    return error.value


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("without enough samples", {"samples": 1, "intervals": "table"}),
        ("memory_limit", {"memory_limit": 100}),
        ("diverged", {"interval_lr": 1e30}),
    ],
)
def test_an_error_leaves_the_model_as_it_was(match: str, fields: dict[str, Any]) -> None:
    model = converted()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    unchanged_by(model, lambda: _fails(model, match, **fields))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_interruption_leaves_the_model_as_it_was(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    save = reconstruct._Run.__call__

    def stopping(self: Any, number: int, *args: Any) -> Any:
        result = save(self, number, *args)
        if number == block:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(reconstruct._Run, "__call__", stopping)

    def failing() -> None:
        with pytest.raises(KeyboardInterrupt):
            tdq_reconstruct(model, loop(calls(4, 4)), samples=8, iterations=60, progress=False, protect_steps=False)

    unchanged_by(model, failing)


def test_a_loss_that_is_no_number_names_block_quantizer_and_time() -> None:
    error = _fails(converted(), "diverged", interval_lr=1e30, intervals="static", learn_rounding=False)
    assert error.field == "loss"
    assert any(f"block {b} " in error.problem and f"{b}.input_quantizer" in error.problem for b in ("conv1", "conv2"))
    assert any(f"at time {t:g};" in error.problem for t in (900.0, 600.0, 300.0, 20.0))
    assert "interval_lr" in error.cure


@pytest.mark.parametrize("seed", [0, 1])
def test_the_time_is_that_of_the_sample_that_is_no_number(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = reconstruct.learn

    def poisoned(parts: BlockParts, cache: Any, *args: Any) -> None:
        if parts.name == "mix":
            chunk = cache.chunk(0)
            chunk.inputs[0][chunk.times == 600.0] = float("nan")
        learn(parts, cache, *args)

    monkeypatch.setattr(reconstruct, "learn", poisoned)
    error = _fails(converted(), "diverged", batch_size=16, seed=seed, iterations=5)
    assert "block mix " in error.problem
    assert "at time 600;" in error.problem
    assert "mix.input_quantizer" in error.problem


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intervals", "dynamic_absmax"),
        ("learn_weights", True),
        ("iterations", 0),
        ("samples", 0),
        ("qdrop", 1.5),
        ("warm_up", 1.0),
        ("memory_limit", 0),
        ("rounding_lr", 0.0),
    ],
)
def test_fields_that_cannot_be_used(field: str, value: Any) -> None:
    with pytest.raises(TdqError) as error:
        tdq.make_config(4, 8, method="tdq_reconstruct", **{field: value})
    assert error.value.field == field


def test_a_model_that_was_not_reconstructed_has_no_report() -> None:
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), fast_config(method="tdq_qat"), loop(calls()))
    with pytest.raises(TdqError, match="not reconstructed"):
        tdq.reconstruction_report(model)


class _Nameless(TinyDenoiser):
    def forward(self, sample: Tensor, /, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep)


class _Twice(TinyDenoiser):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        h = self.conv_in(sample) * (0.2 + timestep / 1000)
        return self.conv_out(self.conv2(self.conv1(self.conv1(h).relu()).relu()))


def _quantized(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return mtq.quantize(make().eval(), fast_config(**{**FAST, "iterations": 60}), loop(calls(4, 4)))


def test_a_model_whose_calls_cannot_be_repeated() -> None:
    with pytest.raises(TdqError, match="cannot be passed by name"):
        _quantized(_Nameless)


def test_layers_that_run_twice_or_never_stay_as_calibrated() -> None:
    model = _quantized(_Twice)
    report = {block.name: block for block in tdq.reconstruction_report(model)}
    assert "2 times" in report["conv1"].note
    assert not report["conv1"].kept
    assert report["conv2"].kept
    torch.manual_seed(0)
    assert torch.equal(model.conv1.weight, _Twice().conv1.weight)


class _Shared(TinyDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.weight = self.conv1.weight


def test_a_weight_that_two_layers_share_keeps_its_rounding() -> None:
    model = _quantized(_Shared)
    torch.manual_seed(0)
    expected = _Shared().conv1.weight
    assert model.conv1.weight is model.conv2.weight
    assert torch.equal(model.conv1.weight, expected)
    assert not any(block.note for block in tdq.reconstruction_report(model))
