"""What some ways of smoothing do to the output of one layer, on replayed samples.

See :mod:`modelopt_tdq.calibration.chosen_smoothing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.calibration.channel_ranges import ChannelRanges, shared_ranges
from modelopt_tdq.calibration.smoothed_layer import ChannelMap, SmoothedLayer
from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.core.fake_quant import FP8_E4M3, SUPPORTED_BITS, NumBits, code_range, fake_quantize, quantize
from modelopt_tdq.core.turns import Turns
from modelopt_tdq.model.call import first_output, layer_input

__all__ = ["CLIPS", "OfAll", "Settings", "Trial"]

#: About so many elements of an activation tell which scale is best.
_LOOKED_AT = 1 << 13

#: Multiples of the largest magnitude at which ``auto`` tries to clip activations and weights, below 8 bits.
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)


class OfAll:
    """What the samples of one call are like at one part of the model, over all processes."""

    def __init__(self, turns: Turns, part: Any) -> None:
        self._turns, self._part = turns, part

    def extent(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest values, of any shape."""
        found = self.given((low, high))
        lows, highs = (torch.stack([pair[number] for pair in found]) for number in (0, 1))
        return lows.amin(0).to(low.device), highs.amax(0).to(low.device)

    def part(self, x: Tensor, elements: int) -> Tensor:
        """[n] some of the values of each sample; over all samples, about so many as ``elements``."""
        own = self._turns.samples
        rows = x.reshape(own if own and x.dim() and x.shape[0] % own == 0 else 1, -1)
        step = (
            rows[0].numel() * max(self._turns.all_samples, 1) // elements if len(rows) == own else x.numel() // elements
        )
        return rows[:, :: max(1, step)].flatten()

    def sum(self, values: Tensor) -> Tensor:
        """Of ``values``."""
        return torch.stack([value for (value,) in self.given((values,))]).sum(0).to(values.device)

    def given(self, value: Any) -> list[Any]:
        """``value`` of each process that has samples in the call."""
        given = self._turns.exchange(self._part, value if self._turns.samples else None)
        return [each for each in given if each is not None] or [value]


#: Of an error that corrections take back in the trial, so much counts.
_NOT_TAKEN = 1e-3

#: Scale and offset of an activation.
_Scale = tuple[Tensor, "Tensor | None"]

#: Of an output [N, ..., C, ...] and its error, in one process: values per channel []; means of error and output [C];
#: about these, the square of the error [], and the sums [C] of output times error and of the output's square.
_Moments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _left(parts: list[_Moments]) -> Tensor:
    """[] the squared error that is left when a gain and a bias of each channel have been fitted to all parts.

    And a little of the whole, which decides where nothing is left: in a layer whose output depends on time alone.
    """
    counts, errors, outputs, squares, products, powers = (torch.stack(values) for values in zip(*parts, strict=True))
    whole = squares.sum() + (counts.unsqueeze(1) * errors.square()).sum()
    if len(parts) > 1:
        share = (counts / counts.sum()).unsqueeze(1)
        errors, outputs = (means - (share * means).sum(0) for means in (errors, outputs))
        weights = counts.unsqueeze(1)
        squares = squares + (weights * errors.square()).sum(1)
        products, powers = products + weights * outputs * errors, powers + weights * outputs.square()
    taken = products.sum(0).square() / powers.sum(0).clamp(min=1e-30)
    return (squares.sum(0) - taken.sum()).clamp(min=0.0) + _NOT_TAKEN * whole


def _bound(layer: SmoothedLayer, channels: ChannelMap) -> Tensor:
    """[] largest magnitude over all times of what is quantized, by a shift that does not depend on time."""
    times, low, high = shared_ranges([layer.ranges])
    shift = channels.shift_at(times[0])
    return torch.maximum(-channels(low.amin(0), shift).min(), channels(high.amax(0), shift).max())


class Trial:
    """Forward hook on one layer: the error of its output, quantized in each way, against what it is.

    Weights and activations have their bits, activations a scale for each call, as close to the final one as the
    samples of one time allow.
    """

    def __init__(
        self,
        layer: SmoothedLayer,
        maps: list[ChannelMap],
        settings: Settings,
        temporal: bool,
        times: list[float],
        turns: Turns,
    ) -> None:
        self._of_all = OfAll(turns, layer.module)
        self.layer, self.maps, self.settings = layer, maps, settings
        self.times = times
        self._bounds = [None if temporal else _bound(layer, channels) for channels in maps]
        self.squares = torch.zeros(len(times), len(maps) + 1, dtype=torch.float64)  # of the errors, and of the output
        self.ranges = ChannelRanges()
        self.row = 0
        self.places: tuple[int, ...] = ()
        self.weights = [_rounded_weight(layer, channels.divisor, settings.weight_clips) for channels in maps]
        # processes bring their parts together while all are here
        spread = layer.is_spread and None in self.weights
        self._plain = [layer.multiplied(channels.divisor) if spread else None for channels in maps]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See the layer's input and output, and what it would make of it in each way."""
        layer, num_bits = self.layer, self.layer.quantizer.num_bits
        x, y = layer_input(args, kwargs), first_output(output)
        if self.places:
            self.ranges.see(layer.by_channel(x), torch.tensor([self.times[self.row]]))
        shifts = [channels.shift_at(self.times[self.row]) for channels in self.maps]
        chosen = self._scales(x, shifts)
        found = []
        ways = zip(self.maps, shifts, self.weights, self._plain, chosen, strict=True)
        for channels, shift, rounded, plain, scale in ways:
            if not self.places:
                continue
            if rounded is None:
                weight = layer.multiplied(channels.divisor) if plain is None else plain
            else:
                codes, steps = (part.to(x.device) for part in rounded)
                weight = (codes.float() * steps).to(layer.weight.dtype)
            quantized = fake_quantize(self._mapped(x, channels, shift), *scale, num_bits)
            if shift is not None:
                quantized = quantized + layer.placed(shift).to(x.device)
            tried = layer.compute(quantized.to(x.dtype), weight)
            found.append(self._moments(tried.float(), y.float()))
        errors = self._errors(found)
        if self.places:
            self.squares[self.row] += torch.stack([*errors, y.float().square().sum()]).double().cpu()

    def _mapped(self, x: Tensor, channels: ChannelMap, shift: Tensor | None) -> Tensor:
        axis = x.dim() - 1 - self.layer.trailing
        return channels(x.movedim(axis, 0), shift).movedim(0, axis)

    def _scales(self, x: Tensor, shifts: list[Tensor | None]) -> list[_Scale]:
        """In each way, the scale and the offset of the input that is quantized."""
        layer, settings, num_bits = self.layer, self.settings, self.layer.quantizer.num_bits
        low, high = self._of_all.extent(*torch.aminmax(layer.by_channel(x), dim=1))
        options, errors = [], []
        for channels, shift, bound in zip(self.maps, shifts, self._bounds, strict=True):
            extent = channels(low, shift).min(), channels(high, shift).max()
            options.append(settings.options(extent, num_bits, bound))
            if len(options[-1]) > 1:
                part = self._of_all.part(self._mapped(x, channels, shift), _LOOKED_AT)
                errors.append(settings.errors(part, options[-1], num_bits))
        best = self._of_all.sum(torch.stack(errors)).argmin(1).tolist() if errors else [0] * len(options)
        return [some[number] for some, number in zip(options, best, strict=True)]

    def _moments(self, tried: Tensor, y: Tensor) -> _Moments:
        """Of the output in one way, and of its error; about their means where a gain and a bias will be fitted."""
        error = y - tried
        if not self.settings.corrected:
            nothing = torch.zeros(0, device=y.device)
            return torch.ones((), device=y.device), nothing, nothing, error.square().sum(), nothing, nothing
        dims = [d for d in range(y.dim()) if d != y.dim() - 1 - self.layer.trailing]
        means = error.mean(dims).double(), tried.mean(dims).double()
        error = error - error.mean(dims, keepdim=True)
        tried = tried - tried.mean(dims, keepdim=True)
        count = torch.tensor(float(y.numel() // means[0].numel()), dtype=torch.float64, device=y.device)
        # squares of these sums exceed float32 where outputs are 1e10
        products, powers = (tried * error).sum(dims).double(), tried.square().sum(dims).double()
        return count, *means, error.square().sum().double(), products, powers

    def _errors(self, found: list[_Moments]) -> list[Tensor]:
        """[] squared, in each way, this process's share of it.

        Without what a gain and a bias of each channel of the outputs take back if there will be some.
        """
        if not self.settings.corrected:
            return [error for _, _, _, error, _, _ in found]
        parts = self._of_all.given(tuple(found))
        return [_left([part[number] for part in parts]) / len(parts) for number in range(len(found))]

    def agree(self) -> None:
        """On the ranges of the input, over all processes."""
        self.ranges.agree(self.layer.channels, self.layer.device)

    def error(self, weights: Tensor) -> Tensor:
        """[number of ways] relative to the output, summed over the times by ``weights`` [K]; over all processes."""
        squares = all_reduce(self.squares, "sum")
        return (squares[:, :-1] / squares[:, -1:].clamp(min=1e-30) * weights.unsqueeze(1)).sum(0)


@dataclass(frozen=True)
class Settings:
    """What rounding will be like.

    Attributes:
        clips: Multiples of the largest magnitude of an activation that are tried, below 8 bits.
        weight_clips: Of a weight.
        asymmetric: Whether activations may have offsets.
        corrected: Whether the layers' outputs are corrected.
    """

    clips: tuple[float, ...]
    weight_clips: tuple[float, ...]
    asymmetric: bool
    corrected: bool

    def options(self, extent: tuple[Tensor, Tensor], num_bits: NumBits, bound: Tensor | None = None) -> list[_Scale]:
        """Scales that are tried for an activation.

        Args:
            extent: Its smallest and largest value.
            num_bits: Its number format.
            bound: Largest magnitude; None: that of the smallest and the largest value.
        """
        smallest, largest = code_range(num_bits)
        low, high = extent[0].clamp(max=0), extent[1].clamp(min=0)
        amax = (torch.maximum(-low, high) if bound is None else bound.to(low.device)).clamp(min=1e-30)
        clips = _clips_of(num_bits, self.clips)
        options: list[_Scale] = [(amax * clip / largest, None) for clip in clips]
        if self.asymmetric and isinstance(num_bits, int):
            for clip in clips:
                scale = ((high * clip - low) / (largest - smallest)).clamp(min=1e-30)
                options.append((scale, scale * torch.round(low / scale - smallest)))
        return options

    def errors(self, part: Tensor, options: list[_Scale], num_bits: NumBits) -> Tensor:
        """[number of options] squared, of a part of the activation."""
        return torch.stack([(fake_quantize(part, *option, num_bits) - part).square().sum() for option in options])

    def rounded(self, x: Tensor, num_bits: NumBits, extent: tuple[Tensor, Tensor] | None, of_all: OfAll) -> Tensor:
        """An activation, fake-quantized with that of :meth:`options` which has the least squared error on a part of it.

        Args:
            x: Of any shape.
            num_bits: Its number format.
            extent: Its smallest and largest value; None: those of the samples of all processes.
            of_all: What these have.
        """
        low, high = of_all.extent(*torch.aminmax(x)) if extent is None else extent
        options = self.options((low.to(x.device), high.to(x.device)), num_bits)
        best = 0
        if len(options) > 1:
            best = int(of_all.sum(self.errors(of_all.part(x, _LOOKED_AT), options, num_bits)).argmin())
        return fake_quantize(x, *options[best], num_bits)


def _clips_of(num_bits: NumBits, clips: tuple[float, ...]) -> tuple[float, ...]:
    return clips if isinstance(num_bits, int) and num_bits < 8 else clips[:1]


def _rounded_weight(
    layer: SmoothedLayer, vector: Tensor | None, clips: tuple[float, ...]
) -> tuple[Tensor, Tensor] | None:
    """Codes and scales [O, 1, ...] of the multiplied weight, for each output channel; None if it stays in float."""
    quantizer = layer.module.weight_quantizer
    plain = isinstance(quantizer, TensorQuantizer) and not isinstance(quantizer, SequentialQuantizer)
    if not plain or not quantizer.is_enabled or quantizer.num_bits not in SUPPORTED_BITS:
        return None
    num_bits: NumBits = quantizer.num_bits
    weight = layer.multiplied(vector).float()
    kept = () if quantizer.axis is None else (0,)
    amax = weight.abs().amax([d for d in range(weight.dim()) if d not in kept], keepdim=True).clamp(min=1e-30)
    best = torch.full_like(amax, float("inf"))
    scale = amax / code_range(num_bits)[1]
    for clip in _clips_of(num_bits, clips):
        tried = amax * clip / code_range(num_bits)[1]
        error = (fake_quantize(weight, tried, None, num_bits) - weight).square()
        error = error.sum([d for d in range(weight.dim()) if d not in kept], keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    codes = quantize(weight, scale, None, num_bits)
    return codes.to(torch.float8_e4m3fn if num_bits == FP8_E4M3 else torch.int8), scale
