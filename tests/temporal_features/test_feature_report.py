"""The report on temporal features says what the table holds, and a cache's memory is known before it is built."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SMALL_UNET, TinyDenoiser, calls, fast_config, loop

import modelopt_tdq as tdq
from modelopt_tdq.temporal_features.report import COLUMNS, cache_memory, error_db, memory_text, temporal_report

diffusers = pytest.importorskip("diffusers")

FAMILY = SMALL_UNET
TIMES = [900.0, 700.0, 600.0, 300.0, 20.0]


@pytest.fixture(scope="module")
def calibrated() -> torch.nn.Module:
    torch.manual_seed(0)
    return mtq.quantize(FAMILY.make().eval(), fast_config(weight_bits=4, activation_bits=4), FAMILY.forward_loop())


def maintained(calibrated: torch.nn.Module, **fields: Any) -> torch.nn.Module:
    algorithm = {"recalibrate": False, "weights": "max", "iterations": 20, "progress": False, "times": TIMES, **fields}
    return mtq.calibrate(copy.deepcopy(calibrated), {"method": "tdq_temporal", **algorithm}, FAMILY.forward_loop())


def test_rows_are_what_the_table_says(calibrated: torch.nn.Module) -> None:
    model = maintained(calibrated, granularity="step")
    table, report = tdq.feature_table(model), tdq.temporal_report(model)
    assert [row.layer for row in report.features] == list(table.features)
    for row in report.features:
        assert row.channels == table.features[row.layer].row_shape[0]
        assert sum(row.rows.values()) == len(table) == report.rows == len(TIMES)
        errors = table.metadata["relative_squared_error"]
        for what in ("naive", "tib", "cache", "chosen"):
            values = errors[what][row.layer]
            assert row.mean_db[what] == pytest.approx(10 * math.log10(sum(values) / len(values)))
            assert row.worst_db[what] == pytest.approx(10 * math.log10(max(values)))
            assert row.cosine[what] == min(table.metadata["cosine_similarity"][what][row.layer])
        assert row.mean_db["chosen"] <= min(row.mean_db["tib"], row.mean_db["cache"])
    assert (report.nbytes, report.packed_nbytes, report.outside) == (table.nbytes, table.packed_nbytes, "linear")


def test_what_is_replaced_is_counted(calibrated: torch.nn.Module) -> None:
    model = maintained(calibrated, maintenance="cache")
    report = tdq.temporal_report(model)
    names = [*(row.layer for row in report.features), "time_embedding.linear_1", "time_embedding.linear_2"]
    layers: list[Any] = [model.get_submodule(name) for name in names]
    assert report.parameters == sum(p.numel() for layer in layers for p in layer.parameters())
    assert report.multiply_adds == sum(layer.weight.numel() for layer in layers)
    tdq.free_modules(model)
    assert tdq.temporal_report(model) == report


def test_text(calibrated: torch.nn.Module) -> None:
    text = str(temporal_report(maintained(calibrated, granularity="step", choose={"mid_block.*": "cache"})))
    rows = text.split("\n\n", maxsplit=1)[0].splitlines()
    names = [name for name in rows if "time_emb_proj" in name]
    assert len(names) == len(rows) - 3
    assert "TIB feature is deployed as the table of its outputs" in text
    assert "interpolated" in text
    assert "packed" in text  # 4-bit codes take a byte each
    assert " tib " in text or "tib " in text
    cached = str(temporal_report(maintained(calibrated, maintenance="cache", outside="exact")))
    assert "Where a time is a row" in cached
    assert "TIB feature" not in cached
    (row, *_) = temporal_report(maintained(calibrated, maintenance="cache", outside="exact")).features
    assert len(row.cells()) == len(COLUMNS)
    assert row.cells()[4] == "-"  # TIB was not tried


def test_a_feature_decided_row_by_row_says_so(calibrated: torch.nn.Module) -> None:
    model = maintained(calibrated, maintenance="cache")
    strategies = model.tdq_features.description["metadata"]["strategy"]  # type: ignore[union-attr,index]
    first = next(iter(strategies))
    strategies[first] = ["tib", "cache", "cache", "tib", "tib"]
    assert temporal_report(model).features[0].chosen == "tib 3 / cache 2"


def test_models_without_features_are_refused(calibrated: torch.nn.Module) -> None:
    with pytest.raises(tdq.TdqError, match="no temporal features"):
        temporal_report(calibrated)
    with pytest.raises(tdq.TdqError, match="no temporal features"):
        temporal_report(maintained(calibrated, maintenance="naive"))
    model = maintained(calibrated, maintenance="cache")
    del model.tdq_features.description["metadata"]["strategy"]  # type: ignore[union-attr,attr-defined]
    with pytest.raises(tdq.TdqError, match="strategy"):
        temporal_report(model)


@pytest.mark.parametrize("bits", [2, 4, 5, 8, 16, 32])
def test_memory_is_that_of_the_table(calibrated: torch.nn.Module, bits: int) -> None:
    model = mtq.quantize(TinyDenoiser(7).eval(), fast_config(), loop(calls()))
    block = tdq.find_temporal_block(model, {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.zeros(1)})
    fields = {"method": "tdq_temporal", "maintenance": "cache", "cache_bits": bits, "weights": "max", "progress": False}
    cached = mtq.calibrate(model, {**fields, "recalibrate": False}, loop(calls()))
    table = tdq.feature_table(cached)
    assert cache_memory(block, len(table), bits) == table.packed_nbytes - table.timesteps.nbytes


def test_memory_of_stable_diffusion(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        arguments = {
            "sample": torch.zeros(2, 4, 64, 64),
            "timestep": torch.zeros(()),
            "encoder_hidden_states": torch.zeros(2, 77, 768),
        }
    block = tdq.find_temporal_block(model, arguments, times=50)
    assert len(block.features) == 22
    assert sum(shape[0] for shape in block.features.values()) == 20_160
    assert block.parameters == 27_875_520  # "about 27.9 M" in the paper
    with caplog.at_level(logging.INFO, "modelopt_tdq"):
        assert cache_memory(block, 50, 8) == pytest.approx(1.0e6, rel=0.05)
    assert "22 temporal features, 20160 channels, 50 rows, 8 bits: 1.0 MB" in caplog.text
    assert cache_memory(block, 50, 16) == pytest.approx(2.0e6, rel=0.05)
    for rows, bits in ((0, 8), (50, 9), (50, 1)):
        with pytest.raises(tdq.TdqError):
            cache_memory(block, rows, bits)


def test_small_texts() -> None:
    assert [memory_text(size) for size in (640, 3_140, 1_010_000)] == ["640 B", "3.1 kB", "1.0 MB"]
    assert error_db(0.001) == pytest.approx(-30.0)
    assert error_db(0.0) == -math.inf
