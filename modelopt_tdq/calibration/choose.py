"""From pooled evidence to scales: the statistics of the algorithm config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_tdq.calibration.candidates import ErrorCurves, affine_offset, symmetric_scale
from modelopt_tdq.calibration.entropy import entropy_amax
from modelopt_tdq.calibration.statistics import BINS, ActivationStatistics
from modelopt_tdq.core.fake_quant import NumBits, code_range

__all__ = ["Evidence", "choose_rows"]


@dataclass(frozen=True)
class Evidence:
    """All that is known of one quantizer after calibration.

    Attributes:
        statistics: Histograms and ranges over K times.
        curves: Error of candidate scales over the same times: the activation's own, or the layer's output.
        num_bits: Number format.
        asymmetric: Whether an offset is used.
    """

    statistics: ActivationStatistics
    curves: ErrorCurves
    num_bits: NumBits
    asymmetric: bool


def _pooled_range(statistics: ActivationStatistics, pooling: Tensor) -> tuple[Tensor, Tensor]:
    used = pooling > 0
    low = torch.where(used, statistics.low.double(), torch.inf).amin(1)
    high = torch.where(used, statistics.high.double(), -torch.inf).amax(1)
    return low.float(), high.float()


def _percentile_range(statistics: ActivationStatistics, pooling: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Range [R] that leaves (100 - percentile) % outside: on both sides together, as bounds of bins."""
    low, high = _pooled_range(statistics, pooling)
    counts, width = statistics.on_common_bins()
    counts = pooling @ counts
    half = BINS // 2
    folded = counts[:, half:] + counts[:, :half].flip(1)
    share = folded.cumsum(1) / folded.sum(1, keepdim=True).clamp(min=1e-300)
    bound = ((share < percentile / 100.0).sum(1) + 1).float() * width
    return torch.maximum(low, -bound), torch.minimum(high, bound)


def choose_rows(evidence: Evidence, pooling: Tensor, statistic: str, percentile: float) -> tuple[Tensor, Tensor]:
    """Scale and offset for each row of ``pooling``.

    Args:
        evidence: Of one quantizer, over K times.
        pooling: [R, K].
        statistic: See :class:`modelopt_tdq.config.TdqCalibConfig`.
        percentile: In %.

    Returns:
        scale [R] and offset [R], float32; the offset is zero where symmetric.
    """
    statistics, num_bits = evidence.statistics, evidence.num_bits
    pooling = pooling.double()
    if statistic in ("mse", "output"):
        best = evidence.curves.best(pooling)
        return evidence.curves.scale[best], evidence.curves.offset[best]
    if statistic == "max":
        low, high = _pooled_range(statistics, pooling)
    elif statistic == "percentile":
        low, high = _percentile_range(statistics, pooling, percentile)
    else:
        counts, width = statistics.on_common_bins()
        amax = entropy_amax(pooling @ counts, width, num_bits)
        low, high = _pooled_range(statistics, pooling)
        low, high = torch.maximum(low, -amax), torch.minimum(high, amax)
    if not evidence.asymmetric:
        scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), num_bits)
        return scale, torch.zeros_like(scale)
    smallest, largest = code_range(num_bits)
    spread = high.clamp(min=0.0) - low.clamp(max=0.0)
    scale = torch.where(spread > 0, spread / (largest - smallest), torch.ones_like(spread))
    return scale, affine_offset(scale, low.clamp(max=0.0), num_bits)
