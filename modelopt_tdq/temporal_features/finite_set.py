"""Finite set calibration (*Temporal Feature Matters*, section 4.2): one scale and zero point per time.

An activation that depends on the time alone takes finitely many values, all known beforehand; so each time gets the
scale and the zero point that suit its values best, and no sample can ever surprise them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.fake_quant import NumBits, code_range, fake_quantize
from modelopt_tdq.scales import Scales

__all__ = ["row_scales"]

#: Of the range from the smallest to the largest value; the best of these is taken for each time.
_FRACTIONS = torch.linspace(1.0, 0.4, 31).tolist()


def _candidate(low: Tensor, high: Tensor, num_bits: NumBits, symmetric: bool) -> Scales:
    """Min-max, [K] each; the offset is a whole multiple of the scale, so that the zero point is an integer."""
    first, last = code_range(num_bits)
    if symmetric or not isinstance(num_bits, int):
        scale = torch.maximum(low.abs(), high.abs()) / last
        return Scales(torch.where(scale > 0, scale, torch.ones_like(scale)))
    scale = (high - low) / (last - first)
    largest = torch.maximum(low.abs(), high.abs())
    # one value: a step of its own size makes it code 1 or -1
    scale = torch.where(scale > 0, scale, torch.where(largest > 0, largest, torch.ones_like(largest)))
    return Scales(scale, torch.round((low - first * scale) / scale) * scale)


def row_scales(values: Tensor, num_bits: NumBits, symmetric: bool = False) -> Scales:
    """Scale and offset of each row, with the least squared error among clipped min-max ranges.

    Args:
        values: [K, ...] of any floating dtype, finite: what an activation is at each of K times.
        num_bits: Of the codes. FP8 E4M3 is symmetric anyway.
        symmetric: Without an offset.

    Returns:
        ``scale`` [K] float32, and ``offset`` [K] float32 for integers: minus the zero point times the scale.
    """
    rows = values.detach().to(torch.float32).flatten(1)
    low, high = rows.amin(1), rows.amax(1)
    best = _candidate(low, high, num_bits, symmetric)
    least = torch.full_like(low, torch.inf, dtype=torch.float64)
    for fraction in _FRACTIONS:
        candidate = _candidate(low * fraction, high * fraction, num_bits, symmetric)
        column = candidate.map(lambda value: value.unsqueeze(1))
        made = fake_quantize(rows, column.scale, column.offset, num_bits)
        error = (made - rows).double().square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, best.scale)
        offset = best.offset
        if offset is not None and candidate.offset is not None:
            offset = torch.where(better, candidate.offset, offset)
        best = Scales(scale, offset)
    return best
