"""Which row a call reads: found once per call, for all quantizers whose tables have rows at the same times.

Finding it takes a dozen small operators, as many as the rest of a quantizer; a model has hundreds of quantizers and,
almost always, one list of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["TimesKey", "current_rows"]


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
        if type(bits) is not Tensor or bits.is_meta or bits.is_inference():
            return None
        version = bits._version
        if self._read is None or self._read[0] is not bits or self._read[1] != version:
            self._read = (bits, version, bits.cpu().numpy().tobytes())
        return self._read[2]


def current_rows(timestep: CurrentTimestep, bits: Tensor, key: TimesKey, device: torch.device) -> Tensor:
    """[1], [B] or [B, N] int64 on ``device``: the row of each time of the call in progress.

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
        return row_index(timestep.require_each().to(device), bits.view(torch.float32).to(device))
    where = (content, device, torch.is_inference_mode_enabled())
    if where not in found:
        found[where] = row_index(timestep.require_each().to(device), bits.view(torch.float32).to(device))
    return found[where]
