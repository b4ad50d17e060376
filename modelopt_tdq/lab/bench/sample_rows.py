"""Images of the same seeds per bit width: full precision, one scale for all times, a scale per time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import psnr_db
from modelopt_tdq.lab.demo.variants import quantized, variant_config, variant_label
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape
from modelopt_tdq.model.place import execution_device

__all__ = ["SHOWN_RECIPES", "SampleRow", "SampleSettings", "full_precision_images", "quantized_images"]

#: Recipes of Figures 6 to 9, in that order.
SHOWN_RECIPES = ("int8", "w8a4", "w4a8", "w4a4")

_COMPARED = ("static", "tdq")


@dataclass(frozen=True)
class SampleSettings:
    """How images are made.

    Attributes:
        images: Per row.
        trajectories: To calibrate on.
        steps: Of sampling, and of the trajectories.
        seed: Of the calibration's noise.
    """

    images: int = 8
    trajectories: int = 8
    steps: int = 20
    seed: int = 0

    @property
    def image_seed(self) -> int:
        """Of the images' noise: another than that of the calibration."""
        return self.seed + 1


@dataclass(frozen=True)
class SampleRow:
    """One row of images.

    Attributes:
        label: How they were made.
        images: [N, C, H, W] in [-1, 1].
        psnr_db: Against full precision; None for full precision itself.
    """

    label: str
    images: Tensor
    psnr_db: float | None = None


def _noise(model: nn.Module, samples: int, seed: int) -> Tensor:
    return noise(samples, sample_shape(model), seed).to(execution_device(model))


def full_precision_images(model: nn.Module, scheduler: Any, settings: SampleSettings) -> SampleRow:
    """The first row of every figure."""
    images = sample(model, scheduler, _noise(model, settings.images, settings.image_seed), settings.steps)
    return SampleRow("full precision", images.clamp(-1.0, 1.0).cpu())


def quantized_images(
    model: nn.Module,
    scheduler: Any,
    recipe_name: str,
    reference: SampleRow,
    settings: SampleSettings,
    tick: Callable[[], None],
) -> list[SampleRow]:
    """Calibrate static and temporal scales of a recipe, without training, and sample with both.

    Args:
        model: In full precision; it is not changed.
        scheduler: From diffusers; deterministic.
        recipe_name: Name of a recipe.
        reference: From :func:`full_precision_images`, with the same settings.
        settings: How images are made.
        tick: Called after every row.
    """
    import modelopt.torch.quantization as mtq

    calibration = _noise(model, settings.trajectories, settings.seed)
    start = _noise(model, settings.images, settings.image_seed)
    rows = []
    for variant in _COMPARED:
        config = variant_config(recipe_name, variant)
        student = quantized(model, config, lambda quantized: sample(quantized, scheduler, calibration, settings.steps))
        with torch.no_grad():
            mtq.fold_weight(student)  # the same numbers, without quantizing the weights again at every call
        images = sample(student, scheduler, start, settings.steps).clamp(-1.0, 1.0).cpu()
        rows.append(SampleRow(variant_label(recipe_name, variant), images, psnr_db(reference.images, images)))
        tick()
    return rows
