"""A layer whose input channels can be divided and its weights multiplied, and what does so.

See :mod:`modelopt_tdq.calibration.channel_smoothing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from modelopt_tdq.calibration.channel_ranges import ChannelRanges, SharedRanges
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.select import trailing_dimensions
from modelopt_tdq.model.stored_weight import kept, replace_weight, stored, whole
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = [
    "ChannelMap",
    "Formula",
    "Kind",
    "SmoothedLayer",
    "balanced",
    "shared_map",
    "smooth",
    "smoothing_vector",
]

#: Makes of max|x_j| and max|w_j|, [C] each, what the channels are divided by, [C].
Formula = Callable[[Tensor, Tensor], Tensor]

#: c of a tensor lies within these factors of its geometric mean, so that the weights keep the range of their dtype.
_FURTHEST = 1024.0


def smoothing_vector(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """What the channels of an activation are divided by: c_j = max|x_j|^a / max|w_j|^(1 - a).

    Its geometric mean is 1: a common factor would change nothing, since scales follow.

    Args:
        activation: [C] max|x_j|.
        weight: [C] max|w_j|.
        strength: a, in [0, 1].

    Returns:
        [C] float32, positive and finite; 1 for channels in which either is zero or not finite.
    """

    def logarithm(x: Tensor, w: Tensor) -> Tensor:
        return x.log() * strength - w.log() * (1 - strength)

    return _vector(activation, weight, logarithm)


def balanced(activation: Tensor, weight: Tensor, share: float) -> Tensor:
    """As :func:`smoothing_vector`, with c_j = hypot(max|x_j|, b / max|w_j|) and b a share of the largest product.

    Where the product max|x_j| max|w_j| is large, a channel gets all codes, which serves the activation best. Where it
    is below b, the weights get them, and what the activation loses counts for little.

    Args:
        activation: [C] max|x_j|.
        weight: [C] max|w_j|.
        share: b relative to the largest product, positive.
    """

    def logarithm(x: Tensor, w: Tensor) -> Tensor:
        return torch.hypot(x, share * (x * w).max() / w).log()

    return _vector(activation, weight, logarithm)


def _vector(activation: Tensor, weight: Tensor, logarithm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[C] float32, from the logarithm of c; 1 for channels in which either is zero or not finite."""
    x, w = activation.double(), weight.double()
    alive = (x > 0) & (w > 0) & x.isfinite() & w.isfinite()
    log = torch.zeros_like(x)
    if bool(alive.any()):
        found = logarithm(x[alive], w[alive])
        log[alive] = found - found.mean()
    return log.exp().clamp(1 / _FURTHEST, _FURTHEST).float()


@dataclass(frozen=True)
class Kind:
    """One way of smoothing.

    Attributes:
        formula: Of what the channels are divided by; None: 1.
        shifts: Whether the middle of each channel's range is subtracted first.
    """

    formula: Formula | None = None
    shifts: bool = False


@dataclass(frozen=True)
class ChannelMap:
    """What is done to the channels of a tensor before it is quantized: x / c - v.

    Attributes:
        divisor: [C] float32, c; None: 1.
        shift: [K, C] float32, v at the times of the rows, or [1, C]; None: 0.
        times: [K] float32 of these; None where it does not depend on time.
    """

    divisor: Tensor | None = None
    shift: Tensor | None = None
    times: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether channels are left as they are."""
        return self.divisor is None and self.shift is None

    def shift_at(self, time: float) -> Tensor | None:
        """[C] v."""
        if self.shift is None or self.times is None:
            return None if self.shift is None else self.shift[0]
        return self.shift[int(row_index(torch.tensor([time]), self.times.cpu()))]

    def __call__(self, channels: Tensor, shift: Tensor | None) -> Tensor:
        """[C, ...] values divided, and shifted by ``shift`` [C], in float32."""
        shape = (-1, *(1,) * (channels.dim() - 1))
        divided = channels.float()
        if self.divisor is not None:
            divided = divided / self.divisor.to(channels.device).reshape(shape)
        return divided if shift is None else divided - shift.to(channels.device).reshape(shape)


@dataclass(eq=False)
class SmoothedLayer:
    """A layer whose input channels can be divided.

    Attributes:
        name: As in ``model.named_modules()``.
        module: The layer.
        ranges: Of its input's channels, so far.
    """

    name: str
    module: Any
    ranges: ChannelRanges = field(init=False, repr=False)
    _kept: Tensor = field(init=False, repr=False)
    _bias: Tensor | None = field(init=False, repr=False)
    _copied: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        self._kept, self._bias = kept(self.module), stored(self.module, "bias")
        self.ranges = ChannelRanges()

    @property
    def pads(self) -> bool:
        """Whether the layer pads its input with zeros, which have no code where channels are shifted."""
        padding: Any = getattr(self.module, "padding", ())
        return padding != "valid" if isinstance(padding, str) else any(padding)

    def agree(self) -> None:
        """On the ranges, over all processes."""
        self.ranges.agree(self.channels, self.device)

    @property
    def channels(self) -> int:
        """C, of the input."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._kept.device

    def as_quantized(self, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[] the smallest and largest of what is quantized in the call in progress, if channels lie between these [C].

        As the input is divided and shifted now.
        """
        quantizer: Any = self.quantizer
        low, high = (quantizer.shifted(quantizer.smoothed(self.placed(end))) for end in ends)
        return low.min(), high.max()

    @property
    def original(self) -> Tensor:
        """The whole weight as it was, [O, C / groups, ...]; where processes have parts of it, a collective."""
        return whole(self._kept)

    @property
    def is_spread(self) -> bool:
        """Whether processes have parts of the weight."""
        return isinstance(self._kept, DTensor)

    @property
    def quantizer(self) -> TensorQuantizer:
        """Of the input."""
        return self.module.input_quantizer

    @property
    def weight(self) -> nn.Parameter:
        """[O, C / groups, ...] of the module: ``meta`` where it is offloaded, a DTensor where processes have parts."""
        weight: nn.Parameter = self.module._parameters["weight"]
        return weight

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return int(getattr(self.module, "groups", 1))

    @property
    def trailing(self) -> int:
        """Dimensions of the input behind that of the channels."""
        return trailing_dimensions(self.module)

    def by_channel(self, x: Tensor) -> Tensor:
        """[C, ...] an input, all else in one dimension."""
        return x.detach().movedim(x.dim() - 1 - self.trailing, 0).reshape(self.channels, -1)

    @cached_property
    def weight_magnitude(self) -> Tensor:
        """[C] float32, the largest magnitude of the weights that each channel is multiplied with."""
        weight = self.original
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).abs().float()  # [g, O / g, C / g, ...]
        return grouped.flatten(3).amax(3).amax(1).flatten() if grouped.dim() > 3 else grouped.amax(1).flatten()

    def placed(self, vector: Tensor) -> Tensor:
        """[C] as it broadcasts against the input."""
        return vector.reshape(-1, *(1,) * self.trailing)

    def multiplied(self, vector: Tensor | None) -> Tensor:
        """The original weight, its input channels multiplied by ``vector`` [C] in float32; in its own dtype."""
        weight = self.original
        if vector is None:
            return weight
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).float()
        factor = vector.to(weight.device).reshape(self.groups, 1, -1, *(1,) * (weight.dim() - 2))
        return (grouped * factor).reshape(weight.shape).to(weight.dtype)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of ``x`` with another weight, both as they are."""
        weight, bias = weight.to(x.device), None if self._bias is None else self._bias.to(x.device)
        if self.trailing:
            output: Tensor = self.module._conv_forward(x, weight, bias)
            return output
        return functional.linear(x, weight, bias)

    def smooth(self, channels: ChannelMap, timestep: CurrentTimestep) -> None:
        """Do this to the channels of the input from now on, and undo it in the weight.

        The multiplied weight is put in place of the original, which stays as it is: whoever raises later gives it back
        (:func:`modelopt_tdq.model.snapshot.restored_on_error`).
        """
        quantizer = TemporalQuantizer.from_tensor_quantizer(self.quantizer, timestep, f"{self.name}.input_quantizer")
        self.replace(self.multiplied(channels.divisor))
        device = execution_device(self.module)
        divisor, shift, times = (
            None if vector is None else vector.to(device)
            for vector in (channels.divisor, channels.shift, channels.times)
        )
        quantizer.set_channels(
            None if divisor is None else self.placed(divisor),
            None if shift is None else shift.reshape(*shift.shape, *(1,) * self.trailing),
            times,
        )

    def replace(self, weight: Tensor) -> None:
        """Put another weight in the place of the original."""
        if isinstance(self._kept, DTensor) and not self._copied:
            self._kept, self._copied = self._kept.clone(), True  # parts are written into
        replace_weight(self.module, weight)


def _largest(low: Tensor, high: Tensor) -> Tensor:
    """[C] max|x_j| of these smallest and largest values [K, C]; 0 where nothing was seen."""
    low, high = low.amin(0), high.amax(0)
    return torch.where(low <= high, torch.maximum(-low, high), 0.0)


def shared_map(group: list[SmoothedLayer], kind: Kind, ranges: SharedRanges, temporal: bool = True) -> ChannelMap:
    """What is done to the channels of a tensor that several layers read.

    Args:
        group: These layers.
        kind: Of smoothing.
        ranges: Of the tensor.
        temporal: Whether a shift follows the time.
    """
    times, low, high = ranges
    shift = None
    if kind.shifts and not any(layer.pads for layer in group):
        if not temporal or len(times) < 2:
            times, low, high = times[:1], low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        shift = (low + (high - low) / 2).nan_to_num(0.0, 0.0, 0.0)
        low, high = low - shift, high - shift
    divisor = None
    if kind.formula is not None:
        weights = torch.stack([layer.weight_magnitude.to(low.device) for layer in group]).amax(0)
        divisor = kind.formula(_largest(low, high), weights)
    if shift is None:
        return ChannelMap(divisor)
    shift = shift if divisor is None else shift / divisor
    return ChannelMap(divisor, shift, torch.tensor(times) if len(times) > 1 else None)


def smooth(groups: list[list[SmoothedLayer]], maps: list[ChannelMap], timestep: CurrentTimestep) -> None:
    """Do to the channels of each group's input what its map says."""
    for group, channels in zip(groups, maps, strict=True):
        for layer in group:
            layer.smooth(channels, timestep)
