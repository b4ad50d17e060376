"""What calibration knows of one quantizer, from given activations: one tensor per time."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.calibration.choose import Evidence
from modelopt_tdq.calibration.statistics import ActivationStatistics, StepStatistics
from modelopt_tdq.core.fake_quant import NumBits, fake_quantize
from modelopt_tdq.model.timestep import CurrentTimestep


def statistics(rows: list[Tensor]) -> ActivationStatistics:
    """Of activations at the times 0, 1, 2, ..."""
    timestep = CurrentTimestep("timestep", 0)
    collected = StepStatistics("layer", timestep, len(rows))
    for time, x in enumerate(rows):
        timestep.begin(torch.tensor([float(time)]))
        collected.collect(x)
    return collected.statistics([float(t) for t in range(len(rows))])


def evidence(rows: list[Tensor], num_bits: NumBits, asymmetric: bool) -> Evidence:
    """Likewise, with the error of the activation itself."""
    return Evidence(statistics(rows), num_bits, asymmetric)


def squared_error(rows: list[Tensor], scale: Tensor, offset: Tensor | None, num_bits: NumBits) -> Tensor:
    """[K] float64, of the activations themselves at a scale and an offset per row, each [K]."""
    offset = torch.zeros_like(scale) if offset is None else offset
    pairs = zip(rows, scale, offset, strict=True)
    return torch.stack([(fake_quantize(x, s, o, num_bits) - x).double().square().sum() for x, s, o in pairs])
