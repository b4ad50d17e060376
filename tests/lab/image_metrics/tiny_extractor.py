"""A random network with the interface of the real extractors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyExtractor:
    name = "tiny"

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3, 2, 1).requires_grad_(False)
        self.second = nn.Conv2d(8, width, 3, 2, 1).requires_grad_(False)
        for layer in (self.first, self.second):
            layer.weight.normal_(0, 0.2, generator=generator)
            layer.bias.normal_(0, 0.2, generator=generator)

    def stages(self, images: Tensor) -> list[Tensor]:
        assert images.dtype == torch.uint8
        first = self.first((images.float() - 128) / 128).relu()
        return [first, self.second(first).relu()]

    def __call__(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1].mean((2, 3))


class FeaturesOnly:
    name = "features only"

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class TinyClassifier(FeaturesOnly):
    name = "tiny classifier"

    def logits(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 16


def random_images(count: int, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def smooth_images(count: int, seed: int = 0, size: int = 32) -> Tensor:
    """Bytes with large structures, in the middle of the range so that noise is hardly clipped."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 127 + 64).byte()


def with_noise(images: Tensor, deviation: float, seed: int = 1) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() + deviation * noise).round().clamp(0, 255).byte()
