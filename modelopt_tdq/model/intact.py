"""Floats kept as the bits of integers: arithmetic on those gives other numbers, which a checksum tells.

Casts leave integers alone, so the scales stay exact. But whoever averages all buffers of a model, as
``AveragedModel(use_buffers=True)`` does, averages bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["Intact", "averaged_bits", "checksum"]

#: Odd 64-bit numbers, for mixing.
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)

#: Few enough bits that float32 holds them.
_BITS = (1 << 24) - 1


def checksum(buffers: Sequence[Tensor]) -> Tensor:
    """[1] int64, on the device of ``buffers``: of the bits of integer tensors; that of an average is another."""
    total = torch.zeros(1, dtype=torch.int64, device=buffers[0].device)
    for number, buffer in enumerate(buffers):
        values = buffer.detach().reshape(-1).to(torch.int64)
        mixed = (values + torch.arange(number, number + len(values), device=values.device) * _MIX[0]) * _MIX[1]
        mixed = (mixed ^ (mixed >> 29)) * _MIX[2]
        total = total * _MIX[1] + (mixed ^ (mixed >> 31)).sum()
    return (total ^ (total >> 24) ^ (total >> 48)) & _BITS


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Intact:
    """Whether buffers still are what their checksum says; computed again only when somebody wrote to them."""

    def __init__(self) -> None:
        self._checked: list[tuple[Tensor, int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Intact:
        return Intact()

    def __getstate__(self) -> dict[str, Any]:
        return {"_checked": []}

    def __call__(self, buffers: Sequence[Tensor], expected: Tensor) -> bool:
        """True if they are, or cannot be looked at."""
        now = [(tensor, _version(tensor)) for tensor in (*buffers, expected)]
        if len(now) == len(self._checked) and all(
            tensor is before and version == then
            for (tensor, version), (before, then) in zip(now, self._checked, strict=True)
        ):
            return True
        if any(tensor.is_meta for tensor, _ in now):
            return True
        if not torch.equal(checksum(buffers), expected):
            return False
        self._checked = now
        return True


def averaged_bits(field: str, value: Any, what: str, cure: str) -> TdqError:
    """The error for buffers that are not intact.

    Args:
        field: What they belong to.
        value: Its name, or names.
        what: They are.
        cure: How to get the right ones.
    """
    return TdqError(
        field,
        value,
        f"{what} are kept as the bits of integers, and somebody has computed with those, as "
        "AveragedModel(use_buffers=True) does",
        f"Average with use_buffers=False, which copies the buffers; or {cure}",
    )
