"""Registration with ModelOpt: the calibration mode ``tdq_calibrate``, saved and restored like ModelOpt's own.

A saved model needs ``import modelopt_tdq`` before it is restored: ModelOpt does not discover plugins. All
that ModelOpt says otherwise is "KeyError: Mode <name> not found in any registry", with the name from the
saved state. So the state carries a name that holds the cure, under which the mode is registered as well.
"""

from __future__ import annotations

from typing import Any

from modelopt.torch.opt.mode import RestoreEntrypoint
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from modelopt.torch.quantization.conversion import restore_quantizer_state
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.calibration.calibrate import tdq_calibrate
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.quantizer import TemporalQuantizer
from modelopt_tdq.timestep import deliver_timestep

__all__ = ["SAVED_NAME", "register", "saved_name"]


def _restore(model: nn.Module, config: TdqCalibConfig, metadata: dict[str, Any]) -> nn.Module:
    states = metadata.get("quantizer_state", {})
    timestep = deliver_timestep(model, config.timestep_argument)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and states.get(name, {}).get("_is_temporal_quantizer"):
            TemporalQuantizer.from_tensor_quantizer(module, timestep)
    restored: nn.Module = restore_quantizer_state(model, config, metadata)
    return restored


def saved_name(method: str) -> str:
    """The name of an algorithm's mode in saved states."""
    return f"{method}_calibrate (run `import modelopt_tdq` before restoring)"


SAVED_NAME = saved_name("tdq")


class TdqCalibrateModeDescriptor(BaseCalibrateModeDescriptor):  # type: ignore[misc]
    """Mode of the algorithm ``{"method": "tdq"}``."""

    _calib_func = tdq_calibrate
    _supports_layerwise = False

    @property
    def config_class(self) -> type[QuantizeAlgorithmConfig]:
        """Config of the algorithm."""
        return TdqCalibConfig

    @property
    def restore(self) -> RestoreEntrypoint:
        """Make the saved quantizers temporal before ModelOpt fills them."""
        return _restore

    def __str__(self) -> str:
        """The name that ModelOpt saves."""
        return SAVED_NAME


class SavedModeDescriptor(TdqCalibrateModeDescriptor):
    """The same mode, found by the name in saved states."""

    @property
    def name(self) -> str:
        """See :data:`SAVED_NAME`."""
        return SAVED_NAME


def register() -> None:
    """Register the mode; harmless when done before."""
    for name, mode in (("tdq_calibrate", TdqCalibrateModeDescriptor), (SAVED_NAME, SavedModeDescriptor)):
        if not CalibrateModeRegistry.contained_in_any(name):
            CalibrateModeRegistry.register_mode(mode)
