"""Activations of a full-precision model over its sampling trajectories: their spread at each time, their density."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.analysis.headroom import spread
from modelopt_tdq.calibration.collect import collect
from modelopt_tdq.calibration.statistics import BINS, ActivationStatistics
from modelopt_tdq.config import TdqCalibConfig, make_config
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape
from modelopt_tdq.model.place import execution_device

__all__ = ["Density", "LayerActivation", "distinct_inputs", "measure_activations", "most_and_least", "ratio_over_time"]

#: Part of the values that :attr:`LayerActivation.magnitude` covers.
COVERED = 0.999


def ratio_over_time(values: Tensor) -> float:
    """Largest over smallest of [K] values, of those above 0; 1 if there are none."""
    positive = values[values > 0]
    return float(positive.max() / positive.min()) if positive.numel() else 1.0


@dataclass(frozen=True)
class Density:
    """Distribution of an activation over time.

    Attributes:
        edges: [B + 1] float64, edges of the bins; they leave out the rarest values.
        density: [K, B] float64, part of the values at that time per unit of the activation.
    """

    edges: Tensor
    density: Tensor


@dataclass(frozen=True)
class LayerActivation:
    """Input of one quantizer.

    Attributes:
        name: Of the quantizer.
        times: [K] float32, ascending.
        statistics: Histograms over the same times.
        deviation: [K] float64, standard deviation.
    """

    name: str
    times: Tensor
    statistics: ActivationStatistics
    deviation: Tensor

    @property
    def movement(self) -> float:
        """Largest over smallest standard deviation, or 99.9 % magnitude where that moves more.

        Behind a normalization the deviation is the same at all times, and yet the tails move.
        """
        return max(ratio_over_time(self.deviation), ratio_over_time(self.magnitude))

    @property
    def magnitude(self) -> Tensor:
        """[K] float64, magnitude that 99.9 % of the values do not exceed, as the edge of a bin."""
        counts, width = self.statistics.on_common_bins()
        folded = counts[:, BINS // 2 :] + counts[:, : BINS // 2].flip(1)
        covered = folded.cumsum(1) / folded.sum(1, keepdim=True).clamp(min=1.0)
        return ((covered < COVERED).sum(1) + 1) * width

    def distribution(self, bins: int = 80) -> Density:
        """The density on about ``bins`` bins over all that is not rarer than 0.05 % on either side, at any time."""
        counts, width = self.statistics.on_common_bins()
        total = counts.sum(1, keepdim=True).clamp(min=1.0)
        rare, below = (1.0 - COVERED) / 2, counts.cumsum(1) / total
        first = int((below <= rare).sum(1).min())
        last = max(int((below < 1.0 - rare).sum(1).max()), first)
        margin = max(1, (last - first + 1) // 12)
        first, last = max(0, first - margin), min(BINS - 1, last + margin)
        group = max(1, round((last - first + 1) / bins))
        number = min(-(-(last - first + 1) // group), (BINS - first) // group)
        shown = counts[:, first : first + number * group].reshape(len(counts), number, group).sum(2)
        edges = (torch.arange(number + 1, dtype=torch.float64) * group + first - BINS / 2) * width
        return Density(edges, shown / total / (group * width))


def measure_activations(
    model: nn.Module, scheduler: Any, samples: int, steps: int, seed: int, progress: bool = True
) -> list[LayerActivation]:
    """Inputs of all layers that the presets quantize; those that move most over time first.

    Args:
        model: In full precision; it is not changed.
        scheduler: From diffusers; deterministic.
        samples: Number of trajectories.
        steps: Of each; K.
        seed: Of the noise that they start from.
        progress: Show progress bars.
    """
    import modelopt.torch.quantization as mtq

    copied = copy.deepcopy(model).eval()
    mtq.quantize(copied, {"quant_cfg": make_config()["quant_cfg"], "algorithm": None})
    start = noise(samples, sample_shape(model), seed).to(execution_device(model))
    settings = TdqCalibConfig(statistic="max", weights="keep", progress=progress, expected_calls=steps)
    found = collect(copied, lambda quantized: sample(quantized, scheduler, start, steps), settings)
    times = torch.tensor(found.times)
    layers = [LayerActivation(name, times, e.statistics, spread(e)) for name, e in found.evidence.items()]
    return sorted(layers, key=lambda layer: -layer.movement)


def distinct_inputs(layers: list[LayerActivation]) -> list[LayerActivation]:
    """The first of those layers that have the same input, such as the projections of an attention."""
    kept: list[LayerActivation] = []
    for layer in layers:
        if not any(
            torch.equal(layer.deviation, other.deviation)
            and torch.equal(layer.statistics.counts, other.statistics.counts)
            for other in kept
        ):
            kept.append(layer)
    return kept


def most_and_least(layers: list[LayerActivation], count: int) -> tuple[list[LayerActivation], list[LayerActivation]]:
    """The ``count`` layers that move most, and those that move least, least last; no layer in both if there are two.

    Args:
        layers: From :func:`measure_activations`.
        count: Fewer where there are not that many.
    """
    count = max(1, min(count, len(layers) // 2))
    return layers[:count], layers[-count:]
