"""Registration of the learning algorithms with ModelOpt, and what a saved model needs to be restored."""

from __future__ import annotations

from typing import Any, ClassVar

from modelopt.torch.opt.mode import RestoreEntrypoint, UpdateEntrypoint
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from modelopt.torch.quantization.conversion import restore_quantizer_state, update_quantize_metadata
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.calibration.mode import saved_name
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.quantizer import TemporalQuantizer
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.reconstruct import tdq_reconstruct
from modelopt_tdq.timestep import INTERVALS, deliver_timestep
from modelopt_tdq.training.attach import as_learned, install_intervals, tdq_qat
from modelopt_tdq.training.config import TdqQatConfig
from modelopt_tdq.training.learned import LearnedIntervals
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["LearningModeDescriptor", "SavedName", "register", "restore", "update_metadata"]

_DESCRIPTION = "tdq_learning"


def update_metadata(model: nn.Module, config: QuantizeAlgorithmConfig, metadata: dict[str, Any]) -> None:
    """What ModelOpt saves, and how to build the source of the intervals again."""
    update_quantize_metadata(model, config, metadata)
    learned = model._modules.get(INTERVALS)
    if isinstance(learned, LearnedIntervals):
        metadata[_DESCRIPTION] = learned.description
    else:
        metadata.pop(_DESCRIPTION, None)


def restore(model: nn.Module, config: CalibrationFields, metadata: dict[str, Any]) -> nn.Module:
    """Make the saved quantizers what they were, before ModelOpt fills them."""
    states = metadata.get("quantizer_state", {})
    timestep = deliver_timestep(model, config.timestep_argument)
    for name, module in model.named_modules():
        state = states.get(name, {})
        if not isinstance(module, TensorQuantizer):
            continue
        if state.get("_is_temporal_quantizer"):
            TemporalQuantizer.from_tensor_quantizer(module, timestep)
        if state.get("_learns"):
            as_learned(module, state["_learns"]).training = model.training
        if state.get("_learns_weight_scale"):
            module.__class__ = LearnedWeightQuantizer
    restored: nn.Module = restore_quantizer_state(model, config, metadata)
    if _DESCRIPTION in metadata:
        install_intervals(restored, metadata[_DESCRIPTION])
    return restored


class LearningModeDescriptor(BaseCalibrateModeDescriptor):  # type: ignore[misc]
    """Mode of an algorithm that learns; a subclass sets ``_calib_func`` and ``_config``."""

    _supports_layerwise = False
    _config: ClassVar[type[CalibrationFields]]

    @property
    def config_class(self) -> type[QuantizeAlgorithmConfig]:
        """Config of the algorithm."""
        return self._config

    @property
    def restore(self) -> RestoreEntrypoint:
        """See :func:`restore`."""
        return restore

    @property
    def update_for_save(self) -> UpdateEntrypoint:
        """See :func:`update_metadata`."""
        return update_metadata

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """Likewise."""
        return update_metadata

    def __str__(self) -> str:
        """The name that ModelOpt saves."""
        return saved_name(self._config().method)


class SavedName:
    """Makes a mode be found by the name in saved states."""

    @property
    def name(self) -> str:
        """The name in saved states."""
        return str(self)


class TdqQatModeDescriptor(LearningModeDescriptor):
    """Mode of the algorithm ``{"method": "tdq_qat"}``."""

    _calib_func = tdq_qat
    _config = TdqQatConfig


class SavedTdqQatModeDescriptor(SavedName, TdqQatModeDescriptor):
    """The same mode, found by the name in saved states."""


class TdqReconstructModeDescriptor(LearningModeDescriptor):
    """Mode of the algorithm ``{"method": "tdq_reconstruct"}``."""

    _calib_func = tdq_reconstruct
    _config = TdqReconstructConfig


class SavedTdqReconstructModeDescriptor(SavedName, TdqReconstructModeDescriptor):
    """The same mode, found by the name in saved states."""


_MODES = (
    TdqQatModeDescriptor,
    SavedTdqQatModeDescriptor,
    TdqReconstructModeDescriptor,
    SavedTdqReconstructModeDescriptor,
)


def register() -> None:
    """Register the modes; harmless when done before."""
    for mode in _MODES:
        name = mode().name
        if not CalibrateModeRegistry.contained_in_any(name):
            CalibrateModeRegistry.register_mode(mode)
