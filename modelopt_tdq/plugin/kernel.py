"""The lookup kernel, in Triton: the one source of every form in which it runs.

It is interpreted on the CPU by the tests, compiled to PTX for the Python plugin of TensorRT, and compiled to the same
PTX for the C++ plugin. TensorRT passes inputs, then sizes, then outputs; hence the order of the arguments.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
except ImportError:  # importable without Triton: only compiling and interpreting need it
    tl: Any = None  # type: ignore[no-redef]

__all__ = ["BLOCK_COLUMNS", "BLOCK_ROWS", "scale_lookup"]

#: Rows and columns that one program looks at together; powers of two.
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64


def scale_lookup(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    timestep_ptr,
    table_ptr,
    timesteps_ptr,
    rows,
    columns,
    scale_ptr,
    ratio_ptr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Look one time up in some columns; program (b, j) has time b and the columns from ``j * block_columns`` on.

        row = number of half-way points between neighbouring timesteps that lie below t
        scale[b, q] = table[row, q]
        ratio[b, q] = table[row, q] / s_ref[q],  s_ref[q] = largest power of two up to min over k of table[k, q]

    The half-way points are compared in float64, where they are exact (see ``modelopt_tdq.core.schedule.edges``). A
    column that holds a number below the smallest normal float32, or none above zero, has s_ref = 1.

    Args:
        timestep_ptr: [B] float32.
        table_ptr: [K, Q] float32.
        timesteps_ptr: [K] float32, strictly ascending.
        rows: K.
        columns: Q.
        scale_ptr: [B, Q] float32, written.
        ratio_ptr: [B, Q] float32, written.
        block_rows: Power of two.
        block_columns: Power of two.
    """
    sample = tl.program_id(0)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    inside = column < columns
    time = tl.load(timestep_ptr + sample).to(tl.float64)
    row = 0
    least = tl.full([block_columns], float("inf"), tl.float32)
    for first in range(0, rows, block_rows):
        k = first + tl.arange(0, block_rows)
        here = tl.load(timesteps_ptr + k, mask=k < rows, other=0.0).to(tl.float64)
        following = tl.load(timesteps_ptr + k + 1, mask=k + 1 < rows, other=0.0).to(tl.float64)
        below = ((here + following) * 0.5 < time) & (k + 1 < rows)
        row += tl.sum(below.to(tl.int32), axis=0)
        mask = (k < rows)[:, None] & inside[None, :]
        values = tl.load(table_ptr + k[:, None] * columns + column[None, :], mask=mask, other=float("inf"))
        least = tl.minimum(least, tl.min(values, axis=0))
    scale = tl.load(table_ptr + row * columns + column, mask=inside, other=1.0)
    # the exponent bits alone: the power of two at or below a positive normal number
    power = (least.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    usable = (least >= 1.1754943508222875e-38) & (least < float("inf"))
    reference = tl.where(usable, power, 1.0)
    output = sample * columns + column
    tl.store(scale_ptr + output, scale, mask=inside)
    # correctly rounded, hence exact for a power of two; a plain "/" compiles to an approximate division
    tl.store(ratio_ptr + output, tl.div_rn(scale, reference), mask=inside)
