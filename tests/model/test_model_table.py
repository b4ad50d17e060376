"""The table of a model: read, changed, put back; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import oracle
from support.models import TIMES, TinyDenoiser, at, noise, quantized
from support.tables import with_dequantization
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import ScaleTable, TdqError


@pytest.fixture
def model() -> nn.Module:
    return quantized(asymmetric=True)


def test_has_a_row_per_time_and_a_column_per_quantizer(model: nn.Module) -> None:
    table = tdq.scale_table(model)
    assert table.timesteps.tolist() == sorted(TIMES)
    assert table.names == ("conv1.input_quantizer", "mix.input_quantizer", "conv2.input_quantizer")
    assert table.metadata["num_bits"] == dict.fromkeys(table.names, 8)
    assert table.offset is not None


def test_through_a_file_into_another_copy(model: nn.Module, tmp_path: Path) -> None:
    table = tdq.scale_table(model)
    other = quantized(bins=1)
    expected = model(noise(2, 3, 8, 8), 300)
    assert not torch.equal(other(noise(2, 3, 8, 8), 300), expected)
    tdq.set_scale_table(other, ScaleTable.load(table.save(tmp_path / "table")))
    assert torch.equal(other(noise(2, 3, 8, 8), 300), expected)


def test_a_resampled_table_serves_its_times_as_before(model: nn.Module) -> None:
    table = tdq.scale_table(model)
    times = [0.0, 111.0, 450.0, 451.0, 999.0]
    expected = [model(noise(1, 3, 8, 8), time) for time in times]
    tdq.set_scale_table(model, table.resample(times))
    assert all(torch.equal(model(noise(1, 3, 8, 8), t), e) for t, e in zip(times, expected, strict=True))


def test_columns_in_another_order_find_their_quantizers(model: nn.Module) -> None:
    table = tdq.scale_table(model)
    assert table.offset is not None
    expected = model(noise(1, 3, 8, 8), 20)
    order = [2, 0, 1]
    tdq.set_scale_table(
        model,
        ScaleTable(table.timesteps, table.scale[:, order], [table.names[i] for i in order], table.offset[:, order]),
    )
    assert torch.equal(model(noise(1, 3, 8, 8), 20), expected)


def test_codes_are_turned_back_by_the_scales_of_the_table(model: nn.Module) -> None:
    table = with_dequantization(tdq.scale_table(model))
    tdq.set_scale_table(model, table)
    found = tdq.scale_table(model)
    for field in ("timesteps", "scale", "offset", "dequant_scale", "dequant_offset"):
        assert torch.equal(getattr(found, field), getattr(table, field)), field
    times = table.timesteps[[2, 0]]
    x = noise(2, 8, 8, 8)
    assert table.offset is not None
    assert table.dequant_scale is not None
    assert table.dequant_offset is not None
    for column, (name, quantizer) in enumerate(tdq.temporal_quantizers(model).items()):
        assert ("_dequant_scale_bits" in quantizer._buffers) == (column > 0)
        assert ("_dequant_offset_bits" in quantizer._buffers) == (column == 2)
        with at(model, times):
            values = quantizer(x)
        for sample, row in enumerate((2, 0)):
            codes = oracle.codes(x[sample].numpy(), table.scale[row, column], table.offset[row, column], 8)
            expected = oracle.values(codes, table.dequant_scale[row, column], table.dequant_offset[row, column])
            assert (values[sample].numpy() == expected).all(), name


def test_columns_that_are_plain_stay_plain(model: nn.Module) -> None:
    table = tdq.scale_table(model)
    before, expected = dict(model.state_dict()), model(noise(1, 3, 8, 8), 20)
    same = ScaleTable(table.timesteps, table.scale, table.names, table.offset, table.scale, {}, table.offset)
    tdq.set_scale_table(model, same)
    assert list(model.state_dict()) == list(before)
    assert tdq.scale_table(model).dequant_scale is None
    assert torch.equal(model(noise(1, 3, 8, 8), 20), expected)
    tdq.set_scale_table(model, with_dequantization(table))
    tdq.set_scale_table(model, table)
    assert list(model.state_dict()) == list(before)


def test_reading_is_a_copy(model: nn.Module) -> None:
    before = model(noise(1, 3, 8, 8), 20)
    tdq.scale_table(model).scale.fill_(100.0)
    assert torch.equal(model(noise(1, 3, 8, 8), 20), before)


def _refused(model: nn.Module, table: ScaleTable, field: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TdqError) as error:
        tdq.set_scale_table(model, table)
    assert error.value.field == field
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_table_that_does_not_fit_is_refused_and_nothing_changed(model: nn.Module) -> None:
    table = tdq.scale_table(model)
    one = table.scale[:, :1]
    _refused(model, ScaleTable(table.timesteps, table.scale, ("a", "b", "c")), "names")
    _refused(model, ScaleTable(table.timesteps, one, table.names[:1]), "names")
    more = torch.cat([table.scale, one], 1) * 2
    _refused(model, ScaleTable(table.timesteps, more, (*table.names, "d")), "names")
    four = {**table.metadata, "num_bits": dict.fromkeys(table.names, 4)}
    _refused(model, ScaleTable(table.timesteps, table.scale, table.names, metadata=four), "num_bits")


def test_formats_survive_json(tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from support.models import calls, loop

    config = tdq.make_config((4, 3), (4, 3), statistic="max", protect_steps=False, progress=False)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(calls()))
    tdq.set_scale_table(model, ScaleTable.load(tdq.scale_table(model).save(tmp_path / "fp8")))


def test_a_model_without_temporal_quantizers() -> None:
    with pytest.raises(TdqError, match=r"mtq\.quantize"):
        tdq.scale_table(TinyDenoiser())


def test_quantizers_with_other_rows_are_not_read_as_one_table(model: nn.Module) -> None:
    quantizer = tdq.temporal_quantizers(model)["conv2.input_quantizer"]
    quantizer.set_rows(quantizer._timesteps + 1, quantizer._scale)
    with pytest.raises(TdqError, match="rows"):
        tdq.scale_table(model)
