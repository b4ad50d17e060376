"""The temporal features in the state that ModelOpt saves with a model.

ModelOpt asks the last mode of a model alone what to save. Features may be those of an earlier one, and may come and go
after ``mtq.quantize``, so their description is put where restoring looks for it: with the last ``tdq_temporal``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.mode import CalibrateModeRegistry
from torch import nn

__all__ = ["DESCRIPTION", "describe_in_state"]

#: Key of the description in the metadata of a mode.
DESCRIPTION = "tdq_temporal_features"

_MODE = "tdq_temporal_calibrate"


def describe_in_state(model: nn.Module, description: Mapping[str, Any] | None) -> None:
    """Let the saved state of ``model`` say what features it has now.

    Args:
        model: The root; nothing is done if ModelOpt has not converted it.
        description: That of its :class:`~modelopt_tdq.temporal_features.module.TemporalFeatures`; None if it has none.
    """
    if not hasattr(model, ModeloptStateManager._state_key):
        return
    manager = ModeloptStateManager(model)
    mode = CalibrateModeRegistry.get_from_any(_MODE)
    for _, state in manager.state_dict():
        state["metadata"].pop(DESCRIPTION, None)
    if description is None:
        return
    own = [state["metadata"] for name, state in manager.state_dict() if name == str(mode)]
    if not own:
        config = mode.config_class(timestep_argument=description["timestep_argument"])
        manager.update_last_state_before_new_mode(model)
        manager.add_mode(mode, config, {})
        own = [manager.state_dict()[-1][1]["metadata"]]
        mode.update_for_save(model, config, own[0])
    own[-1][DESCRIPTION] = description
