"""A layer whose input channels can be divided and its weights multiplied, and the vector that does so.

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

from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.select import trailing_dimensions
from modelopt_tdq.model.stored_weight import kept, replace_weight, stored, whole
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["ChannelRanges", "Formula", "SmoothedLayer", "balanced", "shared_vector", "smooth", "smoothing_vector"]

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


@dataclass(eq=False)
class SmoothedLayer:
    """A layer whose input channels can be divided.

    Attributes:
        name: As in ``model.named_modules()``.
        module: The layer.
        largest: [C] float32, max|x_j| so far.
    """

    name: str
    module: Any
    largest: Tensor = field(init=False, repr=False)
    _kept: Tensor = field(init=False, repr=False)
    _bias: Tensor | None = field(init=False, repr=False)
    _copied: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        self._kept, self._bias = kept(self.module), stored(self.module, "bias")
        self.largest = torch.zeros(self.weight.shape[1] * self.groups, device=self._kept.device)

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
        return x.detach().movedim(x.dim() - 1 - self.trailing, 0).reshape(self.largest.numel(), -1)

    def see(self, x: Tensor) -> None:
        """Take an input into account."""
        largest = self.by_channel(x).abs().amax(1).float()
        self.largest = torch.maximum(self.largest, largest.to(self.largest.device))

    @cached_property
    def weight_magnitude(self) -> Tensor:
        """[C] float32, the largest magnitude of the weights that each channel is multiplied with."""
        weight = self.original
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).abs().float()  # [g, O / g, C / g, ...]
        return grouped.flatten(3).amax(3).amax(1).flatten() if grouped.dim() > 3 else grouped.amax(1).flatten()

    def divisor(self, vector: Tensor) -> Tensor:
        """[C] as it broadcasts against the input."""
        return vector.reshape(-1, *(1,) * self.trailing)

    def multiplied(self, vector: Tensor) -> Tensor:
        """The original weight, its input channels multiplied by ``vector`` [C] in float32; in its own dtype."""
        weight = self.original
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

    def smooth(self, vector: Tensor | None, timestep: CurrentTimestep) -> None:
        """Divide the input by ``vector`` [C] from now on; None: leave both as they were.

        The multiplied weight is put in place of the original, which stays as it is: whoever raises later gives it back
        (:func:`modelopt_tdq.model.snapshot.restored_on_error`).
        """
        quantizer = TemporalQuantizer.from_tensor_quantizer(self.quantizer, timestep, f"{self.name}.input_quantizer")
        self.replace(self.original if vector is None else self.multiplied(vector))
        device = execution_device(self.module)
        quantizer.set_channel_divisor(None if vector is None else self.divisor(vector).to(device))

    def replace(self, weight: Tensor) -> None:
        """Put another weight in the place of the original."""
        if isinstance(self._kept, DTensor) and not self._copied:
            self._kept, self._copied = self._kept.clone(), True  # parts are written into
        replace_weight(self.module, weight)


class ChannelRanges:
    """Smallest and largest value of each channel of one layer's input, at each time: [K, C], zero among them.

    A time that was not seen has nothing but zeros.
    """

    def __init__(self, layer: SmoothedLayer, rows: int) -> None:
        self._layer = layer
        self.low, self.high = (torch.zeros(rows, layer.largest.numel(), device=layer.largest.device) for _ in range(2))

    def see(self, x: Tensor, row: int) -> None:
        """Take an input at one time into account."""
        extremes = torch.aminmax(self._layer.by_channel(x), dim=1)
        low, high = (value.float().to(self.low.device) for value in extremes)
        self.low[row] = torch.minimum(self.low[row], low)
        self.high[row] = torch.maximum(self.high[row], high)

    def agree(self) -> None:
        """Over all processes."""
        self.low, self.high = all_reduce(self.low, "min"), all_reduce(self.high, "max")

    @property
    def largest(self) -> Tensor:
        """[C] max|x_j| over the times."""
        return torch.maximum(-self.low.amin(0), self.high.amax(0))

    def divided(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """[] smallest and largest at one time, of ``row`` [1], of the input as the layer divides it now."""
        divisor = getattr(self._layer.quantizer, "channel_divisor", None)
        found = (values[row.to(values.device)] for values in (self.low, self.high))
        low, high = (values if divisor is None else values / divisor.flatten().to(values.device) for values in found)
        return low.min(), high.max()


def shared_vector(group: list[SmoothedLayer], formula: Formula, largest: list[Tensor] | None = None) -> Tensor:
    """The vector [C] of the layers that read one tensor.

    Args:
        group: These layers.
        formula: Of it.
        largest: [C] max|x_j| of each; None: what it has seen.
    """
    device = group[0].largest.device
    seen = [layer.largest for layer in group] if largest is None else largest
    weights = torch.stack([layer.weight_magnitude.to(device) for layer in group]).amax(0)
    return formula(torch.stack([each.to(device) for each in seen]).amax(0), weights)


def smooth(groups: list[list[SmoothedLayer]], vectors: list[Tensor | None], timestep: CurrentTimestep) -> None:
    """Smooth the layers of each group by its vector [C]; None: leave them as they were."""
    for group, vector in zip(groups, vectors, strict=True):
        for layer in group:
            layer.smooth(vector, timestep)
