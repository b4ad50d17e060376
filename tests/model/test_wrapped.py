"""Wrappers around a model: torch.compile, in its two forms, and data parallelism."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support.models import SMALL_UNET, TIMES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.testing import CompileCounterWithBackend

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.training.learned import learned_intervals

_Wrap = Callable[[nn.Module], nn.Module]

#: What ModelOpt itself takes off.
ONE: dict[str, _Wrap] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
}

WRAPPERS: dict[str, _Wrap] = {**ONE, "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager"))}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return TinyDenoiser().eval()


@torch.no_grad()
def _outputs(model: nn.Module) -> list[Tensor]:
    return [model(noise(2, 3, 8, 8, seed=5), torch.tensor(time)) for time in TIMES[:2]]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wrap", ONE.values(), ids=ONE)
def test_what_is_inside_is_quantized(wrap: _Wrap) -> None:
    plain, wrapped = quantized(), wrap(_tiny())
    model = quantized(wrapped)
    assert type(model) is TinyDenoiser
    assert model is unwrapped(wrapped)
    table, expected = tdq.scale_table(wrapped), tdq.scale_table(plain)
    assert table.names == expected.names == tuple(tdq.temporal_quantizers(model))
    assert torch.equal(table.scale, expected.scale)
    assert _same(_outputs(model), _outputs(plain))


def test_a_compiled_model_that_ran_before_runs_quantized_afterwards() -> None:
    compiled = torch.compile(_tiny(), backend="eager", fullgraph=True)
    before, plain = _outputs(compiled), quantized()
    mtq.fold_weight(quantized(compiled))  # ModelOpt's weight quantizers break the graph, which takes a long time
    assert _same(_outputs(compiled), _outputs(plain))
    assert not _same(before, _outputs(plain))


def test_calibration_does_not_compile_what_it_runs() -> None:
    counter = CompileCounterWithBackend("eager")
    model = _tiny()
    model.compile(backend=counter)
    quantized(model, statistic="output", weights="mse", protect_steps=True)
    assert counter.frame_count == 0
    plain = quantized(statistic="output", weights="mse", protect_steps=True)
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(plain).scale)
    mtq.fold_weight(model)
    assert _same(_outputs(model), _outputs(plain))
    assert counter.frame_count > 0


@pytest.mark.parametrize("method", ["tdq_qat", "tdq_reconstruct"])
def test_nor_do_the_other_algorithms(method: str) -> None:
    config = fast_config(method=method, **({"iterations": 2, "samples": 16} if method == "tdq_reconstruct" else {}))
    counter = CompileCounterWithBackend("eager")
    plain = mtq.quantize(_tiny(), config, loop(calls()))
    model = _tiny()
    model.compile(backend=counter)
    mtq.quantize(model, config, loop(calls()))
    assert counter.frame_count == 0
    assert torch.equal(tdq.scale_table(model).scale, tdq.scale_table(plain).scale)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_tables_go_in_and_out_of_a_wrapped_model(wrap: _Wrap) -> None:
    model = quantized()
    wrapped, table = wrap(model), tdq.scale_table(model)
    assert list(tdq.temporal_quantizers(wrapped)) == list(tdq.temporal_quantizers(model))
    tdq.set_scale_table(wrapped, tdq.ScaleTable(table.timesteps, 2 * table.scale, table.names))
    assert torch.equal(tdq.scale_table(model).scale, 2 * table.scale)
    assert torch.equal(tdq.scale_table(wrapped).scale, 2 * table.scale)


@pytest.mark.parametrize("wrap", ONE.values(), ids=ONE)
def test_a_wrapped_model_is_calibrated_again_and_saved(wrap: _Wrap, tmp_path: Path) -> None:
    model = quantized()
    wrapped, table = wrap(copy.deepcopy(model)), tdq.scale_table(model)
    mtq.calibrate(wrapped, fast_config()["algorithm"], lambda inside: loop(calls())(unwrapped(inside)))
    assert torch.equal(tdq.scale_table(wrapped).scale, table.scale)
    mto.save(wrapped, tmp_path / "m.pt")
    restored = mto.restore(TinyDenoiser().eval(), tmp_path / "m.pt")
    assert torch.equal(tdq.scale_table(restored).scale, table.scale)


def test_a_wrapped_model_is_exported(tmp_path: Path) -> None:
    model = quantized()
    wrapped = WRAPPERS["both"](model)
    sample = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(20.0)}
    report = tdq.export_onnx(wrapped, tmp_path / "m.onnx", sample)
    assert [name for name in report.quantized if name in tdq.scale_table(model).names] == list(
        tdq.scale_table(model).names
    )
    found = tdq.OnnxRuntimeSession(report.path)({name: value.numpy() for name, value in sample.items()})["output"]
    with torch.no_grad():
        assert np.abs(found - model(**sample).numpy()).max() < 1e-4


def test_a_wrapped_model_learns() -> None:
    model = mtq.quantize(_tiny(), fast_config(method="tdq_qat"), loop(calls()))
    wrapped = nn.DataParallel(model).train()
    groups = tdq.parameter_groups(wrapped, lr=0.01)
    assert [g["name"] for g in groups] == [g["name"] for g in tdq.parameter_groups(model, lr=0.01)]
    loss = wrapped(noise(2, 3, 8, 8), torch.tensor(20.0)).square().mean()
    tdq.require_finite(loss, wrapped, noise(2, 3, 8, 8), torch.tensor(20.0))
    assert float(tdq.interval_penalty(wrapped)) == float(tdq.interval_penalty(model))
    assert callable(tdq.checkpoint(wrapped))
    loss.backward()
    torch.optim.SGD(groups).step()
    before = tdq.scale_table(quantized()).scale
    tdq.materialize(wrapped)
    assert not torch.equal(tdq.scale_table(wrapped).scale, before)
    assert learned_intervals(wrapped) is learned_intervals(model)


def test_temporal_features_of_a_wrapped_model() -> None:
    family = SMALL_UNET
    config = fast_config(method="tdq_temporal", maintenance="cache", keep_layers=True)
    model = mtq.quantize(family.make().eval(), config, family.forward_loop())
    wrapped = torch.compile(model, backend="eager")
    table = tdq.feature_table(wrapped)
    assert list(table.features) == list(tdq.feature_table(model).features)
    tdq.remove_features(wrapped)
    tdq.set_feature_table(wrapped, table)
    assert tdq.temporal_report(wrapped).rows == tdq.temporal_report(model).rows
    assert tdq.free_modules(wrapped) > 0
    found = tdq.find_temporal_block(torch.compile(family.make().eval(), backend="eager"), family.data()[0])
    assert found.layers


def test_an_analysis_of_a_wrapped_model() -> None:
    found = tdq.analyze(nn.DataParallel(_tiny()), loop(calls()), probes=0, progress=False)
    assert found.temporal_db == tdq.analyze(_tiny(), loop(calls()), probes=0, progress=False).temporal_db


def test_a_part_that_torch_compile_wrapped_is_refused_by_name() -> None:
    model = _tiny()
    model.conv1 = torch.compile(nn.Sequential(model.conv1), backend="eager")  # type: ignore[assignment]
    with pytest.raises(TdqError, match=r"'conv1'.*torch\.compile returned.*model\.conv1\.compile\(\)"):
        quantized(model)
    in_place = _tiny()
    in_place.conv1.compile(backend="eager")
    assert torch.equal(tdq.scale_table(quantized(in_place)).scale, tdq.scale_table(quantized()).scale)


def test_what_has_no_wrapper_stays() -> None:
    model = _tiny()
    assert unwrapped(model) is model
    assert unwrapped("text") == "text"
    assert isinstance(torch.compile(model, backend="eager"), OptimizedModule)


def test_the_time_by_position_reaches_a_compiled_model() -> None:
    def forward_loop(model: Any) -> None:
        for sample, time in calls():
            compiled(sample, time)

    compiled = torch.compile(_tiny(), backend="eager")
    mtq.quantize(compiled, fast_config(), forward_loop)
    assert torch.equal(tdq.scale_table(compiled).scale, tdq.scale_table(quantized()).scale)
