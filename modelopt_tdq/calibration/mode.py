"""Registration with ModelOpt: the calibration mode ``tdq_calibrate``, saved and restored like ModelOpt's own."""

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

__all__ = ["register"]


def _restore(model: nn.Module, config: TdqCalibConfig, metadata: dict[str, Any]) -> nn.Module:
    states = metadata.get("quantizer_state", {})
    timestep = deliver_timestep(model, config.timestep_argument)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and states.get(name, {}).get("_is_temporal_quantizer"):
            TemporalQuantizer.from_tensor_quantizer(module, timestep)
    restored: nn.Module = restore_quantizer_state(model, config, metadata)
    return restored


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


def register() -> None:
    """Register the mode; harmless when done before."""
    if "tdq_calibrate" not in CalibrateModeRegistry:
        CalibrateModeRegistry.register_mode(TdqCalibrateModeDescriptor)
