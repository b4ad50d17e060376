"""The temporal block as one unit (TIB): finite set calibration, and the rounding of its weights learned jointly (TIAR).

TIAR (*Temporal Feature Matters*, section 4.1) learns the rounding of all weights of the block jointly (AdaRound), on

    sum_i || g_i(h(t)) - g^_i(h^(t)) ||^2    over all times t,

here with every feature i in units of its own square at that time, so that small ones count as much as large ones: the
relative squared error by which strategies are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.reconstruction.rounding import (
    RoundingQuantizer,
    can_learn_rounding,
    exponent,
    regularization,
    rounding_rate,
)
from modelopt_tdq.temporal_features.block import TemporalBlock
from modelopt_tdq.temporal_features.finite_set import row_scales
from modelopt_tdq.temporal_features.quantized_block import Formats, quantized

__all__ = ["tib_features"]

_WARM_UP, _BETA = 0.2, (20.0, 2.0)


def tib_features(
    model: nn.Module,
    block: TemporalBlock,
    times: Tensor,
    bits: Formats,
    weights: str,
    targets: Mapping[str, Tensor],
    iterations: int,
    rounding_weight: float,
    tick: Callable[[], object],
) -> dict[str, Tensor]:
    """The features [K, ...] of the block quantized as one unit.

    Args:
        model: See :func:`switch_on`, also for the next four.
        block: Likewise.
        times: Likewise.
        bits: Likewise.
        weights: Likewise.
        targets: The features in full precision.
        iterations: Of Adam; 0: finite set calibration alone.
        rounding_weight: Of the regularisation, the error being in units of the calibrated one.
        tick: Called after each.
    """
    with (
        torch.no_grad(),
        quantized(model, block, times, bits, weights, lambda values: row_scales(values, bits.activation)) as layers,
    ):
        calibrated = block.compute(model, times)
        rounding = _Rounding(layers)
        if not iterations or not rounding.quantizers:
            return calibrated
        with torch.enable_grad():
            rounding.learn(lambda: _error(block.compute(model, times), targets), iterations, rounding_weight, tick)
        learned = block.compute(model, times)
        better = float(_error(learned, targets)) < float(_error(calibrated, targets))
        return learned if better else calibrated


def _error(features: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Mean over features and times of the squared error in units of the squared feature: a scalar."""
    errors = []
    for name, target in targets.items():
        rows = target.float().flatten(1)
        power = rows.square().sum(1).clamp(min=1e-30)
        errors.append(((features[name].float().flatten(1) - rows).square().sum(1) / power).mean())
    return torch.stack(errors).mean()


class _Rounding:
    """The rounding of all weights of the block."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.quantizers: list[tuple[nn.Parameter, RoundingQuantizer]] = []
        for layer in layers.values():
            if can_learn_rounding(layer.weight_quantizer, layer.weight):
                made = RoundingQuantizer.from_tensor_quantizer(layer.weight_quantizer)
                self.quantizers.append((layer.weight, made))

    def learn(self, error: Callable[[], Tensor], iterations: int, weight: float, tick: Callable[[], object]) -> None:
        """Minimise the error, then fix the rounding."""
        with torch.no_grad():
            unit = error().clamp(min=1e-30)
        leaves = [quantizer.begin(parameter) for parameter, quantizer in self.quantizers]
        adam = torch.optim.Adam(leaves, lr=rounding_rate(iterations))
        for step in range(iterations):
            loss = error() / unit
            beta = exponent(step / iterations, _WARM_UP, *_BETA)
            if beta is not None:
                loss = loss + weight * torch.stack([regularization(v, beta) for v in leaves]).sum()
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            adam.step()
            tick()
        for _, quantizer in self.quantizers:
            quantizer.finish()
