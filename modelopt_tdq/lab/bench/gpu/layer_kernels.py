"""What an engine does around one linear layer, in Triton: quantize, multiply in low precision, correct, add the bias.

Written for comparison only: the same kernels for a scale that is a constant, that was looked up by time, or that is
found in the tensor at run time, so that what differs between two times is where the scale comes from.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
except ImportError:  # importable without Triton
    tl: Any = None  # type: ignore[no-redef]

__all__ = ["absmax", "linear", "quantize", "quantize_rows"]


def quantize(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    x_ptr, scale_ptr, q_ptr, count, constant, low: tl.constexpr, high: tl.constexpr, fixed: tl.constexpr,
    whole: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Codes q = rne(clip(x / s)); s is ``constant`` where ``fixed``, else what ``scale_ptr`` points to; any shape."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = constant if fixed else tl.load(scale_ptr)
    v = tl.minimum(tl.maximum(tl.div_rn(x, x * 0.0 + scale), low), high)
    if whole:
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to an even whole number
    tl.store(q_ptr + at, v.to(q_ptr.dtype.element_ty), mask=inside)


def quantize_rows(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, q_ptr, columns, high: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Scale of each row (token) from its own largest magnitude, then its codes; x [M, K], scale [M]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    x = tl.load(x_ptr + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / high
    tl.store(scale_ptr + row, scale)
    v = tl.minimum(tl.maximum(tl.div_rn(x, x * 0.0 + scale), -high), high)
    if whole:
        v = (v + 12582912.0) - 12582912.0
    tl.store(q_ptr + row * columns + at, v.to(q_ptr.dtype.element_ty), mask=at < columns)


def absmax(x_ptr, largest_ptr, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest magnitude of a tensor, into ``largest_ptr`` (int32: the bits of a float32), which holds 0 before."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.atomic_max(largest_ptr, tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True))


def linear(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, scale_ptr, weight_scale_ptr, bias_ptr, m, n, k, constant,
    fixed: tl.constexpr, per_row: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    group: tl.constexpr,
):  # fmt: skip
    """Output [M, N] fp16 = (A [M, K] · B [N, K]ᵀ) · s · weight_scale [N] + bias [N], codes int8, sums int32.

    The scale s is ``constant`` where ``fixed``; one number per row of A where ``per_row``; else one number.
    """
    program = tl.program_id(0)
    across, down = tl.cdiv(n, block_n), tl.cdiv(m, block_m)
    first = (program // (group * across)) * group
    size = tl.minimum(down - first, group)
    row = first + (program % (group * across)) % size
    column = (program % (group * across)) // size
    at_m = row * block_m + tl.arange(0, block_m)
    at_n = column * block_n + tl.arange(0, block_n)
    at_k = tl.arange(0, block_k)
    a = a_ptr + at_m[:, None].to(tl.int64) * k + at_k[None, :]
    b = b_ptr + at_n[None, :].to(tl.int64) * k + at_k[:, None]
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    for start in range(0, k, block_k):
        codes = tl.load(a, mask=(at_m[:, None] < m) & (start + at_k[None, :] < k), other=0)
        weights = tl.load(b, mask=(at_n[None, :] < n) & (start + at_k[:, None] < k), other=0)
        total += tl.dot(codes, weights, out_dtype=tl.int32)
        a += block_k
        b += block_k
    if fixed:
        y = total.to(tl.float32) * constant
    elif per_row:
        y = total.to(tl.float32) * tl.load(scale_ptr + at_m, mask=at_m < m, other=0.0)[:, None]
    else:
        y = total.to(tl.float32) * tl.load(scale_ptr)
    y = y * tl.load(weight_scale_ptr + at_n, mask=at_n < n, other=0.0)[None, :]
    y = y + tl.load(bias_ptr + at_n, mask=at_n < n, other=0.0)[None, :]
    inside = (at_m[:, None] < m) & (at_n[None, :] < n)
    tl.store(out_ptr + at_m[:, None].to(tl.int64) * n + at_n[None, :], y.to(tl.float16), mask=inside)
