"""What a network has to offer to be used in an image metric."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["FeatureExtractor", "LogitExtractor", "StageExtractor"]


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to feature vectors: what a Fréchet distance needs. Distances of different ones cannot be compared."""

    @property
    def name(self) -> str:
        """Of the network, as it appears in results."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D] of uint8 images [N, 3, H, W]."""


@runtime_checkable
class StageExtractor(FeatureExtractor, Protocol):
    """Also gives intermediate features: what a perceptual distance needs."""

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features [N, C_l, H_l, W_l] of each resolution, of uint8 images [N, 3, H, W]."""


@runtime_checkable
class LogitExtractor(FeatureExtractor, Protocol):
    """Also classifies: what the Inception Score needs."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, 3, H, W]."""
