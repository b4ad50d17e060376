"""Integer quantization of a finite set: every row of an array has a scale and a zero point of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.fake_quant import code_range, quantize
from modelopt_tdq.temporal_features.finite_set import row_scales

__all__ = ["quantized_rows", "require_codes"]


def _require_bits(num_bits: int | None) -> None:
    if type(num_bits) is not int or not 2 <= num_bits <= 8:
        raise TdqError("num_bits", num_bits, "not a number of bits of int8 codes", "Use 2 to 8")


def require_codes(codes: Tensor, scale: Tensor | None, offset: Tensor | None, num_bits: int | None) -> None:
    """See that codes [K, ...] fit their bits, and the scales [K] the codes.

    Raises:
        TdqError: They do not.
    """
    _require_bits(num_bits)
    low, high = code_range(num_bits or 8)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise TdqError(
            "codes",
            (int(codes.min()), int(codes.max())),
            f"outside the codes of {num_bits} bits, {low:g} to {high:g}",
            "Pass the codes of this format, or the number of bits that they have",
        )
    for name, value in (("scale", scale), ("offset", offset)):
        if name == "offset" and value is None:
            continue
        if value is None or tuple(value.shape) != (len(codes),):
            shape = None if value is None else tuple(value.shape)
            raise TdqError(name, shape, f"not of shape [K] = [{len(codes)}]", "Pass one per row of the codes")
    if scale is not None and not (scale.isnan() | (scale > 0)).all():
        raise TdqError("scale", scale[~(scale > 0)], "a scale is not positive", "Use scales above zero")


def quantized_rows(values: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of each row; see :meth:`modelopt_tdq.temporal_features.table.Feature.quantized`.

    Args:
        values: [K, ...], any floating dtype.
        num_bits: 2 to 8.

    Returns:
        [K, ...] int8, [K] float32, [K] float32.

    Raises:
        TdqError: A value is NaN or infinite, or ``num_bits`` is out of range.
    """
    _require_bits(num_bits)
    if values.dim() == 0 or not values.numel():
        raise TdqError("values", tuple(values.shape), "not of shape [K, ...] with K >= 1", "Pass one row per time")
    flat = values.detach().to("cpu", torch.float32).reshape(len(values), -1)
    if not torch.isfinite(flat).all():
        row = int((~torch.isfinite(flat)).any(1).nonzero()[0])
        raise TdqError("values", row, "this row holds NaN or infinity", "Compute the features from finite weights")
    scale, offset, *_ = row_scales(flat, num_bits)
    column = None if offset is None else offset[:, None]
    codes = quantize(flat, scale[:, None], column, num_bits).to(torch.int8).reshape(values.shape)
    return codes, scale, torch.zeros_like(scale) if offset is None else offset
