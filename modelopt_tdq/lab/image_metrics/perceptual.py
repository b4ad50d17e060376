"""Distance of two images as a network sees them, in the manner of LPIPS but without learned weights."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.core.metrics import require_same_shape
from modelopt_tdq.lab.image_metrics.extractor import StageExtractor
from modelopt_tdq.lab.image_metrics.images import batches, to_uint8

__all__ = ["perceptual_distance", "perceptual_name"]

_EPSILON = 1e-10  # as in LPIPS: a position where all channels are zero has no direction


def perceptual_name(extractor: StageExtractor) -> str:
    """What to call the result: it is not LPIPS, whose channel weights were fitted to human judgements."""
    return f"perceptual distance ({extractor.name}, unweighted)"


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + _EPSILON)


def perceptual_distance(reference: Tensor, images: Tensor, extractor: StageExtractor, batch_size: int = 32) -> Tensor:
    """Perceptual distance of each image from its own reference.

        d = mean over stages l, positions h, w of  sum_c (u_lchw(reference) - u_lchw(image))^2,
        u = features, scaled to unit length over the channels

    Zhang et al. 2018 (LPIPS), equation 1, with all channel weights 1 and the mean over the stages.

    Args:
        reference: [N, 3, H, W], uint8 or floating point in [-1, 1]; of full precision.
        images: The same shape; of the quantized model, from the same seeds.
        extractor: The network.
        batch_size: Pairs per call of the network.

    Returns:
        [N] float64 on the CPU, from 0 (equal) to 4 (opposite).

    Raises:
        TdqError: The shapes differ; as in :func:`to_uint8`.
    """
    require_same_shape(reference, images, "images", "Compare images from the same seeds")
    pairs = zip(
        batches(to_uint8(reference, "reference"), batch_size), batches(to_uint8(images), batch_size), strict=True
    )
    found = []
    for wanted, got in pairs:
        distances = [
            (_unit(a.double()) - _unit(b.double())).square().sum(1).mean((1, 2))
            for a, b in zip(extractor.stages(wanted), extractor.stages(got), strict=True)
        ]
        found.append(torch.stack(distances).mean(0).cpu())
    return torch.cat(found)
