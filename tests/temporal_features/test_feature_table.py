"""FeatureTable: the arithmetic of its rows, its policies for other times, what it refuses, and its files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import edit
from torch import Tensor

from modelopt_tdq import ScaleTable, TdqError
from modelopt_tdq.core.fake_quant import dequantize, quantize
from modelopt_tdq.temporal_features.table import SCHEMA_VERSION, Feature, FeatureTable

TIMES = [1.0, 5.0, 9.0]


def _values(rows: int = 3, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *(shape or (6,)), generator=torch.Generator().manual_seed(seed))


def _table(outside: Any = "nearest", **changes: Any) -> FeatureTable:
    features = {"b.head": Feature.quantized(_values(), 8), "a.head": Feature(_values(3, 2, 4, seed=1).half())}
    return FeatureTable(**{"timesteps": TIMES, "features": features, "outside": outside, **changes})


_rows = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, allow_subnormal=False, width=32), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
)


@given(_rows, st.integers(2, 8))
def test_codes_are_those_of_the_definition_and_the_zero_point_is_whole(rows: list[list[float]], bits: int) -> None:
    values = torch.tensor(rows)
    feature = Feature.quantized(values, bits)
    codes, scale, offset = (feature.arrays()[name] for name in ("codes", "scale", "offset"))
    scale, offset = scale[:, None], offset[:, None]
    assert torch.equal(codes.float(), quantize(values, scale, offset, bits))
    assert torch.equal(feature.dense(), dequantize(codes.float(), scale, offset))
    zero = torch.round(-offset.double() / scale.double()).float()
    assert torch.equal(-zero * scale, offset)


@given(_rows, st.integers(2, 8))
def test_no_row_is_worse_than_with_all_of_its_range(rows: list[list[float]], bits: int) -> None:
    exact = np.array(rows, dtype=np.float32).astype(np.float64)
    dense = Feature.quantized(torch.tensor(rows), bits).dense().double().numpy()
    low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    # half a step of rounding, and as much again since the zero point is whole; float32 around it
    bound = 3 * np.square(step + 1e-6 * np.abs(exact).max(1, keepdims=True) + 1e-37).squeeze(1)
    assert (np.square(dense - exact).sum(1) <= bound).all()


def test_clipping_pays_where_one_value_is_far_off_and_hurts_no_row() -> None:
    values = torch.cat([_values(1, 4000), _values(1, 4000)])
    values[1, 0] = 30.0
    exact = values.double()
    for bits in (3, 4):
        low, high = exact.amin(1), exact.amax(1)
        scale = ((high - low) / (2**bits - 1)).float()
        offset = -torch.round(-(2 ** (bits - 1)) - low / scale).float() * scale
        plain = dequantize(quantize(values, scale[:, None], offset[:, None], bits), scale[:, None], offset[:, None])
        error = (plain.double() - exact).square().sum(1)
        found = (Feature.quantized(values, bits).dense().double() - exact).square().sum(1)
        assert (found <= error * (1 + 1e-9)).all()
        assert found[1] < 0.7 * error[1]


@pytest.mark.parametrize("value", [0.0, 3.7, -1e-20, 2e38])
def test_rows_of_equal_values_are_exact(value: float) -> None:
    values = torch.full((2, 5), value)
    for bits in (2, 8):
        assert torch.equal(Feature.quantized(values, bits).dense(), values)


def _by_definition(table: FeatureTable, name: str, time: float) -> np.ndarray[Any, Any]:
    rows, times = table.features[name].dense().numpy(), table.timesteps.numpy().astype(np.float64)
    if table.outside != "linear":
        return rows[int(np.argmin(np.abs(times - np.float32(time))))]  # the first of two equally near ones
    shares = [np.interp(np.float32(time), times, np.eye(len(times))[k]) for k in range(len(times))]
    return np.tensordot(np.array(shares), rows.astype(np.float64), 1)


@given(
    st.lists(st.floats(-10, 1024, allow_subnormal=False, width=32), min_size=1, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-20, 1100, allow_subnormal=False, width=32), min_size=1, max_size=6),
    st.sampled_from(["nearest", "linear"]),
)
def test_lookup_follows_its_definition(rows: list[float], times: list[float], outside: Any) -> None:
    features = {"coded": Feature.quantized(_values(len(rows), 3), 8), "plain": Feature(_values(len(rows), 2, 2))}
    table = FeatureTable(rows, features, outside)
    for name, feature in features.items():
        found = table.lookup(name, torch.tensor(times))
        assert found.dtype == torch.float32
        assert found.shape == (len(times), *feature.row_shape)
        expected = np.stack([_by_definition(table, name, time) for time in times])
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 if outside == "linear" else 0)
        assert torch.equal(table.lookup(name, table.timesteps), feature.dense())
    assert table.contains(torch.tensor(times)).tolist() == [np.float32(t) in np.float32(rows) for t in times]


def test_a_time_of_any_dtype() -> None:
    table = _table("linear")
    for time in (torch.tensor(5), torch.tensor([5], dtype=torch.int32), torch.tensor(5.0, dtype=torch.float64)):
        assert torch.equal(table.lookup("a.head", time)[0], table.features["a.head"].dense()[1])
        assert table.contains(time).tolist() == [True]


def test_exact_answers_for_rows_only() -> None:
    table = _table("exact")
    assert torch.equal(table.lookup("b.head", torch.tensor([9.0])), table.features["b.head"].dense()[2:])
    with pytest.raises(TdqError, match="no rows"):
        table.lookup("b.head", torch.tensor([9.0, 4.0]))


def test_bytes() -> None:
    coded, half, full = Feature.quantized(_values(3, 7), 4), Feature(_values(3, 7).half()), Feature(_values(3, 7))
    assert (coded.nbytes, half.nbytes, full.nbytes) == (3 * 7 + 3 * 8, 3 * 7 * 2, 3 * 7 * 4)
    assert (coded.packed_nbytes, half.packed_nbytes) == (3 * 4 + 3 * 8, half.nbytes)
    table = FeatureTable(TIMES, {"a": coded, "b": half})
    assert table.nbytes == 12 + coded.nbytes + half.nbytes
    assert table.packed_nbytes == table.nbytes - 21 + 12


def test_a_copy_of_ones_own_and_half_precision_stays() -> None:
    values = _values().double()
    feature = Feature(values)
    values.zero_()
    assert feature.arrays()["values"].dtype == torch.float32
    assert bool(feature.dense().any())
    assert Feature(_values().half()).arrays()["values"].dtype == torch.float16
    assert copy.deepcopy(_table()).features.keys() == _table().features.keys()


def _codes(**changes: Any) -> Any:
    fields = {"codes": torch.zeros(3, 2), "scale": torch.ones(3), "offset": None, "num_bits": 8}
    return lambda: Feature(**{**fields, **changes})


_BAD: dict[str, tuple[str, Any]] = {
    "neither values nor codes": ("values", Feature),
    "both": ("values", lambda: Feature(_values(), torch.zeros(3, 6), torch.ones(3), None, 8)),
    "values with a scale": ("scale", lambda: Feature(_values(), scale=torch.ones(3))),
    "no rows": ("values", lambda: Feature(torch.ones(0, 2))),
    "no row dimension": ("values", lambda: Feature(torch.tensor(1.0))),
    "no numbers": ("values", lambda: Feature([["x"]])),
    "codes without bits": ("num_bits", _codes(num_bits=None)),
    "bits of a float format": ("num_bits", _codes(num_bits=(4, 3))),
    "nine bits": ("num_bits", lambda: Feature.quantized(_values(), 9)),
    "codes outside their range": ("codes", _codes(codes=torch.full((3, 2), 8), num_bits=4)),
    "codes that int8 cannot hold": ("codes", _codes(codes=torch.full((3, 2), 128))),
    "codes that are fractions": ("codes", _codes(codes=torch.full((3, 2), 0.5))),
    "no scale": ("scale", _codes(scale=None)),
    "scale of another length": ("scale", _codes(scale=torch.ones(2))),
    "scale of zero": ("scale", _codes(scale=torch.zeros(3))),
    "offset per value": ("offset", _codes(offset=torch.ones(3, 2))),
    "quantizing NaN": ("values", lambda: Feature.quantized(torch.tensor([[1.0], [torch.nan]]), 8)),
    "quantizing nothing": ("values", lambda: Feature.quantized(torch.ones(2, 0), 8)),
    "unsorted times": ("timesteps", lambda: _table(timesteps=[1.0, 9.0, 5.0])),
    "a time twice": ("timesteps", lambda: _table(timesteps=[1.0, 5.0, 5.0])),
    "times of two dimensions": ("timesteps", lambda: _table(timesteps=[TIMES])),
    "infinite time": ("timesteps", lambda: _table(timesteps=[1.0, 5.0, torch.inf])),
    "another number of times": ("features", lambda: _table(timesteps=[1.0, 5.0])),
    "another policy": ("outside", lambda: _table("cubic")),
    "no features": ("features", lambda: _table(features={})),
    "a tensor as feature": ("features", lambda: _table(features={"a": _values()})),
    "another name": ("name", lambda: _table().lookup("c.head", torch.tensor([1.0]))),
}


@pytest.mark.parametrize("case", _BAD)
def test_what_cannot_be_used_is_refused_with_the_name_of_the_field(case: str) -> None:
    field, make = _BAD[case]
    with pytest.raises(TdqError) as error:
        make()
    assert error.value.field == field
    assert error.value.cure


def test_nan_names_the_feature_and_the_time() -> None:
    bad = _values()
    bad[1, 3] = torch.nan
    with pytest.raises(TdqError, match=r"'b\.head'.*at time 5"):
        _table(features={"a.head": Feature(_values()), "b.head": Feature(bad)})
    scale = torch.tensor([1.0, 1.0, torch.nan])
    with pytest.raises(TdqError, match=r"'c'.*at time 9"):
        _table(features={"c": Feature(None, torch.zeros(3, 2), scale, None, 8)})


@pytest.mark.parametrize("outside", ["nearest", "linear", "exact"])
def test_round_trip(tmp_path: Path, outside: Any) -> None:
    table = _table(outside, metadata={"checksum": "abc", "strategy": {"a.head": "cache"}})
    written = table.save(tmp_path / "new folder" / "features.safetensors")
    loaded = FeatureTable.load(written)
    assert list(loaded.features) == ["b.head", "a.head"]
    assert (loaded.outside, dict(loaded.metadata)) == (outside, dict(table.metadata))
    assert torch.equal(loaded.timesteps, table.timesteps)
    for name, feature in table.features.items():
        arrays = loaded.features[name].arrays()
        assert loaded.features[name].num_bits == feature.num_bits
        assert arrays.keys() == feature.arrays().keys()
        assert all(torch.equal(arrays[k], v) and arrays[k].dtype == v.dtype for k, v in feature.arrays().items())
    assert len(list(written.parent.iterdir())) == 1


_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "missing": ("path", lambda a: a.unlink()),
    "truncated": ("path", lambda a: a.write_bytes(a.read_bytes()[:-3])),
    "description garbage": ("path", lambda a: edit(a, text="garbage")),
    "newer schema": ("schema_version", lambda a: edit(a, schema_version=SCHEMA_VERSION + 1)),
    "features are a number": ("path", lambda a: edit(a, features=3)),
    "features without names": ("path", lambda a: edit(a, features=[{"num_bits": 8}])),
    "a feature too many": ("scale", lambda a: edit(a, features=[{"name": str(i), "num_bits": 8} for i in "abc"])),
    "no policy": ("outside", lambda a: edit(a, outside=None)),
    "bits of another format": ("codes", lambda a: edit(a, features=[{"name": "a", "num_bits": 2}])),
}


@pytest.mark.parametrize("case", _DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, case: str) -> None:
    field, damage = _DAMAGE[case]
    arrays = _table().save(tmp_path / "features")
    damage(arrays)
    with pytest.raises(TdqError) as error:
        FeatureTable.load(arrays)
    assert error.value.field == field


def test_tables_of_one_kind_are_not_taken_for_the_other(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="describes a FeatureTable"):
        ScaleTable.load(_table().save(tmp_path / "features"))
    with pytest.raises(TdqError, match="describes a ScaleTable"):
        FeatureTable.load(ScaleTable(TIMES, torch.ones(3, 1), ["a"]).save(tmp_path / "scales"))


def test_metadata_that_is_no_json_leaves_the_old_files(tmp_path: Path) -> None:
    path = _table().save(tmp_path / "features")
    before = path.read_bytes()
    with pytest.raises(TdqError, match="JSON"):
        _table("linear", metadata={"model": object()}).save(path)
    assert path.read_bytes() == before
