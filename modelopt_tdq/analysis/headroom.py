"""Headroom: what the best single scale of each quantizer loses against its best scale per step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_tdq.calibration.candidates import ErrorCurves
from modelopt_tdq.calibration.choose import Evidence
from modelopt_tdq.calibration.collect import Calibration
from modelopt_tdq.calibration.statistics import BINS
from modelopt_tdq.core.metrics import decibels

__all__ = ["LayerHeadroom", "headroom", "spread"]


@dataclass(frozen=True)
class LayerHeadroom:
    """Headroom of one quantizer.

    Attributes:
        name: Of the quantizer.
        loss_db: What the best single scale loses against the best scale per step, in dB of squared error
            (of the layer's output where that was measured, else of the activation).
        sqnr_db: Signal to quantization noise of the layer with the best scale per step, in dB.
        spread_ratio: Largest over smallest standard deviation of the activation over time.
        spread: [K] standard deviation of the activation at each time.
        scale: [K] best scale at each time.
    """

    name: str
    loss_db: float
    sqnr_db: float
    spread_ratio: float
    spread: tuple[float, ...]
    scale: tuple[float, ...]


def spread(evidence: Evidence) -> Tensor:
    """[K] float64 standard deviation of the activation at each time, from its histogram."""
    counts, width = evidence.statistics.on_common_bins()
    centers = (torch.arange(BINS, dtype=torch.float64) - BINS / 2 + 0.5) * width
    number = counts.sum(1).clamp(min=1.0)
    mean = counts @ centers / number
    return (counts @ centers.square() / number - mean.square()).clamp(min=0.0).sqrt()


def headroom(
    calibration: Calibration, fit: dict[str, ErrorCurves], judge: dict[str, ErrorCurves]
) -> list[LayerHeadroom]:
    """Headroom of every quantizer, largest loss first.

    Scales are chosen on one half of the data and judged on the other, so that a scale per step gains
    nothing by fitting the noise of few samples.

    Args:
        calibration: The pass over the data.
        fit: Error curves over one half of the replayed samples.
        judge: Likewise over the other half, for the same candidates. A quantizer that either lacks is fitted and judged
            by its evidence.
    """
    layers = []
    for name, evidence in calibration.evidence.items():
        both = name in fit and name in judge
        chosen, judged = (fit[name], judge[name]) if both else (evidence.curves, evidence.curves)
        rows = chosen.error.argmin(1)
        per_step = float(judged.error.gather(1, rows.unsqueeze(1)).sum())
        single = float(judged.error[:, chosen.error.sum(0).argmin()].sum())
        energy = float(judged.energy.sum())
        deviation = spread(evidence)
        moving = deviation[deviation > 0]
        ratio = float(moving.max() / moving.min()) if moving.numel() else 1.0
        layers.append(
            LayerHeadroom(
                name,
                loss_db=decibels(single, per_step) if per_step > 0 else 0.0,
                sqnr_db=decibels(energy, per_step),
                spread_ratio=ratio,
                spread=tuple(deviation.tolist()),
                scale=tuple(chosen.scale[rows].tolist()),
            )
        )
    return sorted(layers, key=lambda layer: -layer.loss_db)


def median(values: list[float]) -> float:
    """Median of a list; 0 if it is empty."""
    return float(torch.tensor(values).median()) if values else 0.0
