"""Fréchet distance against closed forms, scipy's matrix square root, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_extractor import TinyExtractor
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.image_metrics import FeatureStatistics, frechet_distance, frechet_name, gaussian_frechet_distance

seeds = st.integers(0, 2**31 - 1)


def _features(seed: int, count: int, width: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + shift


def _covariance(seed: int, width: int) -> Tensor:
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


@given(st.floats(-5, 5), st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.1, 10))
def test_one_dimension_is_the_textbook_formula(m1: float, s1: float, m2: float, s2: float) -> None:
    one = [torch.tensor(v, dtype=torch.float64) for v in ([m1], [[s1**2]], [m2], [[s2**2]])]
    assert gaussian_frechet_distance(*one) == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-9)


@given(seeds, st.integers(1, 8))
def test_commuting_covariances_have_a_closed_form(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    first, second = torch.rand(2, width, generator=generator, dtype=torch.float64) + 0.1
    means = torch.randn(2, width, generator=generator, dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    found = gaussian_frechet_distance(
        means[0], basis @ first.diag() @ basis.T, means[1], basis @ second.diag() @ basis.T
    )
    assert found == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(seeds, st.integers(1, 10))
def test_equals_the_matrix_square_root_of_scipy(seed: int, width: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = _covariance(seed, width), _covariance(seed + 1, width)
    zero = torch.zeros(width, dtype=torch.float64)
    cross = np.trace(np.real(linalg.sqrtm((first @ second).numpy())))
    expected = float(first.trace() + second.trace()) - 2 * cross
    assert gaussian_frechet_distance(zero, first, zero, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(seeds, st.integers(2, 40), st.integers(1, 8))
def test_zero_for_equal_sets_and_symmetric(seed: int, count: int, width: int) -> None:
    first, second = _features(seed, count, width), _features(seed + 1, count + 3, width, 0.5)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6, abs=1e-6)


@given(seeds, st.floats(-3, 3))
def test_a_shift_costs_its_square(seed: int, shift: float) -> None:
    features = _features(seed, 50, 4)
    assert frechet_distance(features, features + shift) == pytest.approx(4 * shift**2, abs=1e-6)


def test_unbiased_covariance_as_in_numpy() -> None:
    first, second = _features(0, 30, 5), _features(1, 20, 5)
    expected = gaussian_frechet_distance(
        first.mean(0),
        torch.from_numpy(np.cov(first.numpy(), rowvar=False)),
        second.mean(0),
        torch.from_numpy(np.cov(second.numpy(), rowvar=False)),
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features_is_finite() -> None:
    first, second = _features(0, 5, 64), _features(1, 7, 64)
    assert 0 < frechet_distance(first, second) < float("inf")
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-4)


def test_name_is_that_of_the_network() -> None:
    assert frechet_name(TinyExtractor()) == "Fréchet distance (tiny)"


def test_mistakes() -> None:
    features = _features(0, 4, 3)
    with pytest.raises(TdqError, match="at least two"):
        frechet_distance(features, features[:1])
    with pytest.raises(TdqError, match="at least two"):
        frechet_distance(FeatureStatistics(), features)
    with pytest.raises(TdqError, match="not as wide as those of the other set, 3"):
        frechet_distance(features, _features(0, 4, 2))
    with pytest.raises(TdqError, match="NaN or infinite"):
        frechet_distance(features, features.clone().fill_(float("nan")))
    with pytest.raises(TdqError, match="Use one extractor for both"):
        frechet_distance(FeatureStatistics("one").update(features), FeatureStatistics("two").update(features))
