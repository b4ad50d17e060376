"""Two measures of a difference: against the quantization noise, and in codes.

Two correct implementations of a quantized model do not agree bit by bit: floating-point sums in another
order now and then move a value across a rounding boundary, and each such flip spreads. A tolerance per
element that lets this pass lets bugs pass as well. So:

- The *output* is compared with the quantization noise: what quantization itself changed, reference minus
  full precision. A correct implementation differs by less (seen on the bundled model: 3 to 13 dB at W8A8),
  wrong scales by more once they touch enough of the model.
- *Codes* are compared layer by layer, each layer being given the reference's codes everywhere else. Then
  only flips of this one layer are left (seen: 113 of 23.5 million), and a wrong scale shows: one that is wrong
  by a small share d moves about d times the mean |code| of all codes across a boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelopt_tdq.core.metrics import sqnr_db

__all__ = ["TOLERANCES", "CodesDifference", "OutputDifference", "codes_difference", "interior", "output_difference"]

#: Share of codes that rounding may move, once all other layers are given the reference's codes. A value v = x / s
#: flips if a boundary lies within its error: a share 2 |error| of all values. Sums of float32 in another order
#: err by about 1e-6 v, and v is at most 127: 2.5e-4 if all were that large, times 4 for long sums.
FLIP_RATE = 1e-3

#: And this many in any case: a layer may have only a few hundred values.
FLIPS = 2

#: Differences below this share of the signal are those of float32 itself, quantized or not: some 100 roundings. In
#: float16 it is two of its roundings.
_FLOAT32 = 1e-5

#: For people who read a comparison: what is allowed.
TOLERANCES = (
    "Allowed: an output may differ from the reference's by as much as quantization itself changed it at that step, in "
    "mean square; no element by more than twice the largest such change. Where layers compute with the reference's "
    f"codes, rounding may move {FLIPS} + {FLIP_RATE:g} N of the N codes of a layer, each by one step, and the output "
    f"by {_FLOAT32:g} of its largest element (two roundings in float16)."
)

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutputDifference:
    """An output against the reference, with the quantization noise as the measure.

    Attributes:
        sqnr_db: Reference to difference, in dB: higher is closer.
        noise_db: Reference to quantization noise, in dB: what ``sqnr_db`` must reach.
        largest: Largest absolute difference.
        largest_allowed: What ``largest`` must not exceed: twice the largest absolute quantization noise. Where the
            output under test is as near to full precision as the reference, the two may lie on either side of it.
        measure: What is called noise here.
    """

    sqnr_db: float
    noise_db: float
    largest: float
    largest_allowed: float
    measure: str = "the quantization noise"

    @property
    def passed(self) -> bool:
        """Whether the difference is smaller than the quantization noise; never if it is NaN."""
        return self.sqnr_db >= self.noise_db and self.largest <= self.largest_allowed

    def __bool__(self) -> bool:
        """For Polygraphy, which takes what a comparison returns as its verdict."""
        return self.passed

    def __str__(self) -> str:
        return (
            f"difference {self.sqnr_db:.1f} dB below the signal (allowed: {self.noise_db:.1f} dB, {self.measure}), "
            f"largest {self.largest:.3g} (allowed: {self.largest_allowed:.3g})"
        )


def output_difference(reference: _Array, output: _Array, full_precision: _Array | None) -> OutputDifference:
    """Compare an output with the reference's.

    Args:
        reference: Of the reference implementation of the quantized model; any shape.
        output: Of the implementation under test; same shape.
        full_precision: Of the model without quantization; same shape. None where the codes in front of the output
            are the reference's: then nothing but the rounding of its own dtype may differ.
    """
    share = max(_FLOAT32, 2 * _epsilon(reference))
    measure = "the quantization noise" if full_precision is not None else "rounding"
    exact = np.asarray(reference if full_precision is None else full_precision, np.float64)
    reference, output = (np.asarray(a, np.float64) for a in (reference, output))
    wanted, got, unquantized = (torch.from_numpy(np.ascontiguousarray(a)) for a in (reference, output, exact))
    floor = share * float(np.abs(reference).max(initial=0.0))
    return OutputDifference(
        sqnr_db=sqnr_db(wanted, got),
        noise_db=min(sqnr_db(wanted, unquantized), -20 * math.log10(share)),
        largest=float(np.abs(output - reference).max(initial=0.0)),
        largest_allowed=max(2 * float(np.abs(reference - exact).max(initial=0.0)), floor),
        measure=measure,
    )


def _epsilon(values: _Array) -> float:
    dtype = np.asarray(values).dtype
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


@dataclass(frozen=True)
class CodesDifference:
    """The codes of one quantizer against the reference's.

    Attributes:
        name: Of the quantizer.
        differing: Number of codes that differ.
        count: Number of codes.
        largest: Largest difference, in steps of the number format.
    """

    name: str
    differing: int
    count: int
    largest: int

    @property
    def allowed(self) -> int:
        """How many codes rounding may move, each by one step."""
        return int(FLIPS + FLIP_RATE * self.count)

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference: few codes, each by one step."""
        return self.largest <= 1 and self.differing <= self.allowed

    def __bool__(self) -> bool:
        """For Polygraphy, which takes what a comparison returns as its verdict."""
        return self.passed

    def __str__(self) -> str:
        steps = "1 step" if self.largest == 1 else f"{self.largest} steps"
        return f"{self.differing} of {self.count} codes differ, by {steps} at most (allowed: {self.allowed}, by 1 step)"


def _steps(codes: _Array, fp8: bool) -> _Array:
    """Codes as integers that count the steps of their format."""
    if not fp8:
        integers: _Array = np.asarray(codes).astype(np.int64)
        return integers
    bits = torch.from_numpy(np.ascontiguousarray(codes, np.float32)).to(torch.float8_e4m3fn).view(torch.int8).numpy()
    magnitude = (bits & 0x7F).astype(np.int64)
    return np.where(bits < 0, -magnitude, magnitude)


def interior(shape: tuple[int, ...], padded: tuple[int, ...]) -> tuple[slice, ...] | None:
    """Where an array of ``shape`` lies in one that is padded by the same amount on both sides; None if it does not.

    A lowered layer with an offset pads its input before it quantizes; the reference does so behind.
    """
    if len(shape) != len(padded):
        return None
    margins = [large - small for small, large in zip(shape, padded, strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        return None
    return tuple(slice(m // 2, m // 2 + size) for m, size in zip(margins, shape, strict=True))


def codes_difference(name: str, reference: _Array, codes: _Array, *, fp8: bool = False) -> CodesDifference:
    """Compare codes.

    Args:
        name: Of the quantizer.
        reference: Codes of the reference, as any numeric dtype.
        codes: Codes of the implementation under test; the same shape, or padded around it.
        fp8: Whether they are FP8 E4M3 values; otherwise they are integers.
    """
    reference, codes = np.asarray(reference), np.asarray(codes)
    inside = interior(reference.shape, codes.shape)
    if inside is None:
        return CodesDifference(name, max(reference.size, 1), max(reference.size, 1), np.iinfo(np.int32).max)
    distance = np.abs(_steps(reference, fp8) - _steps(codes[inside], fp8))
    return CodesDifference(name, int(np.count_nonzero(distance)), distance.size, int(distance.max(initial=0)))
