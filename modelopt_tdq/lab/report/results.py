"""The results file of the demo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError

__all__ = ["KIND", "SCHEMA_VERSION", "demo_model", "load_results"]

SCHEMA_VERSION = 1
KIND = "modelopt_tdq.demo"

_REQUIRED = ("rows", "timesteps", "settings", "machine", "versions", "created", "command", "notes", "figures")


#: Of results that were written before the demo had a choice.
_ONLY_MODEL = {
    "name": "unet",
    "title": "Bundled CIFAR-10 denoiser, a U-Net of 2.6 M parameters",
    "predicts": "noise",
    "remark": "The activation ranges of this small, barely trained model move little over time.",
}


def demo_model(results: dict[str, Any]) -> dict[str, str]:
    """What the results say of their model: its name, a title, what it predicts, and a remark on its ranges."""
    model: dict[str, str] = results.get("model", _ONLY_MODEL)
    return model


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``results.json``.

    Raises:
        TdqError: It is missing, no results file, or written by a newer version.
    """
    file = Path(path)
    if not file.is_file():
        raise TdqError("results", str(file), "no such file", "Name the results.json of modelopt-tdq demo")
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise TdqError("results", str(file), f"not JSON ({error})", "Run the demo again") from error
    if not isinstance(results, dict) or results.get("kind") != KIND:
        raise TdqError("results", str(file), "not the results of a demo", "Name the results.json of modelopt-tdq demo")
    version = results.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise TdqError("schema_version", version, f"not readable here ({SCHEMA_VERSION})", "Upgrade modelopt-tdq")
    if missing := [name for name in _REQUIRED if name not in results]:
        raise TdqError("results", missing, "these parts are missing", "Run the demo again")
    return results
