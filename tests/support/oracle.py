"""The arithmetic once more, in plain NumPy and independently of the package."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: The non-negative finite numbers of FP8 E4M3 (no infinities; exponent bias 7), ascending; an even index is an
#: even mantissa.
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1],
    dtype=np.float64,
)


def row(time: float, timesteps: Array) -> int:
    """Index of the nearest time of the table; of two equally near ones the earlier."""
    distance = np.abs(timesteps.astype(np.float64) - np.float64(np.float32(time)))
    return int(np.argmin(distance))


def code_limits(bits: int | tuple[int, int]) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if isinstance(bits, int) else (-448, 448)


def codes(x: Array, scale: float | Array, offset: float | Array, bits: int | tuple[int, int]) -> Array:
    """clip(rne((x - offset) / scale)) as float32; every operation in float32. Arrays are those of each channel."""
    with np.errstate(over="ignore"):
        quotient = (x.astype(np.float32) - np.float32(offset)) / np.float32(scale)
    low, high = code_limits(bits)
    if isinstance(bits, int):
        return np.minimum(np.maximum(np.rint(quotient), low), high).astype(np.float32)
    return e4m3(quotient)


def e4m3(values: Array) -> Array:
    """Nearest FP8 E4M3 number, ties to even mantissa, saturating."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    upper = np.minimum(np.searchsorted(E4M3, magnitude, side="left"), len(E4M3) - 1)
    lower = np.maximum(upper - 1, 0)
    below, above = magnitude - E4M3[lower], E4M3[upper] - magnitude
    even = np.where(upper % 2 == 0, upper, lower)
    chosen = np.where(below < above, lower, np.where(above < below, upper, even))
    return np.copysign(E4M3[chosen], values).astype(np.float32)


def values(code: Array, scale: float, offset: float) -> Array:
    """Code times scale plus offset, in float32."""
    return code * np.float32(scale) + np.float32(offset)
