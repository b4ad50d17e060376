"""Feature: the output of one layer that depends on the time alone, at the calibrated times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from modelopt_tdq.core.fake_quant import code_range, quantize
from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.finite_set import row_scales
from modelopt_tdq.temporal_features.lookup import Rows

__all__ = ["ARRAYS", "Feature", "own_array", "quantized_rows", "require_codes"]


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


#: Names of what a feature may hold.
ARRAYS = ("values", "codes", "scale", "offset")


@dataclass(frozen=True, eq=False)
class Feature:
    """One layer's output per sample, [...], at K times: values as they are, or integer codes with a scale per row.

    Attributes:
        values: [K, ...] float32 or float16 (other floats become float32); None with ``codes``.
        codes: [K, ...] int8; None with ``values``.
        scale: [K] float32, positive, of the codes: ``x_hat = code * scale + offset``.
        offset: [K] float32, the value of code 0; None where it is 0.
        num_bits: Of the codes, 2 to 8.

    Raises:
        TdqError: Both or neither of values and codes, a dtype or shape that does not fit, codes outside the range of
            ``num_bits``.
    """

    values: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    num_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ARRAYS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, own_array(name, value))
        if (self.values is None) == (self.codes is None):
            raise TdqError("values", self.values, "needs either values or codes", "Pass one of the two")
        if self._data.dim() == 0 or not len(self._data):
            raise TdqError("values", tuple(self._data.shape), "not of shape [K, ...], K >= 1", "Pass one row per time")
        if self.codes is not None:
            require_codes(self.codes, self.scale, self.offset, self.num_bits)
        elif any(value is not None for value in (self.scale, self.offset, self.num_bits)):
            raise TdqError("scale", self.scale, "values have no scale, offset or bits", "Leave them out")

    @classmethod
    def quantized(cls, values: Tensor, num_bits: int) -> Feature:
        """Quantize every row with its own scale and zero point: *finite set calibration* of the paper.

        ``s = (high - low) / (2^b - 1)``, integer ``z``, ``o = -z * s``. ``low`` and ``high`` are the least and greatest
        value of the row, moved towards the row's mean by that one of 41 factors that leaves the least squared error.

        Args:
            values: [K, ...], any floating dtype.
            num_bits: 2 to 8.

        Raises:
            TdqError: A value is NaN or infinite, or ``num_bits`` is none of these.
        """
        codes, scale, offset = quantized_rows(values, num_bits)
        return cls(None, codes, scale, offset, num_bits)

    @property
    def _data(self) -> Tensor:
        return cast("Tensor", self.codes if self.values is None else self.values)

    @property
    def rows(self) -> Rows:
        """What a lookup takes its rows from."""
        return Rows(self._data, self.scale, self.offset)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one sample's feature."""
        return tuple(self._data.shape[1:])

    def __len__(self) -> int:
        return len(self._data)

    def dense(self) -> Tensor:
        """[K, ...] float32: the features that a lookup gives."""
        return self.rows.take(torch.arange(len(self)))

    def arrays(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name in ARRAYS if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the deployed form. A code takes one byte, below 8 bits too: graphs have no smaller lookup."""
        return sum(value.nbytes for value in self.arrays().values())

    @property
    def packed_nbytes(self) -> int:
        """Bytes if codes took ``num_bits`` bits each, every row on whole bytes: for storage, not as deployed."""
        if self.codes is None or self.num_bits is None:
            return self.nbytes
        row = math.ceil(math.prod(self.row_shape) * self.num_bits / 8)
        return self.nbytes - self.codes.nbytes + len(self) * row


def own_array(name: str, value: Any) -> Tensor:
    """A copy on the CPU, which nobody else can change: codes as int8, half-precision values as they are."""
    try:
        tensor = torch.as_tensor(value).detach().to("cpu")
        if name == "codes":
            codes = tensor.to(torch.int8)
            if not torch.equal(codes.to(torch.float64), tensor.to(torch.float64)):
                raise TdqError(name, tensor.dtype, "these are no int8 codes", "Pass whole numbers from -128 to 127")
            return codes.clone().contiguous()
        keep = name == "values" and tensor.dtype == torch.float16
        return tensor.to(tensor.dtype if keep else torch.float32).clone().contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TdqError(name, value, f"not an array of numbers ({error})", "Pass a tensor") from error
