"""Which row a call reads, and what quantizers have there: found once per call, for all whose rows have the same times.

Finding a row takes a dozen small operators, as many as the rest of a quantizer; a model has hundreds of quantizers and,
almost always, one list of times. What they have in that row is gathered by one operator as well: from those that the
call before asked for, as they are when this one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["CallRows", "TimesKey", "call_rows", "current_rows"]

#: A buffer, how often it was written to, and where its memory was.
_Read = tuple[Tensor, int, int]


class TimesKey:
    """The times of a quantizer's rows as something to compare: read from the device only after somebody wrote to them.

    A cache, which is neither copied nor saved.
    """

    def __init__(self) -> None:
        self._read: tuple[Tensor, int, bytes] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TimesKey:
        return TimesKey()

    def __getstate__(self) -> dict[str, Any]:
        return {"_read": None}

    def __call__(self, bits: Tensor) -> bytes | None:
        """The content of ``bits`` [K] int32; None where it cannot be looked at."""
        if not _plain(bits):
            return None
        version, read = bits._version, self._read
        if read is None or read[0] is not bits or read[1] != version:
            self._read = read = (bits, version, bits.cpu().numpy().tobytes())
        return read[2]


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, and counts who writes to it."""
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


class CallRows:
    """The rows of one call, for quantizers whose rows have certain times, on one device.

    Args:
        rows: [1], [B] or [B, N] int64.
        before: The buffers of each quantizer that the call before asked for, by the quantizer's key.

    Attributes:
        rows: As above.
        asked: Likewise, of this call.
    """

    def __init__(self, rows: Tensor, before: dict[TimesKey, tuple[Tensor, ...]]) -> None:
        self.rows = rows
        self.asked: dict[TimesKey, tuple[Tensor, ...]] = {}
        self._gathered = _gather(rows, before)

    def values(self, key: TimesKey, buffers: tuple[Tensor, ...]) -> Sequence[Tensor] | None:
        """Float32, of the shape of ``rows``: what each buffer has there; None if it was not gathered, as it is now.

        Args:
            key: Of the quantizer.
            buffers: [K] int32 each, the bits of its rows.
        """
        self.asked[key] = buffers
        found = self._gathered.get(key)
        if found is None or len(found[0]) != len(buffers):
            return None
        for buffer, (before, count, address) in zip(buffers, found[0], strict=True):
            # an offloading hook fills a buffer right before its layer runs: by giving it other memory
            if buffer is not before or buffer._version != count or buffer.data_ptr() != address:
                return None
        return found[1]


def _gather(
    rows: Tensor, columns: dict[TimesKey, tuple[Tensor, ...]]
) -> dict[TimesKey, tuple[list[_Read], Sequence[Tensor]]]:
    """What was read, and the values in ``rows``; of the buffers that are of one kind."""
    kept: dict[TimesKey, list[_Read]] = {}
    shape = None
    for key, buffers in columns.items():
        if all(_plain(buffer) and buffer.device == rows.device for buffer in buffers):
            shape = shape or buffers[0].shape
            if all(buffer.shape == shape for buffer in buffers):
                kept[key] = [(buffer, buffer._version, buffer.data_ptr()) for buffer in buffers]
    if len(kept) < 2:
        return {}
    table = torch.stack([buffer for read in kept.values() for buffer, _, _ in read]).view(torch.float32)
    values = table[:, rows].unbind()
    found: dict[TimesKey, tuple[list[_Read], Sequence[Tensor]]] = {}
    start = 0
    for key, read in kept.items():
        found[key] = read, values[start : start + len(read)]
        start += len(read)
    return found


def call_rows(timestep: CurrentTimestep, bits: Tensor, key: TimesKey, device: torch.device) -> CallRows | None:
    """The rows of the call in progress; None where nothing can be kept for a call.

    Args:
        timestep: The model's.
        bits: [K] int32, the bits of the rows' times.
        key: The quantizer's, for these ``bits``.
        device: Where the activation is.

    Raises:
        TdqError: No call of the model is in progress.
    """
    found = None if torch.compiler.is_compiling() else timestep.found_rows  # compilers share what is computed twice
    content = None if found is None else key(bits)
    if found is None or content is None:
        return None
    where = (content, device, torch.is_inference_mode_enabled())
    rows = found.get(where)
    if rows is None:
        before = timestep.asked_before.get(where, {})
        rows = found[where] = CallRows(_row_index(timestep, bits, device), before)
    return rows


def current_rows(timestep: CurrentTimestep, bits: Tensor, key: TimesKey, device: torch.device) -> Tensor:
    """[1], [B] or [B, N] int64 on ``device``: the row of each time of the call in progress.

    Arguments and errors as :func:`call_rows`.
    """
    found = call_rows(timestep, bits, key, device)
    return _row_index(timestep, bits, device) if found is None else found.rows


def _row_index(timestep: CurrentTimestep, bits: Tensor, device: torch.device) -> Tensor:
    return row_index(timestep.require_each().to(device), bits.view(torch.float32).to(device))
