"""Fréchet distance between two sets of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor
from modelopt_tdq.lab.image_metrics.statistics import FeatureStatistics, same_set

__all__ = ["frechet_distance", "frechet_name", "gaussian_frechet_distance"]


def frechet_name(extractor: FeatureExtractor) -> str:
    """What to call the result: a Fréchet distance by the name of its network."""
    return f"Fréchet distance ({extractor.name})"


def gaussian_frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982).

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    Both roots are of symmetric matrices, taken by their eigenvalues: no complex numbers appear, and singular
    covariances (fewer samples than features) need no added diagonal.

    Args:
        mean_1: [D] float64.
        covariance_1: [D, D] float64, symmetric, positive semidefinite.
        mean_2: [D] float64.
        covariance_2: [D, D] float64.

    Returns:
        Not negative.
    """
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = root @ covariance_2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2.0).clamp(min=0.0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2.0 * cross
    return max(0.0, float(distance))  # equal sets: rounding alone could make it negative


def frechet_distance(first: FeatureStatistics | Tensor, second: FeatureStatistics | Tensor) -> float:
    """Fréchet distance of two sets of features (Heusel et al. 2017, "FID" with the Inception network of 2015).

    It is biased upwards by about 1/N, and strongly so with fewer samples than features: compare only values
    made with the same numbers of samples, and look first at the distance of two halves of real data.

    Args:
        first: Statistics, or features [N, D].
        second: Likewise; the numbers of samples may differ.

    Raises:
        TdqError: Fewer than two samples in a set, NaN, widths or extractors that differ.
    """
    sets = [FeatureStatistics().update(s) if isinstance(s, Tensor) else s for s in (first, second)]
    same_set(*sets)
    (covariance_1, covariance_2) = (s.covariance for s in sets)
    return gaussian_frechet_distance(sets[0].mean, covariance_1, sets[1].mean, covariance_2)
