"""Whether the folders that a user names hold what they are named for: seen at once, before anything is imported."""

from __future__ import annotations

import os
from pathlib import Path

from modelopt_tdq.errors import TdqError

__all__ = ["DESCRIPTION", "REFERENCE_NAMES", "is_path", "require_model", "require_quantized"]

#: Names of the models of :mod:`modelopt_tdq.lab.reference_models`.
REFERENCE_NAMES = ("unet", "dit", "terrain")

#: The file that tells a quantized model.
DESCRIPTION = "quantization.json"

#: Where ModelOpt's ``save_pretrained`` puts its state.
_MODELOPT_STATE = "modelopt_state.pth"


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether this can only be a local path, which is never looked up on the hub."""
    text = str(source)
    return not isinstance(source, str) or text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1


def require_model(source: str | os.PathLike[str] | None, subfolder: str | None = None) -> None:
    """Whether a model in full precision can be there; of one on the hub, nothing is known.

    Args:
        source: Name of a reference model, folder, or hub id; None for the bundled one.
        subfolder: Of the model in the folder.

    Raises:
        TdqError: It is a path to no folder, the folder holds no model, or one that is quantized already.
    """
    if source is None or (str(source) in REFERENCE_NAMES and subfolder is None):
        return
    folder = Path(source) / (subfolder or "")
    if (folder / _MODELOPT_STATE).is_file():
        raise TdqError("model", str(folder), "it is quantized already", "Name the full-precision model")
    if is_path(source) and not Path(source).is_dir():
        cure = "Name a folder of a diffusers model; or a hub id, owner/name"
        raise TdqError("model", str(source), "no such folder", cure)
    if Path(source).is_dir() and not (folder / "config.json").is_file():
        raise TdqError("model", str(folder), "it holds no config.json", "Name the folder of the model, or --subfolder")


def require_quantized(folder: str | os.PathLike[str]) -> None:
    """Whether a quantized model is there.

    Raises:
        TdqError: There is none.
    """
    if not (Path(folder) / DESCRIPTION).is_file():
        cure = "Name a folder written by modelopt-tdq quantize"
        raise TdqError("folder", str(folder), f"it holds no {DESCRIPTION}", cure)
