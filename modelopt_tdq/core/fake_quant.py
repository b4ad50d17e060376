"""The arithmetic of activation quantization: the one definition that everything else is checked against.

    q = rne(clip((x - o) / s, qmin, qmax))          integer formats, o = 0 where symmetric
    q = e4m3(clip((x - o) / s, -448, 448))          FP8 E4M3
    x_hat = q * s' + o'

Codes are turned back into values with the same scale and offset, s' = s and o' = o, unless a quantizer has
learned others (the schemes DuQ and QIL).

All of it in float32, whatever the dtype of ``x``: division by the stored scale, round half to even.
ModelOpt's own fake quantizer multiplies by qmax/amax in the dtype of ``x`` instead, which moves
about one code in a million in float32 and one in a hundred in float16.

The gradient is the straight-through estimate: rounding passes it on, clipping stops it, and the
gradient of scales and offsets follows from the formula (LSQ, Esser et al. 2020, eq. 3, without its gradient
scale; a value exactly on the first or last code counts as not clipped).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "FP8_E4M3",
    "SUPPORTED_BITS",
    "NumBits",
    "code_range",
    "dequantize",
    "fake_quantize",
    "quantize",
    "symmetric_scale",
]

#: As ModelOpt writes a number format: bits of an integer, or (exponent, mantissa) bits of a float.
NumBits: TypeAlias = "int | tuple[int, int]"

FP8_E4M3: NumBits = (4, 3)
SUPPORTED_BITS: tuple[NumBits, ...] = (8, 7, 6, 5, 4, 3, 2, FP8_E4M3)


def code_range(num_bits: NumBits) -> tuple[float, float]:
    """Smallest and largest code: [-2^(b-1), 2^(b-1) - 1], or [-448, 448] for FP8 E4M3."""
    if isinstance(num_bits, int):
        return float(-(1 << (num_bits - 1))), float((1 << (num_bits - 1)) - 1)
    return -448.0, 448.0


def symmetric_scale(amax: Tensor, num_bits: NumBits) -> Tensor:
    """``amax / qmax``, as ModelOpt's MaxCalibrator; 1 where nothing but zeros was seen."""
    return torch.where(amax > 0, amax / code_range(num_bits)[1], torch.ones_like(amax))


def _round(v: Tensor, num_bits: NumBits) -> Tensor:
    """Codes of clipped quotients ``v``, which are overwritten."""
    if isinstance(num_bits, int):
        return v.round_()
    return v.to(torch.float8_e4m3fn).to(torch.float32)


def _codes(v: Tensor, num_bits: NumBits) -> Tensor:
    """Codes of the quotients ``v``, which are overwritten."""
    low, high = code_range(num_bits)
    return _round(v.clamp_(low, high), num_bits)


def _quotient(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(x - o) / s, a new float32 tensor; halves become float32 on the way, without a pass of their own."""
    v = x if x.dim() and x.dtype in (torch.float16, torch.bfloat16) and scale.dim() else x.to(torch.float32)
    return v / scale if offset is None else (v - offset).div_(scale)


def _reduced(gradient: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else gradient.sum_to_size(like.shape)


class _Quantize(torch.autograd.Function):
    """Codes; their gradient with respect to x, scale and offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, num_bits: NumBits) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.num_bits = num_bits
        return _codes(_quotient(x, scale, offset), num_bits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, scale, offset = ctx.saved_tensors
        low, high = code_range(ctx.num_bits)
        v = _quotient(x, scale, offset)
        # d code / d x, where it is not clipped
        inner = torch.where((v >= low) & (v <= high), gradient, 0.0).div_(scale)
        of_x = inner.to(x.dtype) if ctx.needs_input_grad[0] else None
        of_scale = _reduced(-inner * v, scale) if ctx.needs_input_grad[1] else None
        of_offset = _reduced(-inner, offset) if ctx.needs_input_grad[2] else None
        return of_x, of_scale, of_offset, None


class _FakeQuantize(torch.autograd.Function):
    """Values after quantization with one scale and offset for both directions; fewer passes than the composition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, num_bits: NumBits) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.num_bits = num_bits
        return dequantize(_codes(_quotient(x, scale, offset), num_bits), scale, offset).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, scale, offset = ctx.saved_tensors
        low, high = code_range(ctx.num_bits)
        gradient = gradient.to(torch.float32)
        v = _quotient(x, scale, offset)
        clipped = (v < low) | (v > high)
        of_x = gradient.masked_fill(clipped, 0.0)
        of_offset = _reduced(gradient - of_x, offset) if ctx.needs_input_grad[2] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            # code - v inside, code outside
            error = _codes(v.clone(), ctx.num_bits).sub_(v.masked_fill_(clipped, 0.0))
            of_scale = _reduced(error.mul_(gradient), scale)
        return of_x.to(x.dtype), of_scale, of_offset, None


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    if _differentiable(x, scale, offset):
        codes: Tensor = _Quantize.apply(x, scale, offset, num_bits)  # type: ignore[no-untyped-call]
        return codes
    return _codes(_quotient(x, scale, offset), num_bits)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``codes * scale + offset`` in float32."""
    x = codes * scale
    return x if offset is None else x + offset


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    num_bits: NumBits,
    dequant_scale: Tensor | None = None,
    dequant_offset: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize; the result has the shape and dtype of ``x``.

    Args:
        x: As in :func:`quantize`, like the next three.
        scale: s.
        offset: o.
        num_bits: The format.
        dequant_scale: s' where it differs from s; codes are then turned back by s' and ``dequant_offset``.
        dequant_offset: o' (None: 0), of use only with ``dequant_scale``.
    """
    if dequant_scale is not None:
        return dequantize(quantize(x, scale, offset, num_bits), dequant_scale, dequant_offset).to(x.dtype)
    if _differentiable(x, scale, offset):
        values: Tensor = _FakeQuantize.apply(x, scale, offset, num_bits)  # type: ignore[no-untyped-call]
        return values
    return dequantize(_codes(_quotient(x, scale, offset), num_bits), scale, offset).to(x.dtype)
