"""Files of a reconstruction: tensors as safetensors, their description as JSON with schema version and checksum."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["SCHEMA_VERSION", "is_complete", "read", "remove", "write"]

SCHEMA_VERSION = 1

_KIND = "modelopt_tdq.reconstruction"


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(stem: Path) -> bool:
    """Whether both files are there; the description is written last."""
    return all(path.is_file() for path in _paths(stem))


def write(stem: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json``; an interruption leaves no description without its tensors."""
    data, sidecar = _paths(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    partial = data.with_name(data.name + ".partial"), sidecar.with_name(sidecar.name + ".partial")
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, partial[0])
        head = {"kind": _KIND, "schema_version": SCHEMA_VERSION, "sha256": _digest(partial[0])}
        partial[1].write_text(json.dumps({**head, **description}, indent=1))
        sidecar.unlink(missing_ok=True)
        os.replace(partial[0], data)
        os.replace(partial[1], sidecar)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def read(stem: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write` wrote.

    Raises:
        TdqError: A file is missing, damaged or of a newer schema.
    """
    data, sidecar = _paths(stem)
    cure = "Delete the folder and start again, or pass another `cache_dir`"
    try:
        description = json.loads(sidecar.read_text())
        version, digest = int(description["schema_version"]), description["sha256"]
        if description["kind"] != _KIND:
            raise ValueError(description["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TdqError("cache_dir", str(sidecar), f"no file of a reconstruction ({error!r})", cure) from error
    if version > SCHEMA_VERSION:
        raise TdqError(
            "schema_version", version, f"newer than this version reads ({SCHEMA_VERSION})", "Upgrade modelopt-tdq"
        )
    try:
        if _digest(data) != digest:
            raise TdqError("cache_dir", str(data), f"it does not match the checksum in {sidecar.name}", cure)
        return load_file(data, device=str(device)), description
    except (OSError, SafetensorError) as error:
        raise TdqError("cache_dir", str(data), f"it cannot be read ({error!r})", cure) from error


def remove(stem: Path) -> None:
    """Delete both files, where they are there."""
    for path in reversed(_paths(stem)):
        path.unlink(missing_ok=True)
