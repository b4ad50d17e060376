"""The four numbers that one activation quantizer computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Scales"]


class Scales(NamedTuple):
    """Scale and offset of one quantizer, s and o, and those that turn its codes back, s' and o', if they differ.

    All of one shape: [K] for the rows of a table; [1] or [B, 1, ...] for one call of the model.

    Attributes:
        scale: float32, s.
        offset: float32, o; None where it is 0.
        dequant_scale: float32, s'; None where s' = s and o' = o.
        dequant_offset: float32, o'; None where it is 0, or ``dequant_scale`` is None.
    """

    scale: Tensor
    offset: Tensor | None = None
    dequant_scale: Tensor | None = None
    dequant_offset: Tensor | None = None

    @property
    def value_scale(self) -> Tensor:
        """The scale that turns codes back into values, s', whether it differs from s or not."""
        return self.scale if self.dequant_scale is None else self.dequant_scale

    @property
    def value_offset(self) -> Tensor | None:
        """The offset that turns codes back into values, o'; None where it is 0."""
        return self.offset if self.dequant_scale is None else self.dequant_offset

    def over_channels(self, divisor: Tensor | None, shift: Tensor | None = None) -> Scales:
        """Of an activation whose channels are divided by ``divisor`` c, and then shifted by ``shift`` v.

            q = rne((x / c - v - o) / s) = rne((x - p) / d),    d = s * c,    p = (o + v) * c
            x_hat / c = q * s' + (o' + v)

        The definition is the form with d and p, each of float32 products: one division instead of two.

        Args:
            divisor: float32, positive; broadcasts against the activation, as [C] or [C, 1, 1]. None: 1.
            shift: float32, likewise. None: 0.
        """
        offset, value_offset = _sum(self.offset, shift), _sum(self.value_offset, shift)
        if divisor is None:
            return Scales(self.scale, offset, self.dequant_scale, None if self.dequant_scale is None else value_offset)
        offset = None if offset is None else offset * divisor
        return Scales(self.scale * divisor, offset, self.value_scale, value_offset)

    def map(self, function: Callable[[Tensor], Tensor]) -> Scales:
        """``function`` of each of those that are there."""
        return Scales(*[None if value is None else function(value) for value in self])  # type: ignore[arg-type]

    def simplified(self) -> Scales:
        """The same arithmetic with as few tensors as it takes: no offsets of 0, no s' and o' that are s and o."""
        offset, dequant_offset = (None if v is None or not bool(v.any()) else v for v in (self.offset, self[3]))
        dequant_scale = self.dequant_scale
        if dequant_scale is None or (torch.equal(dequant_scale, self.scale) and _equal(offset, dequant_offset)):
            dequant_scale = dequant_offset = None
        return Scales(self.scale, offset, dequant_scale, dequant_offset)


def _sum(offset: Tensor | None, shift: Tensor | None) -> Tensor | None:
    return shift if offset is None else offset if shift is None else offset + shift


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right if left is None or right is None else torch.equal(left, right)
