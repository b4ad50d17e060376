"""How the inputs of a layer's products vary together: what rounding its weights has to go by.

A product has one row of inputs for each output channel: what a linear layer reads at one position, or the patch that a
convolution's kernel covers. Some positions of every sample tell enough.

The means of each time count for little. A mean error of the outputs is what a bias makes good
(:mod:`modelopt_tdq.calibration.correct`), and rounding may spend it. Without any weight it would be spent without
bounds, which is worse with and without corrections: 34.5 dB, and 35.1 dB with a tenth (W4A8, bundled UNet). Of n
samples, 1/n of what differs between them looks like a mean, too.

Inputs of few bits are not what they were: how they vary with the exact ones tells which weights make the best of them
(GPTAQ, Li et al. 2025, for the quantization of the layer's own input).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from torch.nn import functional

from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.core.turns import Turns
from modelopt_tdq.model.call import layer_input
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.select import has_batch, trailing_dimensions

__all__ = ["BlockOfInputs", "InputCovariance", "input_blocks"]

#: Weight of the means' products, of many samples.
_MEANS = 0.1

#: Most inputs that are looked at together; those of other blocks count as independent.
_BLOCK = 576

#: Rows of inputs per input of a block.
_ROWS = 8

#: Integers of fewer bits change what a layer reads.
_FINE = 8


@dataclass(frozen=True, eq=False)
class BlockOfInputs:
    """What is known of one stretch of a layer's inputs, over some samples.

    Attributes:
        inputs: Which of those of one output channel.
        products: [G, b, b] float32, sum of x x^T of the inputs x that the weights are multiplied with, in G groups.
        crossed: [G, b, b] float32, sum of z x^T, z the full-precision inputs; None where x is close enough to z.
    """

    inputs: slice
    products: Tensor
    crossed: Tensor | None

    def to(self, device: torch.device) -> BlockOfInputs:
        """The same there."""
        crossed = None if self.crossed is None else self.crossed.to(device)
        return BlockOfInputs(self.inputs, self.products.to(device), crossed)

    def __add__(self, other: BlockOfInputs) -> BlockOfInputs:
        """Over the samples of both."""
        one, two = self.crossed, other.crossed
        crossed = None if one is None or two is None else one + two
        return BlockOfInputs(self.inputs, self.products + other.products, crossed)


def input_blocks(layer: nn.Module) -> list[slice]:
    """Stretches of the inputs of one output channel, of whole input channels each, about as long as each other."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    kernel, channels = math.prod(weight.shape[2:]), weight.shape[1]
    blocks = math.ceil(channels / max(1, _BLOCK // kernel))
    ends = [channels * number // blocks * kernel for number in range(blocks + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _shapes(layer: nn.Module) -> list[tuple[int, int, int]]:
    """[G, b, b] of the sum that is kept for each block."""
    groups, sizes = int(getattr(layer, "groups", 1)), [block.stop - block.start for block in input_blocks(layer)]
    return [(groups, size, size) for size in sizes]


def _chosen(positions: int, wanted: int, seed: int) -> Tensor:
    """Ascending numbers of at most ``wanted`` positions, the same for every sample."""
    if wanted >= positions:
        return torch.arange(positions)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(positions, generator=generator)[:wanted].sort().values


def _patches(layer: Any, x: Tensor, wanted: int, seed: int) -> Tensor:
    """[R, G, n] inputs of the products at some positions of each sample; n inputs, G groups."""
    trailing = trailing_dimensions(layer)
    x = x if has_batch(layer, x) else x.unsqueeze(0)
    if not trailing:
        positions = x.reshape(x.shape[0], -1, x.shape[-1])
        chosen = _chosen(positions.shape[1], wanted, seed).to(x.device)
        return positions[:, chosen].reshape(-1, 1, x.shape[-1])
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dimension in range(trailing):  # a view: [N, C, positions ..., kernel ...]
        size = (layer.kernel_size[dimension] - 1) * layer.dilation[dimension] + 1
        x = x.unfold(2 + dimension, size, layer.stride[dimension])
        x = x[..., :: layer.dilation[dimension]]
    sizes = x.shape[2 : 2 + trailing]
    chosen = _chosen(math.prod(sizes), wanted, seed)
    index: Any = (slice(None), slice(None), *torch.unravel_index(chosen.to(x.device), sizes))
    found = x[index].movedim(2, 1)  # [N, k, C, kernel ...]
    return found.reshape(-1, layer.groups, found[0, 0].numel() // layer.groups)


def _is_coarse(quantizer: TensorQuantizer) -> bool:
    """Whether few bits are left of what it quantizes."""
    bits = quantizer.num_bits
    return bool(quantizer.is_enabled) and isinstance(bits, int) and bits < _FINE


@contextmanager
def _rounding(quantizer: TensorQuantizer) -> Iterator[None]:
    """Meanwhile it quantizes, though the model is in full precision."""
    quantizer.enable_quant()
    try:
        yield
    finally:
        quantizer.disable_quant()


class InputCovariance:
    """A hook on one layer, for :func:`modelopt_tdq.calibration.output_error.run_probes`.

    Args:
        layer: Linear, or a convolution; calibrated.
        samples: Of all times and processes together, about.
        halves: Keep two sums, of one half of the samples each.
        turns: Of the replayed calls; None where there is but one process.
        weights: By how much squared errors at each time count, by its row; None: all alike.

    Attributes:
        row: Of the time of the call.
        places: Of this process's samples among all of the call.
    """

    def __init__(
        self,
        layer: QuantModule,
        samples: int,
        halves: bool,
        turns: Turns | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._weights = weights
        self._layer, self._blocks, self._turns = layer, input_blocks(layer), turns
        shapes, device = _shapes(layer), execution_device(layer)
        self._wanted = max(1, math.ceil(_ROWS * max(shapes)[1] / max(samples, 1)))

        def zeros(sums: int) -> list[list[Tensor]]:
            return [[torch.zeros(shape, device=device) for shape in shapes] for _ in range(sums)]

        self._products = zeros(1 + halves)
        self._crossed = zeros(1 + halves if _is_coarse(layer.input_quantizer) else 0)
        self.row = 0
        self.places: tuple[int, ...] = ()

    @staticmethod
    def numel(layer: QuantModule) -> int:
        """Numbers that are kept for ``layer``."""
        return (1 + _is_coarse(layer.input_quantizer)) * sum(math.prod(shape) for shape in _shapes(layer))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See the layer's inputs, in full precision and, of few bits, as its weights are multiplied with them."""
        given, quantizer = layer_input(args, kwargs), self._layer.input_quantizer
        exact = self._rows(quantizer(given))
        rows = exact
        if self._crossed:
            with _rounding(quantizer):
                rows = self._rows(quantizer(given))
        half = self._half(len(rows)).to(rows.device)
        weight = 1.0 if self._weights is None else self._weights[self.row]
        for number, sums in enumerate(self._products):
            own, other = rows[half == number], exact[half == number]
            for place, block in enumerate(self._blocks):
                part = own[:, :, block].transpose(0, 1)  # [G, R, b]
                sums[place].baddbmm_(part.transpose(1, 2), part, alpha=weight)
                if self._crossed:
                    exact_part = other[:, :, block].transpose(0, 1)
                    self._crossed[number][place].baddbmm_(exact_part.transpose(1, 2), part, alpha=weight)

    def _rows(self, x: Tensor) -> Tensor:
        """[R, G, n] some rows of inputs, most of their means taken away; none if the call only stands in."""
        rows = _patches(self._layer, x, self._wanted, self.row).float()
        if not self.places:
            rows = rows[:0]
        own = len(rows), len(self.places), rows.sum(0)
        given = [own] if self._turns is None else self._turns.exchange(self._layer, own)
        total, samples = (max(1.0, sum(each[number] for each in given)) for number in (0, 1))
        mean = torch.stack([each[2].to(rows.device) for each in given]).sum(0) / total  # [G, n]
        taken: Tensor = (1 - math.sqrt(_MEANS + (1 - _MEANS) / samples)) * mean
        return rows - taken

    def _half(self, rows: int) -> Tensor:
        """[rows] to which half each belongs: every other sample of the call to the second."""
        if len(self._products) == 1 or not self.places or rows % len(self.places):
            return torch.zeros(rows, dtype=torch.int64)
        return (torch.tensor(self.places) % 2).repeat_interleave(rows // len(self.places))

    def sums(self) -> Iterator[list[BlockOfInputs]]:
        """The blocks of the layer's inputs, of each half or of all samples; over all processes."""
        for number, sums in enumerate(self._products):
            products = [all_reduce(own, "sum") for own in sums]
            crossed = [all_reduce(own, "sum") for own in self._crossed[number]] if self._crossed else [None] * len(sums)
            yield [BlockOfInputs(*known) for known in zip(self._blocks, products, crossed, strict=True)]
