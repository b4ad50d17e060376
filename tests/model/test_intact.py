"""Averages of models: of scales that are kept as the bits of integers there is none, and that is noticed."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import TinyDenoiser, calls, quantized
from support.temporal import make_table
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from training.test_qat import adam, batch, qat, train

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.intact import checksum
from modelopt_tdq.temporal_features.runtime import install_features

AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema": {"avg_fn": get_ema_avg_fn(0.9)},
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


def _scaled(model: nn.Module, factor: float) -> None:
    table = tdq.scale_table(model)
    tdq.set_scale_table(model, dataclasses.replace(table, scale=table.scale * factor))


def _copy_buffers(averaged: AveragedModel, model: nn.Module) -> None:
    """What the error says."""
    for mine, its in zip(averaged.module.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_of_bits_is_refused_by_name_and_the_cure_helps(how: str) -> None:
    model = quantized()
    first = tdq.scale_table(model)
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[how])
    averaged.update_parameters(model)
    assert torch.equal(averaged(*calls()[0]), model(*calls()[0]))
    _scaled(model, 8.0)
    averaged.update_parameters(model)
    uses = (lambda: averaged(*calls()[0]), lambda: tdq.scale_table(averaged.module))
    for use in uses:
        with pytest.raises(TdqError, match=r"conv1\.input_quantizer.*use_buffers=False") as raised:
            use()
    assert "for mine, its in zip(averaged.module.buffers(), model.buffers()): mine.copy_(its)" in str(raised.value)
    copied = copy.deepcopy(averaged)
    _copy_buffers(copied, model)
    assert torch.equal(tdq.scale_table(copied.module).scale, first.scale * 8)
    torch.testing.assert_close(copied(*calls()[0]), model(*calls()[0]), rtol=0.05, atol=0.01)  # its weights are rounded
    # the average that the user may have meant: of s and 8 s
    mean = dataclasses.replace(first, scale=first.scale * 4.5)
    tdq.set_scale_table(averaged.module, mean)
    assert torch.equal(tdq.scale_table(averaged.module).scale, mean.scale)
    assert torch.isfinite(averaged(*calls()[0])).all()


def test_buffers_that_are_copied_are_right() -> None:
    model = quantized()
    averaged = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
        _scaled(model, 2.0)
    averaged.update_parameters(model)
    assert torch.equal(tdq.scale_table(averaged.module).scale, tdq.scale_table(model).scale)


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize("intervals", ["static", "table", "mlp"])
def test_a_model_that_learns_makes_its_table_from_the_averaged_source(intervals: str, how: str) -> None:
    model = qat(intervals=intervals, scheme="lsq", dropout=0.0)
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[how])
    optimizer, starts = adam(model), []
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        model.eval()(*batch(0)[:2])  # makes a table, as a validation does
        model.train()
        averaged.update_parameters(model)
        starts.append(copy.deepcopy(model))
    module: Any = averaged.module.eval()
    if how != "mean":  # which leaves constants alone; the others round them
        for use in (lambda: module(*batch(0)[:2]), lambda: tdq.scale_table(module), module.state_dict):
            with pytest.raises(TdqError, match=r"tdq_intervals.*use_buffers=False"):
                use()
        _copy_buffers(averaged, model)
    table = tdq.scale_table(module)
    plain = AveragedModel(starts[0], **AVERAGES[how])
    for start in starts:
        plain.update_parameters(start)
    expected = tdq.scale_table(plain.module.eval())
    assert torch.equal(table.timesteps, expected.timesteps)
    torch.testing.assert_close(table.scale, expected.scale)
    assert not torch.equal(table.scale, tdq.scale_table(model.eval()).scale)
    assert torch.isfinite(module(*batch(0)[:2])).all()
    # and it is saved with them
    file = io.BytesIO()
    mto.save(module, file)
    file.seek(0)
    restored = mto.restore(TinyDenoiser().eval(), file)
    assert torch.equal(restored(*batch(0)[:2]), module(*batch(0)[:2]))


def test_an_ema_of_parameters_leaves_the_scales_alone() -> None:
    training = pytest.importorskip("diffusers.training_utils")
    model = quantized()
    expected = tdq.scale_table(model).scale
    ema = training.EMAModel(model.parameters(), decay=0.5)
    with torch.no_grad():
        model.mix.weight.mul_(1.01)
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    assert torch.equal(tdq.scale_table(model).scale, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_an_average_of_temporal_features_is_refused(dtype: torch.dtype) -> None:
    from modelopt_tdq.temporal_features.feature import Feature
    from modelopt_tdq.temporal_features.table import FeatureTable

    model = quantized(high_precision=("time_embedding.*",))
    rows = torch.randn(3, 8)
    feature = Feature.quantized(rows, 8) if dtype == torch.int8 else Feature(rows.to(dtype))
    made = make_table({"time_embedding": rows}, [20.0, 300.0, 900.0])
    table = FeatureTable(made.timesteps, {"time_embedding": feature}, "nearest", made.metadata)
    install_features(model, table, {}, "timestep")
    averaged = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(0.9))
    averaged.update_parameters(model)
    assert torch.equal(averaged(*calls()[0]), model(*calls()[0]))
    averaged.update_parameters(model)  # of the same numbers: rounded all the same
    plain = copy.deepcopy(averaged)
    mtq.disable_quantizer(plain.module, "*")
    with pytest.raises(TdqError, match=r"tdq_features.*use_buffers=False"):
        plain(*calls()[0])
    with pytest.raises(TdqError, match=r"tdq_features"):
        tdq.feature_table(averaged.module)
    _copy_buffers(averaged, model)
    torch.testing.assert_close(averaged(*calls()[0]), model(*calls()[0]), rtol=0.05, atol=0.01)


def test_what_moves_scales_without_computing_with_them_is_no_damage() -> None:
    model = quantized()
    expected = [model(*call) for call in calls()]
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for quantizer in tdq.temporal_quantizers(model).values():
            quantizer._scale_bits.add_(1)
    with pytest.raises(TdqError, match="somebody has computed"):
        model(*calls()[0])
    model.load_state_dict(state)  # in place, with the checksum that belongs to it
    for made in (model, copy.deepcopy(model), model.half().float()):
        for call, output in zip(calls(), expected, strict=True):
            torch.testing.assert_close(made(*call), output, rtol=0.05, atol=0.05)
    with torch.inference_mode():
        inside = quantized()
        assert torch.isfinite(inside(*calls()[0])).all()


@given(st.lists(st.floats(2.0**-40, 2.0**40, width=32), min_size=1, max_size=8), st.floats(1.0, 64.0, exclude_min=True))
def test_a_checksum_is_of_the_numbers_and_their_places(scales: list[float], factor: float) -> None:
    bits = torch.tensor(scales).view(torch.int32)
    own = checksum([bits])
    assert own.dtype == torch.int64
    assert 0 <= int(own) < 1 << 24
    assert torch.equal(checksum([bits.clone()]), own)
    other = (torch.tensor(scales) * factor).view(torch.int32)
    if not torch.equal(other, bits):
        assert not torch.equal(checksum([other]), own)
        average = ((bits.long() + other.long()) // 2).to(torch.int32)
        mean_of_checksums = (own + checksum([other])) // 2
        assert torch.equal(average, bits) or not torch.equal(checksum([average]), mean_of_checksums)
    if len(set(scales)) > 1:
        assert not torch.equal(checksum([bits.flip(0)]), own) or scales == scales[::-1]
    assert not torch.equal(checksum([bits, bits]), own)
