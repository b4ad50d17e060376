"""The ``tdq_temporal`` algorithm: calibrate, then maintain what depends on the time alone.

Weights are rounded by what their layers read, and outputs corrected, as ``tdq`` does it: those of the other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.utils.distributed import is_dtensor_sharded
from torch import nn

from modelopt_tdq.calibration.calibrate import calibrate_scales
from modelopt_tdq.calibration.compensated_rounding import compensated_rounding
from modelopt_tdq.calibration.correct import correct_layers
from modelopt_tdq.core.distributed import broadcast, gather
from modelopt_tdq.core.together import together
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.caches import require_no_cache
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.recording import recorded_calls
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.temporal_features.config import TdqTemporalConfig
from modelopt_tdq.temporal_features.maintain import maintain, set_apart
from modelopt_tdq.temporal_features.runtime import has_features, uninstall_features

__all__ = ["tdq_temporal"]


def tdq_temporal(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate a ModelOpt-quantized model, and maintain its temporal features.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: As for :func:`modelopt_tdq.calibration.calibrate.calibrate_scales`.
        **fields: Fields of :class:`TdqTemporalConfig`.

    Raises:
        TdqError: As calibration; or the model has no temporal block, or a glob matches nothing of it. The model is left
            as it was.
    """
    config = TdqTemporalConfig(**{name: v for name, v in fields.items() if name in TdqTemporalConfig.model_fields})
    require_no_cache(model, "have its temporal block found")
    require_weights(model, "have its temporal block found")
    with restored_on_error(model), together("tdq_temporal"):
        if is_dtensor_sharded(model):
            raise TdqError(
                "model",
                type(model).__name__,
                "its parameters are spread over processes, and its temporal layers cannot run by themselves",
                "Maintain temporal features before `fully_shard`",
            )
        if has_features(model):
            uninstall_features(model)
        call: dict[str, Any] = {}

        def recorded(module: nn.Module) -> None:
            with recorded_calls(module, most=1) as calls:
                forward_loop(module)  # type: ignore[misc]
            call.update(calls[0] if calls else {})

        loop = None if forward_loop is None else recorded
        replay = None
        if config.recalibrate:
            replay = calibrate_scales(model, loop, config)
        elif loop is None:
            raise TdqError("forward_loop", None, "a call of the model is needed", "Pass a forward_loop to mtq.quantize")
        else:
            with torch.no_grad():
                loop(model)
        called = [rank for rank, seen in enumerate(gather(bool(call))) if seen]
        if not called:
            raise TdqError(
                "forward_loop", forward_loop, "it never called the model", "Call the model on calibration data in it"
            )
        call = broadcast(call, called[0])  # all find the same features, and compute the same
        with torch.inference_mode(False):  # tensors made in inference mode cannot be learned on
            apart = set_apart(model, call, config)
            if replay is not None:
                with compensated_rounding(model, replay, config):
                    correct_layers(model, replay, config)
            maintain(model, apart, config)
