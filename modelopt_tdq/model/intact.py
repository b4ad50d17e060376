"""Buffers that nobody may compute with: a checksum tells when somebody has.

Scales are kept as the bits of integers, which casts leave alone, so that they stay exact. But whoever averages all
buffers of a model, as ``AveragedModel(use_buffers=True)`` does, averages bits and indices, and rounds what is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["Intact", "averaged", "checksum", "writes"]

#: Odd 64-bit numbers, for mixing.
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)

#: Few enough bits that float32 holds them.
_BITS = (1 << 24) - 1


def checksum(buffers: Sequence[Tensor]) -> Tensor:
    """[1] int64, on the device of ``buffers``: of integers, or of the bits of float32. An average has another one."""
    total = torch.zeros(1, dtype=torch.int64, device=buffers[0].device)
    for number, buffer in enumerate(buffers):
        integers = buffer.detach().view(torch.int32) if buffer.dtype == torch.float32 else buffer.detach()
        values = integers.reshape(-1).to(torch.int64)
        mixed = (values + torch.arange(number, number + len(values), device=values.device) * _MIX[0]) * _MIX[1]
        mixed = (mixed ^ (mixed >> 29)) * _MIX[2]
        total = total * _MIX[1] + (mixed ^ (mixed >> 31)).sum()
    return (total ^ (total >> 24) ^ (total >> 48)) & _BITS


def writes(tensor: Tensor) -> int:
    """How often somebody wrote to ``tensor``; -1 where nobody counts, in inference mode."""
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
        now = [(tensor, writes(tensor)) for tensor in (*buffers, expected)]
        if len(now) == len(self._checked) and all(
            tensor is before and count == then
            for (tensor, count), (before, then) in zip(now, self._checked, strict=True)
        ):
            return True
        if any(tensor.is_meta for tensor, _ in now):
            return True
        if not torch.equal(checksum(buffers), expected):
            return False
        self._checked = now
        return True


def averaged(field: str, value: Any, what: str) -> TdqError:
    """The error for buffers that are not intact.

    Args:
        field: What they belong to.
        value: Its name, or names.
        what: They are.
    """
    return TdqError(
        field,
        value,
        f"somebody has computed with the buffers that hold {what}, as AveragedModel(use_buffers=True) does; they are "
        "bits, which have no average",
        "Average with use_buffers=False, or copy the buffers of the trained model when it is done: "
        "for mine, its in zip(averaged.module.buffers(), model.buffers()): mine.copy_(its)",
    )
