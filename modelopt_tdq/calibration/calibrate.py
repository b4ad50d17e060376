"""The ``tdq`` algorithm: one pass over the calibration data, then one column of the table per quantizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from modelopt_tdq.calibration.collect import collect
from modelopt_tdq.calibration.columns import columns
from modelopt_tdq.calibration.compensated_rounding import compensated_rounding
from modelopt_tdq.calibration.correct import correct_layers
from modelopt_tdq.calibration.protect import Columns, install, protected_rows
from modelopt_tdq.config import CalibrationFields, TdqCalibConfig
from modelopt_tdq.core.together import together
from modelopt_tdq.model.learning import forget_learning
from modelopt_tdq.model.output_correction import forget_layer_correction
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import temporal_names
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.model.unquantized import warn_of_unquantized_layers
from modelopt_tdq.model.weight_fit import watch_training

__all__ = ["calibrate_scales", "tdq_calibrate"]

#: diffusers' ``from_pretrained`` calibrates each layer as it is loaded, when there is no model to run yet.
_LONE_LAYER = (
    "loaded uncalibrated, as a single layer has no time: calibrate the whole model with "
    "modelopt_tdq.quantize_pipeline(pipeline, config, prompts), or mtq.quantize(model, config, forward_loop)"
)


def tdq_calibrate(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """The algorithm ``tdq``: scales per time step (:func:`calibrate_scales`), then corrections of the layers' outputs.

    Args:
        model: As for :func:`calibrate_scales`.
        forward_loop: Likewise.
        **fields: Fields of :class:`modelopt_tdq.config.TdqCalibConfig`.

    Raises:
        TdqError: As :func:`calibrate_scales` and :func:`modelopt_tdq.calibration.correct.correct_layers`.
    """
    known = {name: value for name, value in fields.items() if name in TdqCalibConfig.model_fields}
    with restored_on_error(model), together("tdq"):
        config = TdqCalibConfig(**known)
        replay = calibrate_scales(model, forward_loop, config)
        if replay is not None:
            with compensated_rounding(model, replay, config):
                correct_layers(model, replay, config)


def calibrate_scales(
    model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None, config: CalibrationFields
) -> Replay | None:
    """Calibrate the activation quantizers of a ModelOpt-quantized model per time step.

    Layers that the model's config means to quantize, and that are not quantized when this is done, are named in one
    warning, each with the reason.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: Calls the model on calibration data, over whole sampling trajectories. Without one, a single
            quantized layer stays as it is, with a warning: see :func:`modelopt_tdq.diffusers_config`.
        config: Of the calibration.

    Returns:
        A sample of the calls; None for a single layer.

    Raises:
        TdqError: ``forward_loop`` is missing, never runs, visits a single time, or meets NaN or infinity;
            a field, pattern or number format cannot be used; or it failed in another process (see
            :func:`modelopt_tdq.core.together.together`). The model is left as it was.
    """
    if forward_loop is None and isinstance(model, QuantModule):
        warnings.warn(_LONE_LAYER, stacklevel=2)
        return None
    with restored_on_error(model), together("tdq"):
        forget_learning(model)
        forget_layer_correction(model)
        watch_training(model)
        calibration = collect(model, forward_loop, config)
        follow = temporal_names(config.temporal, list(calibration.quantizers))
        temporal: Columns = {n: columns(e, config, n in follow) for n, e in calibration.evidence.items()}
        if config.protect_steps and config.bins != 1:
            static = {n: columns(e, config, False) for n, e in calibration.evidence.items()}
            temporal, _ = protected_rows(
                model, calibration.quantizers, calibration.replay, calibration.times, temporal, static, config.progress
            )
        install(model, calibration.quantizers, torch.tensor(calibration.times), temporal)
    warn_of_unquantized_layers(model)
    return calibration.replay
