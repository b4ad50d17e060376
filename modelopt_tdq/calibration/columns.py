"""One quantizer's column of the table: its evidence, binned or smoothed along time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt_tdq.calibration.choose import Evidence, choose_rows
from modelopt_tdq.calibration.pooling import bin_pooling, optimal_bins, smoothing_pooling, uniform_bins
from modelopt_tdq.config import TdqCalibConfig

__all__ = ["columns"]


def _row_error(evidence: Evidence, scale: Tensor) -> Tensor:
    """[K] squared error of each row at the candidate nearest to its scale."""
    distance = (evidence.curves.scale.log().unsqueeze(0) - scale.log().unsqueeze(1)).abs()
    return evidence.curves.error.gather(1, distance.argmin(1, keepdim=True)).squeeze(1)


def columns(evidence: Evidence, config: TdqCalibConfig, temporal: bool) -> tuple[Tensor, Tensor | None]:
    """Scale [K] and offset [K] (None if symmetric) of one quantizer."""
    rows = len(evidence.statistics.low)
    one = torch.ones(1, rows, dtype=torch.float64)
    scale, offset = (v.expand(rows) for v in choose_rows(evidence, one, config.statistic, config.percentile))
    if temporal and config.bins != 1:
        if config.bins == "per_step":
            pooling = smoothing_pooling(rows, config.smoothing)
        elif config.bins == "optimal":
            pooling = bin_pooling(optimal_bins(evidence.curves.error, config.max_bins))
        else:
            pooling = bin_pooling(uniform_bins(rows, int(config.bins)))
        new_scale, new_offset = choose_rows(evidence, pooling, config.statistic, config.percentile)
        gain = _row_error(evidence, scale).sum() / _row_error(evidence, new_scale).sum().clamp(min=1e-300)
        if config.keep_static_below is None or 10 * math.log10(max(float(gain), 1e-30)) >= config.keep_static_below:
            scale, offset = new_scale, new_offset
    return scale.contiguous(), offset.contiguous() if bool(offset.any()) else None
