"""What weights are quantized to, in parts that stay in the caches of a processor: faster, and no copy of a weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits
from modelopt_tdq.model.weight_fit import weight_parts

__all__ = ["coded_parts", "quantized_parts"]


@torch.no_grad()
def quantized_parts(weight: Tensor, quantizer: Any) -> Iterator[Tensor]:
    """What a calibrated quantizer makes of a weight, float32, rows in order; all at once where it cannot be divided."""
    amax = quantizer._buffers.get("_amax")
    if type(quantizer) is not TensorQuantizer or amax is None or not _is_by_row(quantizer, amax, weight):
        yield quantizer(weight.detach().float()).detach().float()
        return
    part_of = copy.copy(quantizer)
    part_of._buffers = dict(quantizer._buffers)
    for part, own in weight_parts(weight.detach(), amax):
        part_of._buffers["_amax"] = own
        yield part_of(part.float()).detach().float()


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
