"""One quantizer's column of the table: its evidence, binned or smoothed along time."""

from __future__ import annotations

import math

from torch import Tensor

from modelopt_tdq.calibration.choose import Evidence, choose_rows
from modelopt_tdq.calibration.pooling import bin_pooling, optimal_bins, smoothing_pooling, uniform_bins
from modelopt_tdq.config import CalibrationFields

__all__ = ["columns", "worth_an_offset"]

#: `asymmetric: auto` takes an offset where it lowers the squared error by this factor (1 dB).
_ASYMMETRIC_GAIN = 10 ** (-1.0 / 10)

#: `margin: auto` makes room for the range of 2^_DOUBLINGS times as many samples: between 1 and 2 the three reference
#: models fare alike, with the most for a model that was calibrated on few.
_DOUBLINGS = 2.0


def columns(evidence: Evidence, config: CalibrationFields, temporal: bool) -> tuple[Tensor, Tensor | None]:
    """Scale [K] and offset [K] (None if symmetric) of one quantizer."""
    scale, offset = _chosen(evidence, config, temporal)
    margin = _margin(evidence) if config.margin == "auto" else config.margin
    if margin:
        steps = (offset / scale).round()  # an offset is a whole number of them
        scale = scale * (1 + margin)
        offset = steps * scale
    return scale.contiguous(), offset.contiguous() if bool(offset.any()) else None


def _margin(evidence: Evidence) -> float:
    """As a fraction of the scale: how far the range would grow with as many samples again, a few times."""
    return min(math.expm1(_DOUBLINGS * evidence.statistics.growth), 1.0)


def worth_an_offset(evidence: Evidence, config: CalibrationFields, temporal: bool) -> bool:
    """Whether ``asymmetric: auto`` takes an offset: the squared error of what :func:`columns` gives falls by 1 dB."""

    def error(option: Evidence) -> float:
        return float((option.error(*_chosen(option, config, temporal)) * option.weights).sum())

    return error(evidence) < error(evidence.symmetric()) * _ASYMMETRIC_GAIN


def _chosen(evidence: Evidence, config: CalibrationFields, temporal: bool) -> tuple[Tensor, Tensor]:
    rows, weights = len(evidence.statistics.low), evidence.weights
    one = weights.unsqueeze(0)
    scale, offset = (v.expand(rows) for v in choose_rows(evidence, one, config.statistic, config.percentile))
    if not temporal or config.bins == 1:
        return scale, offset
    if config.bins == "per_step":
        pooling = smoothing_pooling(rows, config.smoothing)
    elif config.bins == "optimal":
        pooling = bin_pooling(optimal_bins(evidence.curves.error * weights.unsqueeze(1), config.max_bins)) * weights
    else:
        pooling = bin_pooling(uniform_bins(rows, int(config.bins))) * weights
    new_scale, new_offset = choose_rows(evidence, pooling, config.statistic, config.percentile)
    if config.keep_static_below is not None:
        pairs = ((scale, offset), (new_scale, new_offset))
        lost, kept = ((evidence.error(*pair) * weights).sum() for pair in pairs)
        if 10 * math.log10(max(float(lost / kept.clamp(min=1e-300)), 1e-30)) < config.keep_static_below:
            return scale, offset
    return new_scale, new_offset
