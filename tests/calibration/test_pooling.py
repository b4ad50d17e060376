"""Bins and smoothing: the dynamic programme against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelopt_tdq.calibration.pooling import bin_pooling, optimal_bins, smoothing_pooling, uniform_bins


def _cost(error: torch.Tensor, assignment: torch.Tensor) -> float:
    return sum(float(error[assignment == b].sum(0).min()) for b in assignment.unique())


def _brute_force(error: torch.Tensor, bins: int) -> float:
    rows = error.shape[0]
    best = float("inf")
    for number in range(1, min(bins, rows) + 1):
        for cuts in itertools.combinations(range(1, rows), number - 1):
            edges = torch.zeros(rows, dtype=torch.int64)
            edges[list(cuts)] = 1
            best = min(best, _cost(error, edges.cumsum(0)))
    return best


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 8), st.integers(0, 10_000))
def test_optimal_bins_are_optimal_and_contiguous(rows: int, candidates: int, bins: int, seed: int) -> None:
    error = torch.rand(rows, candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assignment = optimal_bins(error, bins)
    assert (assignment.diff() >= 0).all()
    assert len(assignment.unique()) <= bins
    assert _cost(error, assignment) == pytest.approx(_brute_force(error, bins), rel=1e-12)


@given(st.integers(1, 60), st.integers(1, 70))
def test_uniform_bins_have_equal_sizes(rows: int, bins: int) -> None:
    assignment = uniform_bins(rows, bins)
    sizes = assignment.bincount()
    assert len(sizes) == min(rows, bins)
    assert int(sizes.max() - sizes.min()) <= 1
    assert (assignment.diff() >= 0).all()


def test_optimal_is_never_worse_than_uniform() -> None:
    error = torch.rand(20, 9, dtype=torch.float64)
    for bins in range(1, 21):
        assert _cost(error, optimal_bins(error, bins)) <= _cost(error, uniform_bins(20, bins)) + 1e-12


def test_smoothing() -> None:
    assert torch.equal(smoothing_pooling(5, 0.0), torch.eye(5, dtype=torch.float64))
    weights = smoothing_pooling(20, 0.1)
    assert torch.equal(weights, weights.T)
    assert (weights.diagonal() == 1).all()
    assert int((weights[10] > 0).sum()) == 9  # four rows to each side: two standard deviations
    assert torch.equal(bin_pooling(torch.tensor([0, 0, 1])), torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).double())
