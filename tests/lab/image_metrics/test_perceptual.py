"""Perceptual distance: zero for equal images, symmetric, growing with noise, and by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_extractor import TinyExtractor, random_images, smooth_images, with_noise
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import StageExtractor, perceptual_distance, perceptual_name


class _Fixed:
    """Two stages that are the image itself, and three times the same at half the size."""

    name = "fixed"

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        return [images.float(), 3 * images.float()[:, :, ::2, ::2]]


def test_zero_for_equal_images_and_symmetric() -> None:
    first, second, extractor = random_images(5), random_images(5, seed=1), TinyExtractor()
    assert perceptual_distance(first, first.clone(), extractor).tolist() == [0.0] * 5
    forth, back = perceptual_distance(first, second, extractor), perceptual_distance(second, first, extractor)
    assert torch.equal(forth, back)
    assert (forth > 0).all()
    assert forth.dtype == torch.float64


def test_grows_with_noise() -> None:
    images, extractor = smooth_images(4), TinyExtractor()
    found = torch.stack([perceptual_distance(images, with_noise(images, s), extractor) for s in (2, 8, 32, 64)])
    assert (found.diff(dim=0) > 0).all()


def test_by_hand() -> None:
    # red against green at one of four pixels: squared distance of two orthogonal unit vectors, 2
    reference = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    reference[0, 0] = 200
    images = reference.clone()
    images[0, :, 0, 0] = torch.tensor([0, 100, 0])
    # first stage: 2 / 4 positions; second stage: 2 at its only position
    assert perceptual_distance(reference, images, _Fixed()).item() == pytest.approx((0.5 + 2.0) / 2)


def test_brightness_alone_is_no_distance_to_channel_normalised_features() -> None:
    reference = torch.full((1, 3, 2, 2), 50, dtype=torch.uint8)
    assert perceptual_distance(reference, 2 * reference, _Fixed()).item() == pytest.approx(0.0, abs=1e-12)


def test_batches_do_not_matter() -> None:
    first, second, extractor = random_images(7), random_images(7, seed=1), TinyExtractor()
    whole = perceptual_distance(first, second, extractor)
    torch.testing.assert_close(perceptual_distance(first, second, extractor, batch_size=3), whole, rtol=1e-5, atol=0)


def test_name_and_mistakes() -> None:
    extractor: StageExtractor = TinyExtractor()
    assert perceptual_name(extractor) == "perceptual distance (tiny, unweighted)"
    with pytest.raises(TdqError, match="not of the shape of the reference"):
        perceptual_distance(random_images(2), random_images(3), extractor)
