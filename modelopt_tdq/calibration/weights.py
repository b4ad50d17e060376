"""Scales of the weights, by ModelOpt's own calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from modelopt.torch.quantization.model_calib import max_calibrate, mse_calibrate
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback
from modelopt.torch.utils.distributed import is_dtensor_sharded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from modelopt_tdq.core.fake_quant import FP8_E4M3
from modelopt_tdq.model.place import readable_for_modelopt
from modelopt_tdq.model.select import weight_quantizers
from modelopt_tdq.model.weight_fit import remember_weights

__all__ = ["calibrate_weights"]


class _Grid(NamedTuple):
    """Multiples of the largest magnitude, evenly spaced; 1 is always among them, so `mse` is never below `max`."""

    start: float
    step: float
    stop: float = 1.0


#: What `mse` tries for each number format. The more codes, the less there is to gain from clipping: at 8 bits 0.02 dB
#: on the bundled UNet with steps of 0.025, and 0.06 dB with steps of 0.01, which is not worth passes over the weights.
_GRIDS: dict[Any, _Grid] = {
    7: _Grid(0.9, 0.025),
    6: _Grid(0.8, 0.025),
    5: _Grid(0.6, 0.04),
    4: _Grid(0.4, 0.02),
    3: _Grid(0.2, 0.05),
    2: _Grid(0.2, 0.05),
    # the error of a float format repeats, nearly, whenever the scale doubles; nothing clips on the way up
    FP8_E4M3: _Grid(1.0, 0.0625, 2.0),
}

#: Of formats that are not listed, such as FP4 in blocks, whose largest codes lie so far apart that more than the
#: largest magnitude may pay.
_OTHER = _Grid(0.25, 0.125, 2.0)


def _grid(num_bits: Any) -> _Grid | None:
    """What is tried for a number format; None: nothing but the largest magnitude."""
    return None if isinstance(num_bits, int) and num_bits >= 8 else _GRIDS.get(num_bits, _OTHER)


@contextmanager
def _alone(chosen: list[TensorQuantizer], weights: list[TensorQuantizer]) -> Iterator[None]:
    """All other weight quantizers off. ModelOpt's mse leaves spent calibrators behind, which are put back as well."""
    rest = [q for q in weights if q.is_enabled and not any(q is own for own in chosen)]
    calibrators = [quantizer._calibrator for quantizer in chosen]
    for quantizer in rest:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in rest:
            quantizer.enable()
        for quantizer, calibrator in zip(chosen, calibrators, strict=True):
            quantizer._calibrator = calibrator


def calibrate_weights(model: nn.Module, method: str, *, remember: bool = True) -> None:
    """Let ModelOpt calibrate the enabled weight quantizers.

    Args:
        model: Converted by ``mtq.quantize``.
        method: ``max``: the largest magnitude of each channel. ``mse``: that multiple of it which has the least squared
            error on the grid of the number format (up to 1 for integers); at 8 bits, ``max``. ``keep``: as they are.
        remember: What the weights are like, so that it is noticed when they change.

    Where tensor parallelism spreads a channel over processes, its scale is the largest that any of them finds.
    """
    if method != "keep":
        _calibrate(model, method)
    if remember:
        remember_weights(model, method)


def _calibrate(model: nn.Module, method: str) -> None:
    weights = [m for q in weight_quantizers(model) for m in q.modules() if isinstance(m, TensorQuantizer)]
    # ModelOpt takes the processes of a layer for copies of each other, unless a plugin of it tells otherwise, and would
    # mix the scales of the channels that DTensors spread over them
    spread = is_dtensor_sharded(model)
    with readable_for_modelopt(model):
        max_calibrate(model, forward_loop=None, distributed_sync=not spread)
    formats = {quantizer.num_bits for quantizer in weights if quantizer.is_enabled} if method == "mse" else set()
    for num_bits in sorted(formats, key=repr):
        grid = _grid(num_bits)
        if grid is not None:
            with _alone([q for q in weights if q.num_bits == num_bits], weights), readable_for_modelopt(model):
                mse_calibrate(
                    model,
                    forward_loop=None,
                    distributed_sync=not spread,
                    step_size=grid.step,
                    start_multiplier=grid.start,
                    stop_multiplier=grid.stop,
                )
    if spread:
        _share_channels(model)
    for quantizer in weights:
        if quantizer._calibrator is not None:
            quantizer._calibrator.reset()


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
