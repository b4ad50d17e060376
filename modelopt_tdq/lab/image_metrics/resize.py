"""The resize of FID: bilinear as TensorFlow 1 did it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["resize_like_tensorflow1"]


def _interpolation(size: int, new_size: int, device: torch.device) -> Tensor:
    """[new_size, size] float32 weights: output pixel i lies at input position ``i * size / new_size``."""
    position = torch.arange(new_size, dtype=torch.float64, device=device) * size / new_size
    low = position.floor().long()
    fraction = position - low
    weights = torch.zeros(new_size, size, dtype=torch.float64, device=device)
    rows = torch.arange(new_size, device=device)
    weights.index_put_((rows, low), 1.0 - fraction, accumulate=True)
    weights.index_put_((rows, (low + 1).clamp(max=size - 1)), fraction, accumulate=True)
    return weights.float()


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize with ``align_corners=False`` and without half-pixel centers, as in FID's original graph.

    It differs from ``torch.nn.functional.interpolate`` by a shift, and has no antialiasing; an FID computed
    with another resize is not comparable with published ones (Parmar et al. 2022, "On aliased resizing").

    Args:
        images: float32 [N, C, H, W].
        size: Height and width of the result.

    Returns:
        float32 [N, C, size, size].
    """
    rows = _interpolation(images.shape[-2], size, images.device)
    columns = _interpolation(images.shape[-1], size, images.device)
    return rows @ images @ columns.T
