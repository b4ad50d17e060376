"""Rounding of the weights of linear layers and convolutions by what their inputs are like: GPTQ.

Each layer's codes are those for which its outputs, over replayed inputs of all times, differ least: see
:mod:`modelopt_tdq.core.compensated`. ModelOpt's own gptq does so for linear layers. Here convolutions are rounded as
well, whose inputs are patches, and the means of the inputs count for little:
:mod:`modelopt_tdq.calibration.input_covariance`.

While corrections are fitted, the original weights are still what full precision means. Then the rounded values become
the weights: whatever quantizes them finds the very same codes.

``auto`` finds the codes from one half of the samples, and leaves layers alone that fare no better on the other half.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.input_covariance import BlockOfInputs, InputCovariance
from modelopt_tdq.calibration.output_error import run_probes
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.core.compensated import compensated, output_error
from modelopt_tdq.core.distributed import gather, union
from modelopt_tdq.core.fake_quant import symmetric_scale
from modelopt_tdq.core.time_weights import squared_weights
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.held_weights import HeldWeight, own_weights
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import PRODUCTS
from modelopt_tdq.model.stored_weight import kept, like_kept, replace_weight, whole
from modelopt_tdq.model.weight_fit import remember_weight

__all__ = ["compensated_rounding"]

_log = logging.getLogger(__name__)

#: What a layer reads, block by block.
Inputs = Sequence[BlockOfInputs]

#: Numbers of the inputs' covariance that are kept at once: 1 GiB. More takes another pass over the replayed calls.
_KEPT = 1 << 28


def _layers(model: nn.Module) -> dict[str, QuantModule]:
    """Those whose weights have integer codes or FP8, a scale per output channel or one, and no other user."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[layer]: layer
        for layer, (weight, quantizer) in own_weights(model, elsewhere=True).items()
        if isinstance(layer, PRODUCTS) and quantizer.amax.numel() in (1, weight.shape[0])
    }


def _layers_to_round(model: nn.Module, replay: Replay, config: CalibrationFields) -> dict[str, QuantModule]:
    """Those that ``config`` wants rounded by their inputs, by name.

    Raises:
        TdqError: They cannot be, and are not left to ``auto``.
    """
    automatic = config.rounding == "auto"
    if config.rounding == "nearest" or (automatic and config.weights == "keep"):
        return {}
    layers = _layers(model)
    reason = _unfit(replay) if layers else None
    if reason is None:
        return layers
    if not automatic:
        raise TdqError("rounding", config.rounding, reason, 'Use "rounding": "nearest"')
    _log.info("weights rounded to the nearest: %s", reason)
    return {}


def _unfit(replay: Replay) -> str | None:
    """Why no weights can be rounded so; None if they can."""
    if not union(set(replay.times)):
        return "the model's calls cannot be repeated"
    if not all(gather(replay.takes_part)):
        return "some process made no call of the model"
    if not all(gather(replay.is_first)):
        return "several processes compute the same samples together"
    return None


class _Rounding:
    """The weight of one layer, and what it may be rounded to."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        weight, quantizer = whole(kept(layer)).to(execution_device(layer)), layer.weight_quantizer
        groups = int(getattr(layer, "groups", 1))
        self._shape, self._dtype = weight.shape, weight.dtype
        self._weight = weight.float().reshape(groups, -1, weight[0].numel())
        amax = quantizer.amax.detach().float().to(weight.device)
        scale = symmetric_scale(amax, quantizer.num_bits)
        self._scale = scale.reshape((groups, -1, 1) if amax.numel() > 1 else (1, 1, 1))

    def nearest(self) -> Tensor:
        """What ModelOpt makes of the weight."""
        return self._quantized(self._weight)

    def _quantized(self, values: Tensor) -> Tensor:
        quantized: Tensor = self._layer.weight_quantizer(values.reshape(self._shape).to(self._dtype))
        return quantized.detach()

    def compensated(self, *known: Inputs) -> list[Tensor]:
        """For each of some inputs: values, of the weight's shape and dtype, that ModelOpt leaves as they are."""
        bits, blocks = self._layer.weight_quantizer.num_bits, [block.inputs for block in known[0]]
        groups, device = len(self._weight), self._weight.device
        parts: list[list[Tensor]] = [[self._weight[:, :, block] for block in blocks] for _ in known]
        # all blocks of one size at once, and for all inputs
        for size in {block.stop - block.start for block in blocks}:
            chosen = [i for i, block in enumerate(blocks) if block.stop - block.start == size]
            weight = torch.cat([part[i] for part in parts for i in chosen])
            seen = [inputs[i].to(device) for inputs in known for i in chosen]
            products = torch.cat([block.products for block in seen])
            coarse = [block.crossed for block in seen if block.crossed is not None]
            scale = self._scale.expand(groups, -1, -1).repeat(len(weight) // groups, 1, 1)
            found = compensated(weight, scale, products, bits, torch.cat(coarse) if coarse else None)
            solved = iter(found.reshape(-1, groups, *weight.shape[1:]))
            for part in parts:
                for i in chosen:
                    part[i] = next(solved)
        return [self._quantized(torch.cat(part, 2)) for part in parts]

    def error(self, values: Tensor, inputs: Inputs) -> float:
        """Of the layer's outputs, if its weight had these values; less what no values change."""
        values, total = values.float().reshape(self._weight.shape), 0.0
        for block in inputs:
            seen, part = block.to(self._weight.device), (slice(None), slice(None), block.inputs)
            total += float(output_error(self._weight[part], values[part], seen.products, seen.crossed))
        return total


def _observed(
    model: nn.Module, layers: Mapping[str, QuantModule], replay: Replay, config: CalibrationFields
) -> dict[str, list[Inputs]]:
    """What each layer reads, over all samples or each half of them."""
    times = union(set(replay.times))
    numbers = gather({time: len(replay.samples(time)) for time in replay.times})
    samples = len(times) * max(sum(own.get(time, 0) for own in numbers) for time in times)
    halves, weights = config.rounding == "auto", squared_weights(config.time_weights, times).tolist()
    probes = {name: InputCovariance(layer, samples, halves, replay.turns, weights) for name, layer in layers.items()}
    pairs = [(layers[name], probe) for name, probe in probes.items()]
    with replay.turns.used():
        run_probes(model, pairs, replay, times, "inputs", config.progress)
    return {name: list(probe.sums()) for name, probe in probes.items()}


def _portions(layers: Mapping[str, QuantModule], copies: int) -> Iterator[dict[str, QuantModule]]:
    """``layers`` in portions whose covariances fit into memory, ``copies`` times."""
    portion: dict[str, QuantModule] = {}
    size = 0
    for name, layer in layers.items():
        own = copies * InputCovariance.numel(layer)
        if portion and size + own > _KEPT:
            yield portion
            portion, size = {}, 0
        portion[name], size = layer, size + own
    if portion:
        yield portion


def _rounded(
    model: nn.Module, layers: Mapping[str, QuantModule], replay: Replay, config: CalibrationFields
) -> dict[str, Tensor]:
    """The values of the weights that are rounded otherwise than to the nearest, by layer."""
    halves = config.rounding == "auto"
    found: dict[str, Tensor] = {}
    bar = tqdm(total=len(layers), desc="rounding", unit="layer", disable=not config.progress)
    with bar, torch.no_grad():
        for portion in _portions(layers, 1 + halves):
            observed = _observed(model, portion, replay, config)
            for name, layer in portion.items():
                values = _best(_Rounding(layer), observed.pop(name))
                if values is not None:
                    found[name] = like_kept(layer, values)
                bar.update()
    _log.info("%d of %d weights rounded by their inputs", len(found), len(layers))
    return found


def _best(rounding: _Rounding, inputs: list[Inputs]) -> Tensor | None:
    """The values of one weight; None: those that are nearest.

    Args:
        rounding: Of the layer.
        inputs: Of all samples; or of those that it is rounded by, and of those that it is judged by.
    """
    if not any(bool(block.products.any()) for part in inputs for block in part):
        return None  # the layer never ran, or read nothing but zeros
    if len(inputs) == 1:
        return rounding.compensated(inputs[0])[0]
    known, judged = inputs
    trial, values = rounding.compensated(known, [one + other for one, other in zip(known, judged, strict=True)])
    return values if rounding.error(trial, judged) < rounding.error(rounding.nearest(), judged) else None


@contextmanager
def compensated_rounding(model: nn.Module, replay: Replay, config: CalibrationFields) -> Iterator[None]:
    """Round the weights of ``model`` by what their layers read; in the body, full precision still knows the originals.

    Args:
        model: Calibrated: its weights have scales.
        replay: A sample of its calls.
        config: Its ``rounding``.

    Raises:
        TdqError: It is to be done and cannot be: calls that cannot be repeated, samples that several processes compute
            together. The caller restores the model.
    """
    layers = _layers_to_round(model, replay, config)
    values = _rounded(model, layers, replay, config) if layers else {}
    for name, rounded in values.items():
        HeldWeight.from_tensor_quantizer(layers[name].weight_quantizer, rounded)
    yield
    for name in values:
        layer, quantizer = layers[name], layers[name].weight_quantizer
        replace_weight(layer, quantizer.release())
        remember_weight(layer._parameters["weight"], quantizer)
