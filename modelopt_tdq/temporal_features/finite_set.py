"""Finite set calibration (*Temporal Feature Matters*, section 4.2): one scale and zero point per time.

An activation that depends on the time alone takes finitely many values, all known beforehand; so each time gets the
scale and the zero point that suit its values best, and no sample can ever surprise them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.core.fake_quant import NumBits, code_range, fake_quantize
from modelopt_tdq.core.scales import Scales

__all__ = ["row_scales"]

#: Share of a row's range that its codes cover; the first is all of it.
_FRACTIONS = tuple(1.0 - 0.02 * step for step in range(41))


def _float32(scale: Tensor) -> Tensor:
    limits = torch.finfo(torch.float32)
    return scale.to(torch.float32).clamp(limits.tiny, limits.max)


def _symmetric(largest: Tensor, num_bits: NumBits) -> Scales:
    """Codes from ``-largest`` to ``largest`` [K] float64, or as far down as the format goes."""
    _, last = code_range(num_bits)
    return Scales(_float32(torch.where(largest > 0, largest / last, torch.ones_like(largest))))


def _asymmetric(low: Tensor, high: Tensor, num_bits: NumBits) -> Scales:
    """Codes from ``low`` to ``high`` [K] float64; the offset is a whole multiple of the scale: minus the zero point."""
    first, last = code_range(num_bits)
    width = high - low
    # a row of equal values v is code 1 (or -1) of scale |v|, and 0 is code 0 of any scale
    level = torch.where(low == 0, torch.ones_like(low), low.abs())
    scale = _float32(torch.where(width > 0, width / (last - first), level))
    zero = torch.where(width > 0, first - torch.round(low / scale), torch.zeros_like(low))
    return Scales(scale, -zero.to(torch.float32) * scale)


def row_scales(values: Tensor, num_bits: NumBits, symmetric: bool = False) -> Scales:
    """Scale and offset of each row, with the least squared error among clipped ranges.

    ``s = (high - low) / (2^b - 1)``, integer ``z``, ``o = -z * s``. ``low`` and ``high`` are the least and greatest
    value of the row, moved towards the row's mean by that one of 41 factors that leaves the least squared error.
    Symmetric: ``s = largest / (2^(b - 1) - 1)``, ``largest`` being moved towards 0.

    Args:
        values: [K, ...] of any floating dtype, finite: what an activation is at each of K times.
        num_bits: Of the codes. FP8 E4M3 is symmetric anyway.
        symmetric: Without an offset.

    Returns:
        ``scale`` [K] float32, and ``offset`` [K] float32 for integers: minus the zero point times the scale.
    """
    rows = values.detach().to(torch.float32).reshape(len(values), -1)
    exact = rows.double()
    low, high, mean = exact.amin(1), exact.amax(1), exact.mean(1)
    largest = torch.maximum(low.abs(), high.abs())

    def clipped(fraction: float) -> Scales:
        if symmetric or not isinstance(num_bits, int):
            return _symmetric(fraction * largest, num_bits)
        return _asymmetric(mean + fraction * (low - mean), mean + fraction * (high - mean), num_bits)

    def error(scales: Scales) -> Tensor:
        column = scales.map(lambda value: value[:, None])
        return (fake_quantize(rows, column.scale, column.offset, num_bits).double() - exact).square().sum(1)

    best = clipped(_FRACTIONS[0])
    least = error(best)
    for fraction in _FRACTIONS[1:]:
        tried = clipped(fraction)
        found = error(tried)
        best, least = _chosen(found < least, tried, best), torch.minimum(found, least)
    return best


def _chosen(better: Tensor, new: Scales, old: Scales) -> Scales:
    """Row by row."""
    offset = None
    if new.offset is not None and old.offset is not None:
        offset = torch.where(better, new.offset, old.offset)
    return Scales(torch.where(better, new.scale, old.scale), offset)
