"""How rows share evidence: smoothing along time, and contiguous bins.

A pooling is a matrix [R, K] of non-negative weights: row r of the result is judged on the evidence of
the K calibrated times, weighted by row r. Static is a single row of ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bin_pooling", "optimal_bins", "smoothing_pooling", "uniform_bins"]


def smoothing_pooling(rows: int, smoothing: float) -> Tensor:
    """[K, K] Gaussian weights along the schedule, cut at two standard deviations.

    Distances count calibrated steps rather than units of time: a schedule takes its steps where the model changes, and
    the same steps may be written as t, sigma or log sigma, whose distances differ by orders of magnitude.

    Args:
        rows: K.
        smoothing: Standard deviation as a fraction of K; 0 is the identity.
    """
    sigma = smoothing * rows
    if sigma <= 0:
        return torch.eye(rows, dtype=torch.float64)
    position = torch.arange(rows, dtype=torch.float64)
    distance = (position.unsqueeze(0) - position.unsqueeze(1)) / sigma
    weights = torch.exp(-0.5 * distance.square())
    return torch.where((distance.abs() <= 2.0) | (distance == 0), weights, 0.0)


def uniform_bins(rows: int, bins: int) -> Tensor:
    """[K] int64 bin of each row, contiguous groups of (nearly) equal size: S_N of the paper."""
    return torch.arange(rows) * min(bins, rows) // rows


def bin_pooling(assignment: Tensor) -> Tensor:
    """[K, K] pooling in which the rows of a bin share all their evidence.

    Args:
        assignment: [K] int64 bin of each row.
    """
    return (assignment.unsqueeze(0) == assignment.unsqueeze(1)).double()


def optimal_bins(error: Tensor, bins: int) -> Tensor:
    """Contiguous bins with the least total error when each takes its best candidate; exact, by dynamic programming.

    Args:
        error: [K, C] error of each candidate at each row.
        bins: Most bins to use.

    Returns:
        [K] int64 bin of each row.
    """
    rows = error.shape[0]
    bins = min(bins, rows)
    total = torch.cat([torch.zeros(1, error.shape[1], dtype=torch.float64), error.double().cumsum(0)])
    # cost[i, j]: rows i..j-1 in one bin
    cost = torch.full((rows + 1, rows + 1), math.inf, dtype=torch.float64)
    for first in range(rows):
        cost[first, first + 1 :] = (total[first + 1 :] - total[first]).amin(1)
    best = cost[0].clone()
    choices = []
    for _ in range(1, bins):
        # candidates[i, j]: the last bin starts at i and ends before j
        candidates = best.unsqueeze(1) + cost
        best, starts = candidates.min(0)
        choices.append(starts)
        best[0] = math.inf
    assignment = torch.zeros(rows, dtype=torch.int64)
    end = rows
    for label, starts in zip(range(bins - 1, 0, -1), reversed(choices), strict=True):
        first = int(starts[end])
        assignment[first:end] = label
        end = first
    return assignment
