"""How much an error at each time counts, where errors of several times are added or averaged.

The weights are a mapping of times to positive numbers, as :func:`modelopt_tdq.image_weights` gives. A time between two
of these has the weight of the nearest, by the rule of :mod:`modelopt_tdq.core.schedule`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.errors import TdqWarning

__all__ = ["squared_weights", "warn_of_other_times", "weighted_mean"]

#: Least of the squares: a time that hardly counts is still evidence of the range.
_LEAST = 1e-30


def squared_weights(weights: Mapping[float, float] | None, times: Sequence[float] | Tensor) -> Tensor:
    """By how much squared errors at each time count: the squares of the weights, relative to the largest.

    Args:
        weights: By time; None: all are alike.
        times: [K].

    Returns:
        [K] float64, in (0, 1], on the CPU or where ``times`` is; exactly 1 where all weights are equal.
    """
    asked = torch.as_tensor(times, dtype=torch.float32)
    if weights is None:
        return torch.ones(len(asked), dtype=torch.float64, device=asked.device)
    known = torch.tensor(sorted(weights.items()), dtype=torch.float64)
    rows = row_index(asked.cpu(), known[:, 0].float())
    return (known[rows, 1] / known[:, 1].max()).square().clamp(min=_LEAST).to(asked.device)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """[...] mean of ``values`` [K, ...] over the times, by ``weights`` [K]."""
    shape = (-1, *(1,) * (values.dim() - 1))
    own = weights.to(values)
    return (values * own.reshape(shape)).sum(0) / own.sum()


def warn_of_other_times(weights: Mapping[float, float] | None, times: Sequence[float]) -> None:
    """Warn where all of ``times`` [K] have the weight of one and the same time: then the weights change nothing."""
    if weights is None or len(weights) < 2 or len(times) < 2:
        return
    known = sorted(weights)
    if len(set(row_index(torch.tensor(times), torch.tensor(known)).tolist())) == 1:
        warnings.warn(
            f"time_weights have no effect: they are for times from {known[0]:g} to {known[-1]:g}, and calibration "
            f"visited {min(times):g} to {max(times):g}, all nearest to one of these. Give weights at times in the "
            "model's own units, as its forward takes them",
            TdqWarning,
            stacklevel=2,
        )
