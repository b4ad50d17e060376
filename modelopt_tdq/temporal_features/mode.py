"""The ``tdq_temporal`` algorithm, and its registration with ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.opt.mode import ConvertEntrypoint, RestoreEntrypoint, UpdateEntrypoint
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from modelopt.torch.quantization.mode import CalibrateModeRegistry
from torch import nn

from modelopt_tdq.calibration.calibrate import tdq_calibrate
from modelopt_tdq.calibration.snapshot import restored_on_error
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.errors import TdqError
from modelopt_tdq.recording import recorded_calls
from modelopt_tdq.temporal_features.config import TdqTemporalConfig
from modelopt_tdq.temporal_features.maintain import maintain
from modelopt_tdq.temporal_features.runtime import (
    has_features,
    restore_features,
    temporal_features,
    uninstall_features,
)
from modelopt_tdq.temporal_features.saved_state import DESCRIPTION
from modelopt_tdq.training.mode import LearningModeDescriptor, SavedName, restore, update_metadata

__all__ = ["register", "tdq_temporal"]


def tdq_temporal(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate a ModelOpt-quantized model, and maintain its temporal features.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: As for :func:`modelopt_tdq.calibration.calibrate.tdq_calibrate`.
        **fields: Fields of :class:`TdqTemporalConfig`.

    Raises:
        TdqError: As calibration; or the model has no temporal block, or a glob matches nothing of it. The model is left
            as it was.
    """
    config = TdqTemporalConfig(**{name: v for name, v in fields.items() if name in TdqTemporalConfig.model_fields})
    with restored_on_error(model):
        if has_features(model):
            uninstall_features(model)
        call: dict[str, Any] = {}

        def recorded(module: nn.Module) -> None:
            with recorded_calls(module, most=1) as calls:
                forward_loop(module)  # type: ignore[misc]
            call.update(calls[0] if calls else {})

        loop = None if forward_loop is None else recorded
        if config.recalibrate:
            fields = {name: getattr(config, name) for name in CalibrationFields.model_fields if name != "method"}
            tdq_calibrate(model, loop, **fields)
        elif loop is None:
            raise TdqError("forward_loop", None, "a call of the model is needed", "Pass a forward_loop to mtq.quantize")
        else:
            with torch.no_grad():
                loop(model)
        if not call:
            raise TdqError(
                "forward_loop", forward_loop, "it never called the model", "Call the model on calibration data in it"
            )
        with torch.inference_mode(False):  # tensors made in inference mode cannot be learned on
            maintain(model, call, config)


def _update(model: nn.Module, config: QuantizeAlgorithmConfig, metadata: dict[str, Any]) -> None:
    update_metadata(model, config, metadata)
    if has_features(model):
        metadata[DESCRIPTION] = temporal_features(model).description
    else:
        metadata.pop(DESCRIPTION, None)


def _restore(model: nn.Module, config: CalibrationFields, metadata: dict[str, Any]) -> nn.Module:
    restored = restore(model, config, metadata)
    if DESCRIPTION in metadata:
        restore_features(restored, metadata[DESCRIPTION])
    elif has_features(restored):  # of an algorithm before this one
        uninstall_features(restored)
    return restored


class TdqTemporalModeDescriptor(LearningModeDescriptor):
    """Mode of the algorithm ``{"method": "tdq_temporal"}``."""

    _calib_func = tdq_temporal
    _config = TdqTemporalConfig

    @property
    def convert(self) -> ConvertEntrypoint:
        """As for all algorithms. The description of the features is part of it: in a list, nobody asks again."""
        convert = super().convert

        def converted(model: nn.Module, config: CalibrationFields, **arguments: Any) -> Any:
            model, metadata = convert(model, config, **arguments)
            _update(model, config, metadata)
            return model, metadata

        return converted

    @property
    def restore(self) -> RestoreEntrypoint:
        """Build the layers that look up what was saved."""
        return _restore

    @property
    def update_for_save(self) -> UpdateEntrypoint:
        """With the description of the features."""
        return _update

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """Likewise."""
        return _update


class SavedTdqTemporalModeDescriptor(SavedName, TdqTemporalModeDescriptor):
    """The same mode, found by the name in saved states."""


def register() -> None:
    """Register the mode; harmless when done before."""
    for mode in (TdqTemporalModeDescriptor, SavedTdqTemporalModeDescriptor):
        name = mode().name
        if not CalibrateModeRegistry.contained_in_any(name):
            CalibrateModeRegistry.register_mode(mode)
