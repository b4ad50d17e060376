"""The ``tdq`` algorithm: one pass over the calibration data, then one column of the table per quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modelopt_tdq.calibration.collect import collect
from modelopt_tdq.calibration.columns import columns
from modelopt_tdq.calibration.protect import Columns, install, protected_rows
from modelopt_tdq.calibration.select import temporal_names
from modelopt_tdq.calibration.snapshot import restored_on_error
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.training.forget import forget_learning

__all__ = ["tdq_calibrate"]


def tdq_calibrate(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate the activation quantizers of a ModelOpt-quantized model per time step.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: Calls the model on calibration data, over whole sampling trajectories.
        **fields: Fields of :class:`modelopt_tdq.config.TdqCalibConfig`.

    Raises:
        TdqError: ``forward_loop`` is missing, never runs, visits a single time, or meets NaN or infinity;
            a field, pattern or number format cannot be used. The model is left as it was.
    """
    known = {name: value for name, value in fields.items() if name in TdqCalibConfig.model_fields}
    config = TdqCalibConfig(**known)
    with restored_on_error(model):
        forget_learning(model)
        calibration = collect(model, forward_loop, config)
        follow = temporal_names(config.temporal, list(calibration.quantizers))
        temporal: Columns = {n: columns(e, config, n in follow) for n, e in calibration.evidence.items()}
        if config.protect_steps and config.bins != 1:
            static = {n: columns(e, config, False) for n, e in calibration.evidence.items()}
            temporal, _ = protected_rows(
                model, calibration.quantizers, calibration.replay, calibration.times, temporal, static, config.progress
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        install(calibration.quantizers, torch.tensor(calibration.times), temporal, device)
