"""Images as the feature extractors take them: bytes, three channels."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["batches", "to_uint8"]


def to_uint8(images: Tensor, field: str = "images") -> Tensor:
    """Images as bytes.

    Args:
        images: [N, 3, H, W], uint8, or floating point in [-1, 1] as diffusion models give them. Values outside
            are clipped, as they are when an image is saved.
        field: What the user calls them, for the error.

    Returns:
        uint8 [N, 3, H, W]; ``round((x + 1) * 127.5)`` of floating point.

    Raises:
        TdqError: Another shape or dtype, no image at all, or NaN.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise TdqError(field, tuple(images.shape), "not images [N, 3, H, W]", "Pass RGB images as one batch")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TdqError(field, images.dtype, "neither uint8 nor floating point", "Pass bytes, or floats in [-1, 1]")
    values = images.detach().float()
    if bool(values.isnan().any()):
        raise TdqError(field, tuple(images.shape), "it holds NaN", "Find the step of sampling where it began")
    return ((values.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def batches(images: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of at most ``size`` images.

    Raises:
        TdqError: ``size`` is not positive.
    """
    if size < 1:
        raise TdqError("batch_size", size, "not positive", "Use 64, or less where memory is short")
    return [images[start : start + size] for start in range(0, len(images), size)]
