"""Candidate scales of one quantizer, and the squared error that each causes at each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_tdq.calibration.statistics import BINS, ActivationStatistics
from modelopt_tdq.core.fake_quant import NumBits, code_range, fake_quantize

__all__ = [
    "ErrorCurves",
    "affine_offset",
    "candidate_grid",
    "histogram_error",
    "row_errors",
    "shifted_pairs",
]

#: Ratio of neighbouring candidate scales: the best of them loses less than a tenth of a dB.
_RATIO = 1.03

#: How far below the range of the smallest row candidates go; 3 bits on heavy tails clip at about a fifth.
_SMALLEST = 0.12

#: Fractions of the shorter side of zero that asymmetric candidates cover; 2: outliers make the other side the longer.
#: Where that makes too many candidates, the next list is taken.
_COVERAGES = ((2.0, 1.0, 0.85, 0.7, 0.5, 0.3, 0.15, 0.0), (1.0, 0.7, 0.3), (1.0,))

#: Most asymmetric candidates: error curves take no more memory than the histograms, or so many numbers.
_MOST, _MOST_ERRORS = BINS, 100_000

#: Candidates whose error is found at once; few enough for a processor's cache.
_CHUNK = 64


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

    def symmetric(self) -> ErrorCurves:
        """The candidates without an offset alone."""
        return self._picked(self.offset == 0)

    def shifted(self) -> ErrorCurves:
        """The candidates with an offset alone."""
        return self._picked(self.offset != 0)

    def _picked(self, chosen: Tensor) -> ErrorCurves:
        return ErrorCurves(self.scale[chosen], self.offset[chosen], self.error[:, chosen], self.energy)


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


def _covering_steps(scale: Tensor, low: Tensor, high: Tensor, coverage: float, levels: int) -> Tensor:
    """[C, R] int64 in [0, levels]: codes below that of zero, so that a fraction of each row's shorter side has codes.

    The longer side gets those that are left.
    """
    steps = torch.minimum(-low, high) * coverage / scale.unsqueeze(1)
    return torch.where(-low <= high, steps, levels - steps).round().clamp(0, levels).long()


def _coarser(steps: Tensor, spacing: int, levels: int) -> Tensor:
    """Numbers of codes on the shorter side of zero, up to a multiple of ``spacing``: clipping costs more than range."""
    flipped = steps > levels // 2
    shorter = torch.where(flipped, levels - steps, steps)
    shorter = (shorter + spacing - 1) // spacing * spacing
    return torch.where(flipped, levels - shorter, shorter).clamp(0, levels)


def shifted_pairs(
    grid: Tensor,
    low: Tensor,
    high: Tensor,
    useful: Tensor,
    num_bits: NumBits,
    coverages: Sequence[tuple[float, ...]],
    most: int,
) -> tuple[Tensor, Tensor]:
    """Scales of ``grid`` with offsets that suit some row at its own range; no offset is 0.

    Args:
        grid: [C] scales.
        low: [R], not above zero.
        high: [R], not below zero.
        useful: [C, R] bool: the scales that are of use to a row.
        num_bits: An integer format.
        coverages: Fractions of a row's shorter side that are tried; where there are too many pairs, the next ones.
        most: Pairs; but four offsets per scale are always allowed.
    """
    smallest, largest = code_range(num_bits)
    levels, middle = int(largest - smallest), -int(smallest)
    number = torch.arange(len(grid)).unsqueeze(1) * (levels + 1)

    def pairs(fractions: tuple[float, ...], spacing: int) -> Tensor:
        found = []
        for coverage in fractions:
            steps = _coarser(_covering_steps(grid, low, high, coverage, levels), spacing, levels)
            found.append((number + steps)[useful & (steps != middle)])
        distinct: Tensor = torch.unique(torch.cat(found))
        return distinct

    for fractions in coverages:
        chosen = pairs(fractions, 1)
        if len(chosen) <= most:
            break
    spacing = 1
    while len(chosen) > max(most, 4 * len(grid)):
        spacing *= 2
        chosen = pairs(coverages[-1], spacing)
    scale = grid[chosen // (levels + 1)]
    return scale, (middle - chosen % (levels + 1)) * scale


def candidate_grid(statistics: ActivationStatistics, num_bits: NumBits, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and offsets [C] that are worth trying for any row of ``statistics``.

    Geometric in the scale, from deep clipping of the smallest row to no clipping of the largest. The symmetric
    candidates come first, whether ``asymmetric`` or not: with an offset, no row and no group of rows fares worse
    than without. Offsets are those that suit some row at its own range, whole multiples of the scale.
    """
    amax = statistics.amax[statistics.amax > 0]
    if amax.numel() == 0:
        return torch.ones(1), torch.zeros(1)
    smallest, largest = code_range(num_bits)
    plain = _geometric(float(amax.min()) / largest * _SMALLEST, float(amax.max()) / largest)
    if not asymmetric:
        return plain, torch.zeros_like(plain)
    seen = statistics.amax > 0
    low, high = statistics.low[seen].clamp(max=0.0), statistics.high[seen].clamp(min=0.0)
    unclipped = (high - low) / (largest - smallest)
    grid = _geometric(float(unclipped.min()) * _SMALLEST, float(unclipped.max()))
    # a row has no use for a scale beyond its range: the first one above covers it
    scales = grid.unsqueeze(1)
    useful = (scales <= unclipped * _RATIO) & (scales >= unclipped * (_SMALLEST / _RATIO))
    most = max(_MOST, _MOST_ERRORS // len(seen))
    scale, offset = shifted_pairs(grid, low, high, useful, num_bits, _COVERAGES, most)
    return torch.cat([plain, scale]), torch.cat([torch.zeros_like(plain), offset])


def _rounding_integral(u: Tensor, num_bits: int) -> Tensor:
    """Antiderivative of ``(u - clip(rne(u)))^2``: 1/12 per whole step, cubes in the rest and beyond the last code.

    ``u`` is overwritten.
    """
    code = torch.round(u).clamp_(*code_range(num_bits))
    rest = u.sub_(code)
    return code.div_(12.0).add_(rest * rest * rest, alpha=1.0 / 3.0)


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
        integral = _rounding_integral((edges.unsqueeze(1) - offset.double()).div_(s), num_bits)
        return integral.diff(dim=0).mul_(s.pow(3)).div_(edges.diff().unsqueeze(1))
    middle = ((edges[1:] + edges[:-1]) * 0.5).float().unsqueeze(1)
    return (fake_quantize(middle, scale, offset, num_bits) - middle).double().square()


def histogram_error(statistics: ActivationStatistics, scale: Tensor, offset: Tensor, num_bits: NumBits) -> ErrorCurves:
    """Squared error of the activation itself, from the histograms: exact if values are uniform within a bin."""
    error = torch.zeros(len(statistics.low), len(scale), dtype=torch.float64)
    energy = torch.zeros(len(statistics.low), dtype=torch.float64)
    for exponent in sorted(set(statistics.exponent.tolist())):
        rows = (statistics.exponent == exponent).nonzero().squeeze(1)
        edges, counts = statistics.bin_edges(int(rows[0])), statistics.counts[statistics.histogram[rows]]
        for start in range(0, len(scale), _CHUNK):
            part = slice(start, start + _CHUNK)
            error[rows, part] = counts @ _bin_error(edges, scale[part], offset[part], num_bits)
        energy[rows] = counts @ (edges.pow(3).diff() / (3.0 * edges.diff()))
    return ErrorCurves(scale, offset, error, energy)


def row_errors(statistics: ActivationStatistics, scale: Tensor, offset: Tensor, num_bits: NumBits) -> Tensor:
    """[K] float64: likewise, of each row at a scale and an offset of its own, each [K]."""
    error, histogram = torch.zeros(len(statistics.low), dtype=torch.float64), statistics.histogram
    for row in range(len(error)):
        own = slice(row, row + 1)
        error[row] = statistics.counts[histogram[row]] @ _bin_error(
            statistics.bin_edges(row), scale[own], offset[own], num_bits
        )
    return error
