"""Bytes from floats, and the resize of FID's graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import to_uint8
from modelopt_tdq.lab.image_metrics.resize import resize_like_tensorflow1


def test_bytes_survive_the_way_through_floats() -> None:
    images = torch.arange(256).repeat(3).byte().reshape(1, 3, 16, 16)
    assert torch.equal(to_uint8(images.float() / 127.5 - 1), images)
    assert torch.equal(to_uint8(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1)).flatten(), torch.tensor([0, 128, 255]))


def test_image_mistakes() -> None:
    with pytest.raises(TdqError, match="not images"):
        to_uint8(torch.zeros(3, 8, 8))
    with pytest.raises(TdqError, match="not images"):
        to_uint8(torch.zeros(0, 3, 8, 8))
    with pytest.raises(TdqError, match="neither uint8 nor floating point"):
        to_uint8(torch.zeros(1, 3, 8, 8, dtype=torch.int32))
    with pytest.raises(TdqError, match="holds NaN"):
        to_uint8(torch.full((1, 3, 8, 8), float("nan")))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_resize_equals_sampling_without_half_pixels(height: int, width: int, seed: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    size = 23
    # the same positions, i * old / new, in the coordinates of grid_sample, whose pixel 0 is centered at 1 / old - 1
    y, x = (((torch.arange(size) * n / size) * 2 + 1) / n - 1 for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(2, -1, -1, -1)
    expected = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(resize_like_tensorflow1(images, size), expected, rtol=1e-4, atol=1e-4)


def test_resize_by_hand() -> None:
    row = torch.tensor([0.0, 8.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_like_tensorflow1(row, 4)[0, 0, 0].tolist() == [0.0, 4.0, 8.0, 8.0]  # half pixels: 0, 2, 6, 8
