"""One scale and zero point per row: never worse than min-max, and an integer zero point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from modelopt_tdq.core.fake_quant import FP8_E4M3, code_range, fake_quantize, quantize
from modelopt_tdq.temporal_features.finite_set import row_scales

#: Far from the ends of float32, where scales would have to be clamped.
NUMBERS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=NUMBERS)
BITS = st.integers(2, 8)


def errors(values: Tensor, scale: Tensor, offset: Tensor | None, bits: object) -> Tensor:
    """[K] float64."""
    rows = values.reshape(len(values), -1)
    offset = None if offset is None else offset[:, None]
    made = fake_quantize(rows, scale[:, None], offset, bits)  # type: ignore[arg-type]
    return (made.double() - rows.double()).square().sum(1)


@given(ROWS, BITS)
def test_is_never_worse_than_min_max(rows: np.ndarray, bits: int) -> None:
    """By the paper's formulas, written down once more."""
    values = torch.from_numpy(rows)
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    low, high = flat.min(1), flat.max(1)
    varied = high > low
    scale = np.where(varied, (high - low) / (2**bits - 1), 1.0).astype(np.float32)
    zero = np.round(-(2 ** (bits - 1)) - low / scale)
    offset = (-zero.astype(np.float32) * scale).astype(np.float32)
    plain = errors(values, torch.from_numpy(scale), torch.from_numpy(offset), bits)
    found = row_scales(values, bits)
    own = errors(values, found.scale, found.offset, bits)
    # float32 sums of a code and an offset round: a part in 10^6 of the values themselves
    slack = 1e-9 * plain + 1e-12 * torch.from_numpy(np.square(flat).sum(1))
    assert bool((own <= plain + slack)[torch.from_numpy(varied)].all())


@given(ROWS, BITS)
def test_the_offset_is_a_whole_multiple_of_the_scale(rows: np.ndarray, bits: int) -> None:
    found = row_scales(torch.from_numpy(rows), bits)
    assert found.offset is not None
    zero = found.offset.double() / found.scale.double()
    assert bool(((zero - zero.round()).abs() <= 1e-6 * zero.abs().clamp(min=1.0)).all())
    assert found.dequant_scale is None
    assert (found.scale > 0).all()


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.integers(1, 9), BITS)
def test_constant_rows_are_exact(levels: list[float], width: int, bits: int) -> None:
    values = torch.tensor(levels)[:, None].expand(-1, width)
    for symmetric in (False, True):
        found = row_scales(values, bits, symmetric)
        assert bool((errors(values, found.scale, found.offset, bits) <= 1e-12 * values.double().square().sum(1)).all())


@given(ROWS, st.one_of(BITS, st.just(FP8_E4M3)))
def test_symmetric_scales_are_never_worse_than_the_largest_magnitude(rows: np.ndarray, bits: object) -> None:
    values = torch.from_numpy(rows)
    found = row_scales(values, bits, symmetric=True)  # type: ignore[arg-type]
    assert found.offset is None
    largest = values.reshape(len(values), -1).abs().amax(1)
    last = code_range(bits)[1]  # type: ignore[arg-type]
    plain = torch.where(largest > 0, largest / last, torch.ones_like(largest))
    own, expected = errors(values, found.scale, None, bits), errors(values, plain, None, bits)
    assert bool((own <= expected * (1 + 1e-5) + 1e-12 * values.reshape(len(values), -1).double().square().sum(1)).all())


def test_clips_a_tail_towards_the_mean() -> None:
    torch.manual_seed(0)
    body = 5.0 + torch.rand(3, 20_000)
    body[:, 0] = 9.0
    found = row_scales(body, 4)
    assert found.offset is not None
    codes = quantize(body, found.scale[:, None], found.offset[:, None], 4)
    # shrinking towards zero could not keep the codes on 5 to 6
    assert bool((found.scale < 0.8 * 4.0 / 15).all())
    assert bool((codes[:, 1:].amin(1) <= -7).all())
    plain = torch.full((3,), 4.0 / 15)
    zero = torch.round(5.0 / plain) + 8
    assert bool((errors(body, found.scale, found.offset, 4) < 0.6 * errors(body, plain, zero * plain, 4)).all())


def test_every_row_has_its_own() -> None:
    torch.manual_seed(0)
    values = torch.randn(5, 3, 7) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 0.0])[:, None, None]
    whole = row_scales(values, 6)
    for index, row in enumerate(values):
        alone = row_scales(row[None], 6)
        assert torch.equal(alone.scale[0], whole.scale[index])
        assert alone.offset is not None
        assert whole.offset is not None
        assert torch.equal(alone.offset[0], whole.offset[index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_of_any_float_in_float32(dtype: torch.dtype) -> None:
    values = torch.randn(4, 6).to(dtype)
    found = row_scales(values, 8)
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.scale, row_scales(values.float(), 8).scale)


def test_fp8_has_no_offset() -> None:
    found = row_scales(torch.rand(3, 50) + 4, FP8_E4M3)
    assert found.offset is None
    assert bool((errors(torch.rand(3, 50) + 4, found.scale, None, FP8_E4M3) < 0.01 * 50 * 25).all())


def test_one_number_per_row() -> None:
    found = row_scales(torch.tensor([3.0, -2.0, 0.0]), 4)
    assert found.scale.tolist() == [3.0, 2.0, 1.0]
