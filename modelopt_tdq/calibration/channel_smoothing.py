"""Smoothing over channels (SmoothQuant, Xiao et al. 2023), of linear layers and of convolutions.

    y = w x = (w c) (x / c),    c_j = max|x_j|^a / max|w_j|^(1 - a)    per input channel j

A few channels with large values cost all others their codes. Dividing them moves the difficulty into the weights, whose
codes have scales of their own. x is divided where it is quantized, by the product of c and the scale
(:meth:`modelopt_tdq.core.scales.Scales.over_channels`), w is multiplied before it is calibrated. max|x_j| is over all
calibrated times. Padding stays exact, since zero divided is zero.

Layers that read the same tensor share a vector (q, k, v; the shortcut and the first convolution of a block), with
max|w_j| over all of them: the tensor is divided once. ``auto`` chooses for each tensor a strength a, or a vector that
balances errors of activation and weights in another way (:func:`modelopt_tdq.calibration.smoothed_layer.balanced`), or
none.

``channel_shift`` subtracts v_j, the middle of the channel's range, from the quotients before they are quantized, and
adds w c v to the output (Outlier Suppression+, Wei et al. 2023): a channel whose values lie far from zero on one side
needs no range for the other. The input of a convolution that pads is not shifted: its zeros would have no code.

Attention products have no weights to multiply, and stay as they are; so do transposed convolutions, and layers whose
weight other modules use too.

The calibration data are run once for the ranges of x_j and for the scales of all activations, and once more for the
scales of those that were smoothed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from modelopt_tdq.calibration.channel_ranges import shared_ranges
from modelopt_tdq.calibration.chosen_smoothing import chosen_maps, given_kind
from modelopt_tdq.calibration.smoothed_layer import ChannelMap, SmoothedLayer, shared_map, smooth
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.core.distributed import gather, union
from modelopt_tdq.core.joined import Joined
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.intact import writes
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import PRODUCTS, shared_parameters, trailing_dimensions
from modelopt_tdq.model.stored_weight import at_rest, sharded_layers
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["Channels", "smooth_channels", "undo_channel_smoothing"]

_log = logging.getLogger(__name__)


def _layers(model: nn.Module, quantizers: dict[str, TensorQuantizer], automatic: bool) -> list[SmoothedLayer]:
    """Those whose input quantizer is one of ``quantizers``, and whose weight is theirs alone."""
    shared, sharded = shared_parameters(model), sharded_layers(model)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule) or not isinstance(module, PRODUCTS):
            continue
        weight = module._parameters.get("weight")
        if quantizers.get(f"{name}.input_quantizer") is None or weight is None or id(weight) in shared:
            continue
        if weight.dim() != 2 + trailing_dimensions(module):
            continue  # compressed
        if isinstance(weight, DTensor) and module not in sharded:
            if automatic:
                continue
            raise TdqError(
                "channel_smoothing",
                name,
                "the channels of this weight are spread over processes",
                'Smooth and calibrate before the model is sharded, or set "channel_smoothing": "none"',
            )
        found.append(SmoothedLayer(name, module))
    return found


def _require_plain(model: nn.Module, config: CalibrationFields) -> None:
    """Raise where channels cannot be smoothed, or are already."""
    if config.weights == "keep":
        raise TdqError(
            "channel_smoothing",
            config.channel_smoothing,
            'it changes the weights, and "weights": "keep" says that their scales stay',
            'Use "weights": "max" or "mse", or "channel_smoothing": "none"',
        )
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and getattr(module, "pre_quant_scale", None) is not None:
            raise TdqError(
                "channel_smoothing",
                config.channel_smoothing,
                f"the input of {name} has a pre_quant_scale already, as of ModelOpt's smoothquant or awq",
                'Take the other algorithm out of "algorithm", or set "channel_smoothing": "none"',
            )


class _Readers:
    """Which layers read the same tensor, over all calls of the model."""

    def __init__(self, layers: int) -> None:
        self._joined = Joined(layers)
        self._readers: dict[Any, tuple[StorageWeakRef, int]] = {}

    def read(self, number: int, trailing: int, x: Tensor) -> None:
        """Layer ``number`` reads ``x``: the same as an earlier one, if the same memory has not been written since."""
        # as long as it is kept, no other memory has its address
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        key = storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, writes(x), trailing
        known = self._readers.setdefault(key, (storage, number))
        self._joined.join(known[1], number)

    def next_call(self) -> None:
        """A call of the model is over."""
        self._readers.clear()

    def groups(self) -> list[list[int]]:
        """Numbers of the layers that share a vector; the same in all processes."""
        for groups in gather(self._joined.groups()):
            self._joined.join_all(groups)
        return self._joined.groups()


class Channels:
    """The layers whose input channels may be smoothed, and what a run of the model shows of these inputs.

    Args:
        model: Quantized by ``mtq.quantize``.
        quantizers: The enabled activation quantizers with one scale per tensor, by name.
        config: Its ``channel_smoothing`` is the strength a, ``auto``, or ``none``.

    Raises:
        TdqError: The weights' scales are to be kept, or tensor parallelism spreads weights over processes; or a
            quantizer has a ``pre_quant_scale`` of ModelOpt's. Where ``auto`` is to choose, it chooses not to smooth.
    """

    def __init__(self, model: nn.Module, quantizers: dict[str, TensorQuantizer], config: CalibrationFields) -> None:
        self._layers: list[SmoothedLayer] = []
        self._readers = _Readers(0)
        self._over_time = config.channel_shift != "none"
        if config.channel_smoothing == "none" and config.channel_shift == "none":
            return
        automatic = config.channel_smoothing in ("none", "auto")
        try:
            _require_plain(model, config)
        except TdqError as error:
            if not automatic:
                raise
            _log.info("no channels smoothed: %s", error)
            return
        at_rest(model)
        self._layers = _layers(model, quantizers, automatic)
        self._readers = _Readers(len(self._layers))

    @contextmanager
    def observed(self, model: nn.Module, timestep: CurrentTimestep) -> Iterator[None]:
        """While ``model`` runs, find the ranges of the layers' inputs, and who shares one."""

        def hook(number: int) -> Callable[..., None]:
            layer = self._layers[number]

            def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if x.numel() == 0 or timestep.aside:
                    return
                time = timestep.value if self._over_time else None
                if time is None or time.dim() > 1:  # tokens have times of their own
                    time = torch.zeros(1)
                layer.ranges.see(layer.by_channel(x), time)
                self._readers.read(number, layer.trailing, x)

            return observe

        def over(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._readers.next_call()

        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stack.callback(layer.quantizer.register_forward_pre_hook(hook(number)).remove)
            if self._layers:
                stack.callback(model.register_forward_hook(over).remove)
            yield

    def undo(self, timestep: CurrentTimestep) -> None:
        """Give all layers their weights back, and their inputs as they are."""
        for layer in self._layers:
            layer.smooth(ChannelMap(), timestep)

    def groups(self) -> list[list[SmoothedLayer]]:
        """The layers whose inputs are not only zeros, those that read the same tensor together; over all processes."""
        for layer in self._layers:
            layer.agree()
        groups = [[self._layers[number] for number in group] for group in self._readers.groups()]
        return [group for group in groups if not all(layer.ranges.is_nothing for layer in group)]


def smooth_channels(
    model: nn.Module,
    channels: Channels,
    quantizers: dict[str, TensorQuantizer],
    replay: Replay,
    timestep: CurrentTimestep,
    config: CalibrationFields,
) -> list[str]:
    """Divide the input channels of linear layers and convolutions, and multiply their weights.

    Args:
        model: Quantized by ``mtq.quantize``.
        channels: That it was observed with.
        quantizers: The enabled activation quantizers with one scale per tensor, by name.
        replay: A sample of its calls, for ``auto``.
        timestep: Of the model.
        config: Its ``channel_smoothing`` is the strength a, ``auto``, or ``none``; ``channel_shift`` likewise.

    Returns:
        Names of the quantizers whose input is divided or shifted now, and whose scales have to be found anew.
    """
    groups = channels.groups()
    if not groups:
        return []
    automatic = "auto" in (config.channel_smoothing, config.channel_shift)
    if automatic and union(set(replay.times)):
        maps = chosen_maps(model, groups, quantizers, replay, timestep, config)
    else:
        if automatic:
            _log.info("nothing is chosen for channels: the model's calls cannot be repeated")
        ranges = [shared_ranges([layer.ranges for layer in group]) for group in groups]
        maps = [shared_map(group, given_kind(config), own) for group, own in zip(groups, ranges, strict=True)]
    smooth(groups, maps, timestep)
    pairs = zip(groups, maps, strict=True)
    return [f"{layer.name}.input_quantizer" for group, done in pairs if not done.is_identity for layer in group]


def undo_channel_smoothing(model: nn.Module) -> None:
    """Give the layers of ``model`` back the weights that they had, but for rounding, and the inputs as they are.

    The scales of both no longer fit.
    """
    for name, module in model.named_modules():
        quantizer: Any = getattr(module, "input_quantizer", None)
        if not isinstance(quantizer, TemporalQuantizer):
            continue
        divisor = quantizer.channel_divisor
        if divisor is not None:
            layer = SmoothedLayer(name, module)
            layer.replace(layer.multiplied(1.0 / divisor.flatten()))
        if divisor is not None or quantizer.channel_shift is not None:
            quantizer.set_channels(None)
