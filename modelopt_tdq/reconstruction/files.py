"""Files of a reconstruction in ``cache_dir``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.files import arrays_path, read_arrays, write_arrays

__all__ = ["is_complete", "read", "write"]

_SCHEMA_VERSION = 2


def is_complete(stem: Path) -> bool:
    """Whether a file of a reconstruction is there; it is written in one step."""
    return arrays_path(stem).is_file()


def write(stem: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a file of a reconstruction."""
    write_arrays(stem, "reconstruction", _SCHEMA_VERSION, tensors, description)


def read(stem: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write` wrote.

    Raises:
        TdqError: It is missing, damaged or of a newer schema.
    """
    cure = "Delete the folder and start again, or pass another `cache_dir`"
    tensors, description = read_arrays(
        stem, "reconstruction", "file of a reconstruction", _SCHEMA_VERSION, field="cache_dir", cure=cure
    )
    return {name: value.to(device) for name, value in tensors.items()}, description
