"""Replayed calls over several processes: the parts that one process shows. tests/calibration has the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelopt_tdq.model.replay_ranks import all_samples, at_time, largest_group


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 3),
        (7.5, 3.0),
        (torch.tensor(7.5), torch.tensor(3.0)),
        (torch.tensor([7, 7]), torch.tensor([3, 3])),
        (torch.tensor([0.5], dtype=torch.float16), torch.tensor([3.0], dtype=torch.float16)),
        (None, None),
    ],
    ids=repr,
)
def test_another_time_in_the_same_form(value: Any, expected: Any) -> None:
    call = {"sample": torch.ones(1), "timestep": value}
    found = at_time(call, "timestep", 3.0)
    assert found["sample"] is call["sample"]
    assert type(found["timestep"]) is type(expected)
    if isinstance(expected, Tensor):
        assert found["timestep"].dtype == expected.dtype
        assert torch.equal(found["timestep"], expected)
        assert not torch.equal(value, expected)
    else:
        assert found["timestep"] == expected


def test_samples_in_the_order_of_one_process() -> None:
    found = {3: [((-0.5, -0.2, -0.7), torch.tensor([[1.0], [2.0], [3.0]]))], 1: [((-0.1,), torch.tensor([4.0, 5.0]))]}
    merged = all_samples(found)
    assert list(merged) == [1, 3]
    assert merged[3].flatten().tolist() == [2.0, 1.0, 3.0]
    assert merged[1].tolist() == [4.0, 5.0]  # two numbers of one sample


def test_the_largest_group_is_that_of_the_first_sample_where_they_are_equal() -> None:
    rows: list[dict[str, list[float]]] = [{"a": [-0.9, -0.8], "b": [-0.1]}, {"a": [-0.9], "b": [-0.1]}, {}]
    assert largest_group(rows) == ["a", "b", None]
