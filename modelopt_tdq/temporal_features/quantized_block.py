"""The temporal block with its quantizers on: like any other layers, or with scales of its own for every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.calibration.channel_smoothing import undo_channel_smoothing
from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.core.fake_quant import NumBits
from modelopt_tdq.core.scales import Scales
from modelopt_tdq.model.call import layer_input
from modelopt_tdq.model.kinds import kind_of
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.snapshot import restored
from modelopt_tdq.model.timestep import deliver_timestep
from modelopt_tdq.temporal_features.block import TemporalBlock
from modelopt_tdq.temporal_features.finite_set import row_scales

__all__ = ["Formats", "formats", "naive_features", "naive_scales", "quantizable", "quantized", "switch_on"]

#: Of every quantizer of the block, whatever the rules of the model say.
_PLAIN = {"enable": True, "block_sizes": None, "type": "static", "unsigned": False, "narrow_range": False}


@dataclass(frozen=True)
class Formats:
    """Number formats of the temporal block."""

    weight: NumBits
    activation: NumBits


def formats(model: nn.Module, weight: NumBits | None, activation: NumBits | None) -> Formats:
    """Those that are given; else those that most enabled quantizers of the model have."""
    counts: dict[str, Counter[Any]] = {"weight_quantizer": Counter(), "input_quantizer": Counter()}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, TensorQuantizer) and module.is_enabled and kind in counts:
            counts[kind][module.num_bits] += 1
    common = [next((bits for bits, _ in counter.most_common(1)), 8) for counter in counts.values()]
    return Formats(weight or common[0], activation or common[1])


def quantizable(model: nn.Module, block: TemporalBlock) -> dict[str, Any]:
    """The layers of the block that ModelOpt can quantize, by name; without those that the model goes on to run."""
    layers = {name: model.get_submodule(name) for name in block.layers if name not in block.kept}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, QuantModule)
        and isinstance(getattr(layer, "weight_quantizer", None), TensorQuantizer)
        and isinstance(getattr(layer, "input_quantizer", None), TensorQuantizer)
    }


def _inputs(
    model: nn.Module, block: TemporalBlock, times: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """[K, N] what goes into each layer, in all its calls, in full precision."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    size = block.tape.times

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: seen[name].append(layer_input(args, kwargs).detach()[:size].flatten(1))

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        block.compute(model, times)
    finally:
        for handle in handles:
            handle.remove()
    runs = -(-len(times) // size)

    def rows(values: list[Tensor]) -> Tensor:
        calls = len(values) // runs
        return torch.cat([torch.cat(values[i : i + calls], 1) for i in range(0, len(values), calls)])[: len(times)]

    return {name: rows(values) for name, values in seen.items()}


def switch_on(
    model: nn.Module,
    block: TemporalBlock,
    times: Tensor,
    bits: Formats,
    weights: str,
    scales: Callable[[Tensor], Scales],
) -> dict[str, Any]:
    """Switch the quantizers of the block on, and calibrate them.

    Args:
        model: Its other quantizers play no part.
        block: Of the model.
        times: [K].
        bits: Of the block.
        weights: ModelOpt's calibration of the weights, ``max`` or ``mse``. With ``keep``, which is for weights that are
            calibrated already, ``mse``.
        scales: Of the values [K, N] that an activation takes.

    Returns:
        The layers, by name.
    """
    layers = quantizable(model, block)
    for layer in layers.values():
        undo_channel_smoothing(layer)  # of a calibration before, with other scales
    timestep = deliver_timestep(model, block.timestep)
    with torch.no_grad():
        inputs = _inputs(model, block, times, layers)
    for name, layer in layers.items():
        kind = kind_of(layer)
        axis = 0 if kind is None else kind.weight_axis
        for quantizer, num_bits, along in (
            (layer.weight_quantizer, bits.weight, axis),
            (layer.input_quantizer, bits.activation, None),
        ):
            quantizer.reset_amax()  # it may be of another shape
            quantizer.set_from_attribute_config({**_PLAIN, "num_bits": num_bits, "axis": along})
        quantizer = TemporalQuantizer.from_tensor_quantizer(layer.input_quantizer, timestep, f"{name}.input_quantizer")
        quantizer.set_rows(times, *scales(inputs[name]))
    calibrate_weights(nn.ModuleList(layers.values()), "mse" if weights == "keep" else weights)
    return layers


@contextmanager
def quantized(model: nn.Module, block: TemporalBlock, *how: Any) -> Iterator[dict[str, Any]]:
    """See :func:`switch_on`; the block is as it was when the context ends."""
    with restored(nn.ModuleList(quantizable(model, block).values())):
        yield switch_on(model, block, *how)


def naive_scales(bits: Formats, over_time: bool = False) -> Callable[[Tensor], Scales]:
    """Symmetric scales with the least squared error, as the other layers have them: one for all times, or one each."""

    def scales(values: Tensor) -> Scales:
        rows = values if over_time else values.reshape(1, -1)
        return row_scales(rows, bits.activation, symmetric=True).map(lambda value: value.expand(len(values)))

    return scales


@torch.no_grad()
def naive_features(
    model: nn.Module, block: TemporalBlock, times: Tensor, bits: Formats, weights: str, over_time: bool = False
) -> dict[str, Tensor]:
    """The features [K, ...] if the block is quantized like any other layers: rounded to nearest, symmetric.

    Args:
        model: See :func:`switch_on`, also for the next four.
        block: Likewise.
        times: Likewise.
        bits: Likewise.
        weights: Likewise.
        over_time: With a scale per time instead of one.
    """
    with quantized(model, block, times, bits, weights, naive_scales(bits, over_time)):
        return block.compute(model, times)
