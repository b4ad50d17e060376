"""Images of a quantized model against those of full precision, in one small table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from modelopt_tdq.core.metrics import json_numbers, psnr_db
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor, StageExtractor
from modelopt_tdq.lab.image_metrics.frechet import frechet_distance
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.perceptual import perceptual_distance
from modelopt_tdq.lab.image_metrics.statistics import FeatureStatistics, feature_statistics

__all__ = ["ImageReport", "image_report"]


@dataclass(frozen=True)
class ImageReport:
    """How far a set of images is from another.

    Attributes:
        images: Number of images.
        population: Number of images of the set that the Fréchet distance is taken to.
        extractor: Name of the network.
        psnr_db: Over all images together, each against its own reference.
        perceptual: Mean perceptual distance, each image against its own reference; None if the network gives
            no intermediate features.
        frechet: Fréchet distance between the sets.
    """

    images: int
    population: int
    extractor: str
    psnr_db: float
    perceptual: float | None
    frechet: float

    def to_json(self) -> str:
        """As one JSON object; infinite values as ``"inf"``."""
        return json.dumps(json_numbers(asdict(self)), indent=1)


def image_report(
    reference: Tensor,
    images: Tensor,
    extractor: FeatureExtractor,
    population: FeatureStatistics | None = None,
    batch_size: int = 32,
) -> ImageReport:
    """PSNR and perceptual distance against full precision at the same seeds, and a Fréchet distance of the sets.

    The networks see bytes; PSNR is taken of the values as they are, clipped to [-1, 1] if floating point.

    Args:
        reference: [N, 3, H, W], uint8 or floating point in [-1, 1]; of full precision.
        images: The same shape and dtype; of the quantized model, from the same seeds. At least two.
        extractor: The network.
        population: What the Fréchet distance is taken to, such as the statistics of real images; by default
            those of ``reference``.
        batch_size: Images per call of the network.

    Raises:
        TdqError: Shapes or dtypes differ, fewer than two images; as in the metrics themselves.
    """
    if reference.shape != images.shape or reference.dtype != images.dtype:
        raise TdqError(
            "images",
            (tuple(images.shape), images.dtype),
            f"unlike the reference, {(tuple(reference.shape), reference.dtype)}",
            "Compare images of one format, from the same seeds",
        )
    if len(images) < 2:
        raise TdqError("images", len(images), "a Fréchet distance needs at least two", "Pass more images")
    wanted, got = to_uint8(reference, "reference"), to_uint8(images)
    if images.dtype == torch.uint8:
        psnr = psnr_db(reference, images, 255.0)
    else:
        psnr = psnr_db(reference.clamp(-1.0, 1.0), images.clamp(-1.0, 1.0), 2.0)
    if population is None:
        population = feature_statistics(wanted, extractor, batch_size)
    perceptual = None
    if isinstance(extractor, StageExtractor):
        perceptual = float(perceptual_distance(wanted, got, extractor, batch_size).mean())
    return ImageReport(
        images=len(images),
        population=population.count,
        extractor=extractor.name,
        psnr_db=psnr,
        perceptual=perceptual,
        frechet=frechet_distance(population, feature_statistics(got, extractor, batch_size)),
    )
