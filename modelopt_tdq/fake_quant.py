"""The arithmetic of activation quantization: the one definition that everything else is checked against.

    q = rne(clip((x - o) / s, qmin, qmax))          integer formats, o = 0 where symmetric
    q = e4m3(clip((x - o) / s, -448, 448))          FP8 E4M3
    x_hat = q * s + o

All of it in float32, whatever the dtype of ``x``: division by the stored scale, round half to even.
ModelOpt's own fake quantizer multiplies by qmax/amax in the dtype of ``x`` instead, which moves
about one code in a million in float32 and one in a hundred in float16.

The gradient is the straight-through estimate: rounding passes it on, clipping stops it, and the
gradient of ``s`` and ``o`` follows from the formula (LSQ, Esser et al. 2020, eq. 3, without its gradient
scale; a value exactly on the first or last code counts as not clipped).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["FP8_E4M3", "SUPPORTED_BITS", "NumBits", "code_range", "dequantize", "fake_quantize", "quantize"]

#: As ModelOpt writes a number format: bits of an integer, or (exponent, mantissa) bits of a float.
NumBits: TypeAlias = "int | tuple[int, int]"

FP8_E4M3: NumBits = (4, 3)
SUPPORTED_BITS: tuple[NumBits, ...] = (8, 7, 6, 5, 4, 3, 2, FP8_E4M3)


def code_range(num_bits: NumBits) -> tuple[float, float]:
    """Smallest and largest code: [-2^(b-1), 2^(b-1) - 1], or [-448, 448] for FP8 E4M3."""
    if isinstance(num_bits, int):
        return float(-(1 << (num_bits - 1))), float((1 << (num_bits - 1)) - 1)
    return -448.0, 448.0


def _round(v: Tensor, num_bits: NumBits) -> Tensor:
    if isinstance(num_bits, int):
        return torch.round(v)
    return v.to(torch.float8_e4m3fn).to(torch.float32)


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, num_bits: NumBits) -> Tensor:
    """Codes of ``x``.

    Args:
        x: Any shape and floating dtype.
        scale: float32, broadcastable against ``x``, positive.
        offset: float32, likewise, or None for symmetric quantization. The value of code 0.
        num_bits: The format, see :data:`SUPPORTED_BITS`.

    Returns:
        float32 tensor of ``x``'s shape that holds the codes.
    """
    v = x.to(torch.float32)
    if offset is not None:
        v = v - offset
    v = v / scale
    low, high = code_range(num_bits)
    if not (torch.is_grad_enabled() and v.requires_grad):
        return _round(v.clamp_(low, high), num_bits)
    # v + (round(v) - v) is round(v): the difference is exact in float32. Clamped before it is rounded, so that
    # the gradient stops at the last code and not half a step beyond it, as in LSQ.
    v = v.clamp(low, high)
    return v + (_round(v, num_bits) - v).detach()


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``codes * scale + offset`` in float32."""
    x = codes * scale
    return x if offset is None else x + offset


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, num_bits: NumBits) -> Tensor:
    """Quantize and dequantize; the result has the shape and dtype of ``x``. Arguments as :func:`quantize`."""
    return dequantize(quantize(x, scale, offset, num_bits), scale, offset).to(x.dtype)
