"""Scales of the weights, by ModelOpt's own calibration."""

from __future__ import annotations

import torch.distributed as dist
from modelopt.torch.quantization.model_calib import max_calibrate, mse_calibrate
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback
from modelopt.torch.utils.distributed import is_dtensor_sharded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from modelopt_tdq.model.select import weight_quantizers

__all__ = ["calibrate_weights"]


def calibrate_weights(model: nn.Module, method: str) -> None:
    """Let ModelOpt calibrate the enabled weight quantizers: ``max``, ``mse``, or ``keep`` them as they are.

    Where tensor parallelism spreads a channel over processes, its scale is the largest that any of them finds.
    """
    if method == "keep":
        return
    weights = [m for q in weight_quantizers(model) for m in q.modules() if isinstance(m, TensorQuantizer)]
    calibrators = [quantizer._calibrator for quantizer in weights]
    # ModelOpt takes the processes of a layer for copies of each other, unless a plugin of it tells otherwise, and would
    # mix the scales of the channels that DTensors spread over them
    spread = is_dtensor_sharded(model)
    {"max": max_calibrate, "mse": mse_calibrate}[method](model, forward_loop=None, distributed_sync=not spread)
    if spread:
        _share_channels(model)
    # ModelOpt's mse leaves spent calibrators behind, which the next calibration would trip over
    for quantizer, calibrator in zip(weights, calibrators, strict=True):
        quantizer._calibrator = calibrator
        if calibrator is not None:
            calibrator.reset()


def _share_channels(model: nn.Module) -> None:
    names = dict(model.named_modules())
    for module in names.values():
        if not isinstance(module, QuantModule):
            continue
        with enable_weight_access_and_writeback(module, model, names, writeback=False):  # whole again, if by FSDP
            for weight, quantizer in module.iter_weights_for_calibration():
                for inner in quantizer.modules():
                    if isinstance(weight, DTensor) and isinstance(inner, TensorQuantizer) and inner.is_enabled:
                        _share_channel(weight, inner)


def _share_channel(weight: DTensor, quantizer: TensorQuantizer) -> None:
    amax: Tensor | None = getattr(quantizer, "_amax", None)
    if amax is None or quantizer.block_sizes is not None:  # a block lies in one process
        return
    axis = quantizer.axis
    kept = {a % weight.dim() for a in ((axis,) if isinstance(axis, int) else axis or ())}
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard) and placement.dim % weight.dim() not in kept:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=weight.device_mesh.get_group(dimension))
