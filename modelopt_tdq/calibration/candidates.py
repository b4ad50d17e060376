"""Candidate scales of one quantizer, and the squared error that each causes at each time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_tdq.calibration.statistics import ActivationStatistics
from modelopt_tdq.core.fake_quant import NumBits, code_range, fake_quantize

__all__ = ["ErrorCurves", "affine_offset", "candidate_grid", "histogram_error", "symmetric_scale"]

#: Ratio of neighbouring candidate scales: the best of them loses less than a tenth of a dB.
_RATIO = 1.03

#: How far below the range of the smallest row candidates go; 3 bits on heavy tails clip at about a fifth.
_SMALLEST = 0.12

#: Fractions of the negative side that asymmetric candidates cover.
_NEGATIVE_COVERAGE = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


@dataclass(frozen=True)
class ErrorCurves:
    """Squared error of one quantizer for C candidates at K times.

    Attributes:
        scale: [C] float32, positive.
        offset: [C] float32, integer multiples of ``scale``; zero where symmetric.
        error: [K, C] float64, summed over the elements seen.
        energy: [K] float64, sum of squares of what the error is an error of.
    """

    scale: Tensor
    offset: Tensor
    error: Tensor
    energy: Tensor

    def best(self, pooling: Tensor) -> Tensor:
        """[R] index of the candidate with the least error, for each row of ``pooling`` [R, K]."""
        return (pooling.to(self.error) @ self.error).argmin(1)


def symmetric_scale(amax: Tensor, num_bits: NumBits) -> Tensor:
    """``amax / qmax``, as ModelOpt's MaxCalibrator; 1 where nothing but zeros was seen."""
    return torch.where(amax > 0, amax / code_range(num_bits)[1], torch.ones_like(amax))


def affine_offset(scale: Tensor, low: Tensor, num_bits: NumBits) -> Tensor:
    """Offset for which ``low`` falls on the smallest code, moved so that zero stays exactly representable.

    A multiple of the scale: zero padding then has a code of its own, and convolutions stay exact at
    their borders.
    """
    smallest, largest = code_range(num_bits)
    steps = torch.round(low / scale).clamp(smallest - largest, 0.0)
    return (steps - smallest) * scale


def _geometric(low: float, high: float) -> Tensor:
    count = max(2, math.ceil(math.log(high / low) / math.log(_RATIO)) + 1)
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).to(torch.float32)


def candidate_grid(statistics: ActivationStatistics, num_bits: NumBits, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and offsets [C] that are worth trying for any row of ``statistics``.

    Geometric in the scale, from deep clipping of the smallest row to no clipping of the largest.
    """
    amax = statistics.amax[statistics.amax > 0]
    if amax.numel() == 0:
        return torch.ones(1), torch.zeros(1)
    smallest, largest = code_range(num_bits)
    if not asymmetric:
        scale = _geometric(float(amax.min()) / largest * _SMALLEST, float(amax.max()) / largest)
        return scale, torch.zeros_like(scale)
    spread = (statistics.high.clamp(min=0) - statistics.low.clamp(max=0))[statistics.amax > 0]
    levels = largest - smallest
    grid = _geometric(float(spread.min()) / levels * _SMALLEST, float(spread.max()) / levels)
    low = float(statistics.low.min())
    pairs: dict[tuple[float, float], None] = {}
    for coverage in _NEGATIVE_COVERAGE:
        offsets = affine_offset(grid, torch.tensor(min(low, 0.0) * coverage), num_bits)
        pairs.update(dict.fromkeys(zip(grid.tolist(), offsets.tolist(), strict=True)))
    table = torch.tensor(list(pairs), dtype=torch.float32)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def _rounding_integral(u: Tensor, num_bits: int) -> Tensor:
    """Antiderivative of ``(u - clip(rne(u)))^2``: 1/12 per whole step, cubes in the rest and beyond the last code."""
    code = torch.round(u).clamp_(*code_range(num_bits))
    return code / 12.0 + (u - code).pow(3) / 3.0


def _bin_error(edges: Tensor, scale: Tensor, offset: Tensor, num_bits: NumBits) -> Tensor:
    """[BINS, C] float64 mean squared error of values that are uniform within each bin.

    Args:
        edges: [BINS + 1] float64.
        scale: [C].
        offset: [C].
        num_bits: Number format.
    """
    if isinstance(num_bits, int):
        s = scale.double()
        integral = _rounding_integral((edges.unsqueeze(1) - offset.double()) / s, num_bits)
        return integral.diff(dim=0) * s.pow(3) / edges.diff().unsqueeze(1)
    middle = ((edges[1:] + edges[:-1]) * 0.5).float().unsqueeze(1)
    return (fake_quantize(middle, scale, offset, num_bits) - middle).double().square()


def histogram_error(statistics: ActivationStatistics, scale: Tensor, offset: Tensor, num_bits: NumBits) -> ErrorCurves:
    """Squared error of the activation itself, from the histograms: exact if values are uniform within a bin."""
    error = torch.zeros(len(statistics.low), len(scale), dtype=torch.float64)
    energy = torch.zeros(len(statistics.low), dtype=torch.float64)
    for exponent in sorted(set(statistics.exponent.tolist())):
        rows = (statistics.exponent == exponent).nonzero().squeeze(1)
        edges, counts = statistics.bin_edges(int(rows[0])), statistics.counts[rows]
        error[rows] = counts @ _bin_error(edges, scale, offset, num_bits)
        energy[rows] = counts @ (edges.pow(3).diff() / (3.0 * edges.diff()))
    return ErrorCurves(scale, offset, error, energy)
