"""ScaleTable: what it refuses, and that nothing is lost on the way to a file and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import as_pair, edit, read
from torch import Tensor

import modelopt_tdq as tdq
from modelopt_tdq import ScaleTable, TdqError
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.core.table import SCHEMA_VERSION


def _table(**changes: Any) -> ScaleTable:
    fields: dict[str, Any] = {
        "timesteps": torch.tensor([1.0, 5.0, 9.0]),
        "scale": torch.tensor([[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]]),
        "names": ["a.input_quantizer", "b.input_quantizer"],
    }
    return ScaleTable(**{**fields, **changes})


_BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "scale of another shape": ("scale", {"scale": torch.ones(2, 2)}),
    "scale without a row dimension": ("scale", {"scale": torch.ones(3)}),
    "offset of another shape": ("offset", {"offset": torch.ones(3, 1)}),
    "dequant_scale of another shape": ("dequant_scale", {"dequant_scale": torch.ones(3, 3)}),
    "times with two dimensions": ("timesteps", {"timesteps": torch.ones(3, 1)}),
    "no times": ("timesteps", {"timesteps": torch.ones(0), "scale": torch.ones(0, 2)}),
    "NaN scale": ("scale", {"scale": torch.full((3, 2), torch.nan)}),
    "infinite scale": ("scale", {"scale": torch.full((3, 2), torch.inf)}),
    "NaN offset": ("offset", {"offset": torch.full((3, 2), torch.nan)}),
    "infinite time": ("timesteps", {"timesteps": torch.tensor([1.0, 2.0, torch.inf])}),
    "zero scale": ("scale", {"scale": torch.zeros(3, 2)}),
    "negative scale": ("scale", {"scale": -torch.ones(3, 2)}),
    "dequant_offset of another shape": (
        "dequant_offset",
        {"dequant_scale": torch.ones(3, 2), "dequant_offset": torch.ones(3, 1)},
    ),
    "infinite dequant_offset": (
        "dequant_offset",
        {"dequant_scale": torch.ones(3, 2), "dequant_offset": torch.full((3, 2), torch.inf)},
    ),
    "dequant_offset without dequant_scale": ("dequant_offset", {"dequant_offset": torch.ones(3, 2)}),
    "negative dequant_scale": ("dequant_scale", {"dequant_scale": -torch.ones(3, 2)}),
    "unsorted times": ("timesteps", {"timesteps": torch.tensor([1.0, 9.0, 5.0])}),
    "a time twice": ("timesteps", {"timesteps": torch.tensor([1.0, 5.0, 5.0])}),
    "times equal in float32": ("timesteps", {"timesteps": torch.tensor([1, 5, 5 + 1e-9], dtype=torch.float64)}),
    "a name twice": ("names", {"names": ["a", "a"]}),
    "a name that is no string": ("names", {"names": ["a", 1]}),
    "no numbers": ("scale", {"scale": [["x", "y"]] * 3}),
    "a ragged list": ("scale", {"scale": [[1.0, 2.0], [1.0], [1.0, 2.0]]}),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_bad_table_is_refused_with_the_name_of_the_field(case: str) -> None:
    field, changes = _BAD[case]
    with pytest.raises(TdqError) as error:
        _table(**changes)
    assert error.value.field == field
    assert error.value.cure


def test_takes_arrays_of_any_kind_and_keeps_its_own_copy() -> None:
    scale = torch.ones(3, 2)
    table = _table(timesteps=[1, 5, 9], scale=scale, offset=scale.double())
    scale.zero_()
    assert table.offset is not None
    assert table.offset.dtype == torch.float32
    assert table.scale.dtype == torch.float32
    assert bool((table.scale == 1).all())
    assert len(table) == 3


def test_is_static_looks_at_everything_that_may_change() -> None:
    assert _table().is_static.tolist() == [False, True]
    moving = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    assert _table(offset=moving).is_static.tolist() == [False, False]
    assert _table(dequant_scale=1 + moving).is_static.tolist() == [False, False]
    assert _table(dequant_scale=torch.ones(3, 2), dequant_offset=moving).is_static.tolist() == [False, False]


def test_a_column_leaves_out_what_the_plain_form_has_anyway() -> None:
    scale, offset = torch.rand(3, 4) + 1, torch.tensor([[0.0, 1.0, 1.0, 0.0]]).expand(3, 4)
    factor = torch.tensor([1.0, 1.0, 1.0, 2.0])
    names = ("plain", "shifted", "shifted, value of code 0 is 0", "rescaled")
    dequant_offset = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(3, 4)
    table = ScaleTable([1.0, 2.0, 3.0], scale, names, offset, scale * factor, {}, dequant_offset)
    there = [[value is not None for value in table.column(i)] for i in range(4)]
    assert there == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, False, True, False],
    ]
    assert [table.column(i).value_offset is not None for i in range(4)] == [False, True, False, False]
    for i in range(4):
        assert torch.equal(table.column(i).value_scale, table.scale[:, i] * factor[i])


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right is None or (left is not None and right is not None and torch.equal(left, right))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["scales", "scales.safetensors", "scales.json", "unet.v2"])
def test_round_trip(tmp_path: Path, name: str, full: bool) -> None:
    extra = (
        {
            "offset": torch.randn(3, 2),
            "dequant_scale": torch.rand(3, 2) + 1,
            "dequant_offset": torch.randn(3, 2),
            "metadata": {"steps": 3},
        }
        if full
        else {}
    )
    table = _table(**extra)
    written = table.save(tmp_path / "new folder" / name)
    assert written.suffix == ".safetensors"
    loaded = ScaleTable.load(tmp_path / "new folder" / name)
    for field in ("timesteps", "scale", "offset", "dequant_scale", "dequant_offset"):
        assert _same(getattr(loaded, field), getattr(table, field)), field
    assert (loaded.names, dict(loaded.metadata)) == (table.names, dict(table.metadata))
    assert len(list(written.parent.iterdir())) == 1


def test_only_a_file_with_the_new_array_needs_the_new_schema(tmp_path: Path) -> None:
    def version(**arrays: Tensor) -> int:
        return int(read(_table(**arrays).save(tmp_path / "t"))[1]["schema_version"])

    assert SCHEMA_VERSION == 2
    assert version() == version(offset=torch.ones(3, 2), dequant_scale=torch.ones(3, 2)) == 1
    assert version(dequant_scale=torch.ones(3, 2), dequant_offset=torch.ones(3, 2)) == 2
    assert ScaleTable.load(tmp_path / "t").dequant_offset is not None


@pytest.mark.parametrize("name", ["scales", "scales.safetensors", "scales.json"])
def test_the_two_files_of_earlier_versions(tmp_path: Path, name: str) -> None:
    table = _table(offset=torch.randn(3, 2), metadata={"steps": 3})
    arrays = table.save(tmp_path / "scales")
    sidecar = as_pair(arrays)
    loaded = ScaleTable.load(tmp_path / name)
    assert _same(loaded.scale, table.scale)
    assert _same(loaded.offset, table.offset)
    assert (loaded.names, dict(loaded.metadata)) == (table.names, dict(table.metadata))
    sidecar.write_text(sidecar.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(TdqError, match="checksum"):
        ScaleTable.load(arrays)
    sidecar.unlink()
    with pytest.raises(TdqError, match="not readable as a scale table"):
        ScaleTable.load(arrays)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # in the last array
    path.write_bytes(data)


def _nan(path: Path) -> None:
    edit(path, {**read(path)[0], "scale": torch.full((3, 2), torch.nan)})


_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "missing": ("path", lambda a: a.unlink()),
    "truncated": ("path", lambda a: a.write_bytes(a.read_bytes()[:-7])),
    "empty": ("path", lambda a: a.write_bytes(b"")),
    "garbage": ("path", lambda a: a.write_bytes(b"no safetensors")),
    "one bit": ("path", _flip),
    "description truncated": ("path", lambda a: edit(a, text='{"schema_version": 1')),
    "description is a list": ("path", lambda a: edit(a, text="[1, 2]")),
    "description without names": ("path", lambda a: edit(a, text='{"schema_version": 1}')),
    "names are a number": ("path", lambda a: edit(a, names=3)),
    "metadata is a number": ("path", lambda a: edit(a, metadata=3)),
    "names of another table": ("scale", lambda a: edit(a, names=["a", "b", "c"])),
    "wrong checksum": ("path", lambda a: edit(a, sha256="0" * 64)),
    "newer schema": ("schema_version", lambda a: edit(a, schema_version=SCHEMA_VERSION + 1)),
    "schema is no number": ("path", lambda a: edit(a, schema_version="new")),
    "other arrays, signed": ("path", lambda a: edit(a, {"weights": torch.ones(2)})),
    "NaN scales, signed": ("scale", _nan),
}


@pytest.mark.parametrize("case", _DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, case: str) -> None:
    field, damage = _DAMAGE[case]
    arrays = _table().save(tmp_path / "scales")
    damage(arrays)
    with pytest.raises(TdqError) as error:
        ScaleTable.load(arrays)
    assert error.value.field == field


@pytest.mark.parametrize("path", ["", "/"])
def test_a_path_that_names_no_file(path: str) -> None:
    with pytest.raises(TdqError, match="names no file"):
        ScaleTable.load(path)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = _table().save(tmp_path / "scales")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TdqError, match="JSON"):
        _table(metadata={"model": object()}).save(arrays)

    def full_disk(arrays: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        _table(scale=torch.full((3, 2), 7.0)).save(arrays)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


_times = st.lists(st.floats(-10, 1024, width=32), min_size=1, max_size=12)


@given(_times.map(lambda t: sorted(set(t))), _times)
def test_resampling_gives_what_the_lookup_would_have_given(rows: list[float], times: list[float]) -> None:
    scale = torch.arange(1, len(rows) + 1, dtype=torch.float32).reshape(-1, 1) * torch.tensor([1.0, 2.0])
    table = ScaleTable(rows, scale, ("a", "b"), scale / 4, scale + 1, {"steps": 3}, scale / 8)
    resampled = table.resample(times)
    t = torch.tensor(times, dtype=torch.float32)
    new, old = row_index(t, resampled.timesteps), row_index(t, table.timesteps)
    assert (resampled.names, resampled.metadata) == (table.names, table.metadata)
    for field in ("scale", "offset", "dequant_scale", "dequant_offset"):
        assert torch.equal(getattr(resampled, field)[new], getattr(table, field)[old])


@pytest.mark.parametrize("times", [[], [1.0, float("nan")]])
def test_resampling_to_no_schedule(times: list[float]) -> None:
    with pytest.raises(TdqError, match="timesteps"):
        _table().resample(times)


def test_errors_say_field_value_problem_and_cure_and_survive_pickling() -> None:
    import pickle

    error = TdqError("bins", 0, "not a positive number", "Use 1 or more")
    assert str(error) == "bins = 0: not a positive number. Use 1 or more."
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.value) == (str(error), 0)
    assert len(str(TdqError("table", "x" * 10_000, "too long", "Shorten it"))) < 300


def test_a_missing_extra_says_how_to_install_it() -> None:
    from modelopt_tdq.errors import MissingExtraError, require

    with pytest.raises(MissingExtraError, match=r"pip install 'modelopt-tdq\[report\]"):
        require("no_such_module_anywhere", "report")
    import json

    assert require("json", "report") is json
    assert issubclass(tdq.MissingExtraError, TdqError)
