"""Temporal feature error: how far the features of a quantized model are from those in full precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["FeatureErrors", "cosine_similarity", "relative_squared_error"]

#: By the name of the layer that makes the feature, [K] float64: one number per time.
FeatureErrors = Mapping[str, Tensor]


def _rows(features: Mapping[str, Tensor], name: str) -> Tensor:
    return features[name].detach().double().flatten(1).cpu()


def relative_squared_error(targets: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``||g^(t) - g(t)||^2 / ||g(t)||^2`` of each feature at each time.

    Args:
        targets: [K, ...] in full precision, by name.
        features: Likewise, of the quantized model.

    Returns:
        [K] float64 by name; 0 where both are 0, infinite where the target alone is.
    """
    errors = {}
    for name in targets:
        target = _rows(targets, name)
        noise, power = (_rows(features, name) - target).square().sum(1), target.square().sum(1)
        errors[name] = torch.where(noise == 0, torch.zeros_like(noise), noise / power)
    return errors


def cosine_similarity(targets: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``<g^(t), g(t)> / (||g^(t)|| ||g(t)||)``, the measure of the conference version; arguments as above."""
    return {
        name: torch.nn.functional.cosine_similarity(_rows(targets, name), _rows(features, name), dim=1)
        for name in targets
    }
