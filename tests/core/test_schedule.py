"""Time to row, against a search by hand in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from modelopt_tdq.core.schedule import edges, nearest_known, row_index

_time = st.floats(0.0, 1024.0, width=32)
_rows = st.lists(_time, min_size=1, max_size=12, unique=True).map(sorted)


def _nearest(time: float, rows: list[float]) -> int:
    """Row with the least distance, the earlier one of two."""
    distances = [abs(Fraction(time) - Fraction(row)) for row in rows]
    return distances.index(min(distances))


def _row(times: list[float], rows: list[float]) -> list[int]:
    return row_index(torch.tensor(times, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32)).tolist()


@given(st.lists(_time, min_size=1, max_size=20), _rows)
def test_any_time_takes_the_nearest_row(times: list[float], rows: list[float]) -> None:
    assert _row(times, rows) == [_nearest(time, rows) for time in times]


@given(_rows)
@example([1.0, float(np.nextafter(np.float32(1), np.float32(2)))])
@example([float(np.nextafter(np.float32(1), np.float32(0))), 1.0])
def test_a_calibrated_time_takes_its_own_row(rows: list[float]) -> None:
    assert _row(rows, rows) == list(range(len(rows)))


@given(_rows, st.data())
def test_half_way_takes_the_smaller_time(rows: list[float], data: st.DataObject) -> None:
    if len(rows) == 1:
        return
    index = data.draw(st.integers(0, len(rows) - 2))
    middle = (rows[index] + rows[index + 1]) / 2
    if float(np.float32(middle)) == middle:
        assert _row([middle], rows) == [index]


def test_a_time_outside_takes_the_end_row() -> None:
    assert _row([-5.0, 0.0, 2000.0, torch.inf], [10.0, 20.0, 30.0]) == [0, 0, 2, 2]


def test_one_row_serves_every_time() -> None:
    assert _row([-1.0, 0.0, 7.0], [3.0]) == [0, 0, 0]
    assert edges(torch.tensor([3.0])).shape == (0,)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_times_of_any_dtype(dtype: torch.dtype) -> None:
    rows = torch.tensor([0.0, 100.0, 200.0, 512.0])
    times = torch.tensor([0, 49, 50, 51, 150, 500, 600]).to(dtype)
    expected = [_nearest(float(time), rows.tolist()) for time in times]
    found = row_index(times, rows)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@given(_rows)
def test_edges_are_float32_and_never_above_the_middle(rows: list[float]) -> None:
    found = edges(torch.tensor(rows, dtype=torch.float32))
    assert found.dtype == torch.float32
    for edge, low, high in zip(found.tolist(), rows, rows[1:], strict=False):
        middle = (Fraction(low) + Fraction(high)) / 2
        above = float(np.nextafter(np.float32(edge), np.float32(np.inf)))
        assert Fraction(edge) <= middle < Fraction(above)


@given(_rows, st.data())
def test_a_row_that_is_not_known_takes_the_nearest_known_one(rows: list[float], data: st.DataObject) -> None:
    known = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)).filter(any))
    places = [i for i, there in enumerate(known) if there]
    found = nearest_known(torch.tensor(rows, dtype=torch.float32), torch.tensor(known))
    assert found.tolist() == [places[_nearest(time, [rows[i] for i in places])] for time in rows]
