"""Saved files that were changed: with a checksum that agrees all the same, or in the two files of earlier versions."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modelopt_tdq.core import files


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Arrays, description and checksum of a file that ``write_arrays`` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return arrays, json.loads(metadata["modelopt_tdq"]), metadata["sha256"]


def edit(
    path: Path,
    arrays: dict[str, Tensor] | None = None,
    text: str | None = None,
    sha256: str | None = None,
    **changes: Any,
) -> None:
    """Change the description (or its whole ``text``), or the arrays, and sign again (or write ``sha256``)."""
    old, description, _ = read(path)
    new = old if arrays is None else arrays
    text = json.dumps({**description, **changes}) if text is None else text
    save_file(new, path, {"modelopt_tdq": text, "sha256": sha256 or files._digest(text, new)})


def as_pair(path: Path) -> Path:
    """Make of it the two files of earlier versions; gives the path of the description."""
    arrays, description, _ = read(path)
    save_file(arrays, path)
    sidecar = path.with_suffix(".json")
    old = {key: value for key, value in description.items() if key != "kind"}
    sidecar.write_text(json.dumps({**old, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    return sidecar
