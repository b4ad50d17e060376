"""Entropy calibration: the clipping bound with the least KL divergence.

S. Migacz, 8-bit Inference with TensorRT, GTC 2017.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_tdq.calibration.statistics import BINS

__all__ = ["entropy_amax"]

#: Bounds tried per histogram, evenly spaced.
_CANDIDATES = 64


def _divergence(counts: NDArray[np.float64], bound: int, levels: int) -> float:
    """KL(p || q): p clips the histogram at ``bound`` bins, q also rounds it to ``levels`` levels."""
    inside = counts[:bound]
    clipped = inside.copy()
    clipped[-1] += counts[bound:].sum()
    level = np.arange(bound) * levels // bound
    filled = (inside > 0).astype(np.float64)
    mass = np.bincount(level, inside, levels)
    support = np.bincount(level, filled, levels)
    rounded = np.where(inside > 0, mass[level] / np.maximum(support[level], 1.0), 0.0)
    p, q = clipped / clipped.sum(), rounded / max(rounded.sum(), 1e-300)
    positive = p > 0
    return float(np.sum(p[positive] * np.log(p[positive] / np.maximum(q[positive], 1e-12))))


def entropy_amax(counts: Tensor, width: float, levels: Tensor) -> Tensor:
    """Clipping bound of each histogram.

    Args:
        counts: [R, BINS] histograms of the activation, centred on zero.
        width: Width of a bin.
        levels: [R] int64, codes between zero and the bound: 2^(bits - 1) where symmetric.

    Returns:
        [R] float32, infinite where the histogram is empty.
    """
    half = BINS // 2
    folded = (counts[:, half:] + counts[:, :half].flip(1)).numpy()
    # the bin that holds exact zeros says nothing about the range; TensorRT levels it too
    folded[:, 0] = folded[:, 1]
    bounds = []
    for row, codes in zip(folded, levels.tolist(), strict=True):
        filled = np.flatnonzero(row)
        if filled.size == 0:
            bounds.append(float("inf"))
            continue
        last = int(filled[-1]) + 1
        first = min(max(codes, last // 16), last)
        tried = np.unique(np.linspace(first, last, _CANDIDATES).round().astype(int))
        best = min(tried, key=lambda bound: _divergence(row, int(bound), codes))
        bounds.append(float(best) * width)
    return torch.tensor(bounds, dtype=torch.float32)
