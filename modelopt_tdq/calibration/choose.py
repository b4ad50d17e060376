"""From pooled evidence to scales: the statistics of the algorithm config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from modelopt_tdq.calibration.candidates import (
    ErrorCurves,
    affine_offset,
    candidate_grid,
    histogram_error,
    row_errors,
)
from modelopt_tdq.calibration.entropy import entropy_amax
from modelopt_tdq.calibration.statistics import BINS, ActivationStatistics
from modelopt_tdq.core.fake_quant import NumBits, code_range, symmetric_scale

__all__ = ["Evidence", "choose_rows", "own_curves"]


def own_curves(statistics: ActivationStatistics, num_bits: NumBits, asymmetric: bool) -> ErrorCurves:
    """Error of the activation itself at every scale that is worth trying, with offsets or without."""
    return histogram_error(statistics, *candidate_grid(statistics, num_bits, asymmetric), num_bits)


@dataclass(frozen=True)
class Evidence:
    """All that is known of one quantizer after calibration.

    Attributes:
        statistics: Histograms and ranges over K times.
        num_bits: Number format.
        asymmetric: Whether an offset is used.
        known: See ``curves``; None: they are not known yet. Statistics that look at no error never need them.
        time_weights: [K] float64, by how much squared errors at each time count; None: all alike.
    """

    statistics: ActivationStatistics
    num_bits: NumBits
    asymmetric: bool
    known: ErrorCurves | None = None
    time_weights: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """[K] float64, positive: by how much squared errors at each time count."""
        if self.time_weights is None:
            return torch.ones(len(self.statistics.low), dtype=torch.float64)
        return self.time_weights

    @cached_property
    def curves(self) -> ErrorCurves:
        """Error of candidate scales over the same times: the activation's own, or the layer's output."""
        return own_curves(self.statistics, self.num_bits, self.asymmetric) if self.known is None else self.known

    def symmetric(self) -> Evidence:
        """The same without offsets."""
        return replace(self, known=self.curves.symmetric(), asymmetric=False)

    def error(self, scale: Tensor, offset: Tensor) -> Tensor:
        """[K] float64 squared error of each row at its own scale and offset, each [K], chosen by :func:`choose_rows`.

        Of the layer's output where candidates were judged by it; else of the activation.
        """
        curves = self.curves
        same = (curves.scale == scale.unsqueeze(1)) & (curves.offset == offset.unsqueeze(1))
        if bool(same.any(1).all()):
            return curves.error.gather(1, same.int().argmax(1, keepdim=True)).squeeze(1)
        return row_errors(self.statistics, scale, offset, self.num_bits)


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


def _entropy_range(
    statistics: ActivationStatistics, pooling: Tensor, num_bits: NumBits, asymmetric: bool
) -> tuple[Tensor, Tensor]:
    """Range [R] with the least KL divergence: one bound on both sides."""
    low, high = _pooled_range(statistics, pooling)
    counts, width = statistics.on_common_bins()
    codes = float(1 << (num_bits if isinstance(num_bits, int) else 8))  # FP8 counts as its 8 bits
    share = torch.full_like(low, 0.5)
    if asymmetric:
        spread = high.clamp(min=0.0) - low.clamp(max=0.0)
        share = torch.where(spread > 0, torch.maximum(-low, high) / spread, share)
    bound = entropy_amax(pooling @ counts, width, (codes * share).round().long())
    return torch.maximum(low, -bound), torch.minimum(high, bound)


def _range_rows(
    evidence: Evidence, pooling: Tensor, statistic: str, percentile: float, asymmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset [R] whose codes cover a range that comes from the histograms."""
    statistics, num_bits = evidence.statistics, evidence.num_bits
    if statistic == "max":
        low, high = _pooled_range(statistics, pooling)
    elif statistic == "percentile":
        low, high = _percentile_range(statistics, pooling, percentile)
    else:
        low, high = _entropy_range(statistics, pooling, num_bits, asymmetric)
    if not asymmetric:
        scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), num_bits)
        return scale, torch.zeros_like(scale)
    smallest, largest = code_range(num_bits)
    spread = high.clamp(min=0.0) - low.clamp(max=0.0)
    scale = torch.where(spread > 0, spread / (largest - smallest), torch.ones_like(spread))
    return scale, affine_offset(scale, low.clamp(max=0.0), num_bits)


def choose_rows(evidence: Evidence, pooling: Tensor, statistic: str, percentile: float) -> tuple[Tensor, Tensor]:
    """Scale and offset for each row of ``pooling``.

    Args:
        evidence: Of one quantizer, over K times.
        pooling: [R, K].
        statistic: See :class:`modelopt_tdq.config.TdqCalibConfig`.
        percentile: In %.

    Returns:
        scale [R] and offset [R], float32; the offset is zero where symmetric, and where it would raise the
        squared error.
    """
    pooling = pooling.double()
    if statistic in ("mse", "output"):
        best = evidence.curves.best(pooling)
        return evidence.curves.scale[best], evidence.curves.offset[best]
    plain = _range_rows(evidence, pooling, statistic, percentile, False)
    if not evidence.asymmetric:
        return plain
    moved = _range_rows(evidence, pooling, statistic, percentile, True)
    scale, offset = (torch.cat(pair) for pair in zip(plain, moved, strict=True))
    error = histogram_error(evidence.statistics, scale, offset, evidence.num_bits).error
    of_plain, of_moved = ((pooling * e.T).sum(1) for e in error.tensor_split(2, 1))
    worse = of_moved >= of_plain
    return torch.where(worse, plain[0], moved[0]), torch.where(worse, plain[1], moved[1])
