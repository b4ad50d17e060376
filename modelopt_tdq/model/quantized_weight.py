"""What weights are quantized to, in parts that stay in the caches of a processor: faster, and no copy of a weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits

__all__ = ["coded_parts", "quantized_parts", "weight_parts"]


def weight_parts(weight: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight in slices of its first dimension, each with its scales; on a CPU, few enough numbers for its cache."""
    if weight.dim() == 0:
        yield weight, scale
        return
    most = 1 << 18 if weight.device.type == "cpu" else 1 << 26
    step = max(1, most * len(weight) // max(1, weight.numel()))
    own = scale.dim() == weight.dim() and len(scale) == len(weight)
    scales = torch.split(scale, step) if own else itertools.repeat(scale)
    yield from zip(torch.split(weight, step), scales, strict=False)


@torch.no_grad()
def quantized_parts(weight: Tensor, quantizer: Any, dtype: torch.dtype | None = torch.float32) -> Iterator[Tensor]:
    """What a calibrated quantizer makes of a weight, rows in order; all at once where it cannot be divided.

    Args:
        weight: [rows, ...].
        quantizer: ModelOpt's, of the weight.
        dtype: In which it computes; None: that of the weight.
    """
    dtype = dtype or weight.dtype
    amax = quantizer._buffers.get("_amax")
    if type(quantizer) is not TensorQuantizer or amax is None or not _is_by_row(quantizer, amax, weight):
        yield quantizer(weight.detach().to(dtype)).detach().to(dtype)
        return
    part_of = copy.copy(quantizer)
    part_of._buffers = dict(quantizer._buffers)
    for part, own in weight_parts(weight.detach(), amax):
        part_of._buffers["_amax"] = own
        yield part_of(part.to(dtype)).detach().to(dtype)


def coded_parts(
    weight: Tensor, quantizer: Any, scale: Tensor, num_bits: NumBits
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """:func:`quantized_parts`, on the CPU, with their part of the scale and their codes, int8 or float8_e4m3fn."""
    row = 0
    for values in (part.cpu() for part in quantized_parts(weight, quantizer)):
        own = scale[row : row + len(values)] if scale.dim() == values.dim() and len(scale) > 1 else scale
        quotient = values / own
        yield (
            values,
            own,
            quotient.to(torch.float8_e4m3fn) if num_bits == FP8_E4M3 else quotient.round_().to(torch.int8),
        )
        row += len(values)


def _is_by_row(quantizer: Any, amax: Tensor, weight: Tensor) -> bool:
    """Whether each row is quantized with the range of the tensor, or one of its own."""
    plain = not quantizer._dynamic and quantizer.block_sizes is None and not quantizer.rotate_is_enabled
    if not plain or quantizer.backend is not None or quantizer.pre_quant_scale is not None:
        return False
    return amax.numel() == 1 or (amax.dim() == weight.dim() and amax.numel() == amax.shape[0] == len(weight))
