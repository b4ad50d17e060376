"""LayerCorrection: what it refuses, that nothing is lost on the way to a file and back, and its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import edit, read

from modelopt_tdq import LayerCorrection, TdqError
from modelopt_tdq.core.schedule import row_index


def correction(**changes: Any) -> LayerCorrection:
    fields: dict[str, Any] = {
        "timesteps": torch.tensor([1.0, 5.0, 9.0]),
        "gain": {"a": torch.rand(3, 4) + 0.5, "b": torch.tensor([[1.0, 2.0]])},
        "bias": {"a": torch.randn(3, 4), "b": torch.tensor([[0.0, -1.0]])},
        "metadata": {"from": "a test"},
    }
    return LayerCorrection(**{**fields, **changes})


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "a bias too few": ("bias", {"bias": {"a": torch.zeros(3, 4)}}),
    "other widths": ("gain", {"bias": {"a": torch.zeros(3, 5), "b": torch.zeros(1, 2)}}),
    "two rows of three": ("gain", {"gain": {"a": torch.ones(2, 4)}, "bias": {"a": torch.zeros(2, 4)}}),
    "no channels": ("gain", {"gain": {"a": torch.ones(3, 0)}, "bias": {"a": torch.zeros(3, 0)}}),
    "no row dimension": ("gain", {"gain": {"a": torch.ones(4)}, "bias": {"a": torch.zeros(4)}}),
    "a gain of zero": ("gain", {"gain": {"a": torch.zeros(3, 4)}, "bias": {"a": torch.zeros(3, 4)}}),
    "a NaN": ("gain", {"gain": {"a": torch.full((1, 4), torch.nan)}, "bias": {"a": torch.zeros(1, 4)}}),
    "an infinite bias": ("bias", {"gain": {"a": torch.ones(1, 4)}, "bias": {"a": torch.full((1, 4), torch.inf)}}),
    "a time twice": ("timesteps", {"timesteps": torch.tensor([1.0, 5.0, 5.0])}),
    "no finite time": ("timesteps", {"timesteps": torch.tensor([1.0, 5.0, torch.inf])}),
    "no times": ("timesteps", {"timesteps": torch.ones(0)}),
    "no numbers": ("gain", {"gain": {"a": "x"}}),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    field, changes = BAD[case]
    with pytest.raises(TdqError) as raised:
        correction(**changes)
    assert raised.value.field == field


def test_file_and_back(tmp_path: Path) -> None:
    one = correction()
    path = one.save(tmp_path / "correction")
    other = LayerCorrection.load(path)
    assert other.names == ("a", "b")
    assert other.metadata == {"from": "a test"}
    assert torch.equal(other.timesteps, one.timesteps)
    for name in one.names:
        assert torch.equal(other.gain[name], one.gain[name])
        assert torch.equal(other.bias[name], one.bias[name])
    assert one.nbytes == 8 * (12 + 2)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = correction().save(tmp_path / "correction")
    arrays, _, digest = read(path)
    arrays["gain.0"][1, 1] *= 2
    edit(path, arrays, sha256=digest)
    with pytest.raises(TdqError, match="checksum"):
        LayerCorrection.load(path)
    path = correction().save(tmp_path / "correction")
    edit(path, names=["a", "b", "c"])
    with pytest.raises(TdqError, match="not the content"):
        LayerCorrection.load(path)
    path = correction().save(tmp_path / "correction")
    edit(path, schema_version=99)
    with pytest.raises(TdqError, match="newer"):
        LayerCorrection.load(path)


@given(st.lists(st.floats(-10, 20, width=32), min_size=1, max_size=8))
def test_a_resampled_row_is_the_one_that_the_lookup_takes(times: list[float]) -> None:
    one = correction()
    other = one.resample(times)
    rows = row_index(other.timesteps, one.timesteps)
    assert torch.equal(other.gain["a"], one.gain["a"][rows])
    assert torch.equal(other.bias["a"], one.bias["a"][rows])
    assert torch.equal(other.gain["b"], one.gain["b"])


def test_only_some_layers() -> None:
    assert correction().only({"b", "c"}).names == ("b",)
