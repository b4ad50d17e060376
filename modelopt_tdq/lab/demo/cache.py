"""Results of stages, kept in the output folder: an interrupted demo goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_tdq.core.files import read_arrays, write_arrays
from modelopt_tdq.errors import TdqError

__all__ = ["StageCache", "StageResult", "installed"]

#: To be raised whenever a stage computes something else for the same settings.
FORMAT = 5

_KIND = "DemoStage"

_PACKAGES = (
    "modelopt-tdq",
    "torch",
    "nvidia-modelopt",
    "diffusers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
)


def installed(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class StageResult:
    """What one stage found.

    Attributes:
        values: Plain data for JSON.
        tensors: Arrays.
        files: What it wrote besides, relative to the output folder; the result counts only while they are there.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: Sequence[str] = ()


class StageCache:
    """Stage results in ``<output>/cache``, each valid for what it depends on.

    Args:
        output: Folder of the demo.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / "cache"

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, stage: str, depends: Mapping[str, Any]) -> StageResult | None:
        """The stored result; None if there is none, it depends on something else, or it is damaged."""
        try:
            tensors, stored = read_arrays(self.folder / stage, _KIND, "result of a stage", FORMAT)
            if stored["key"] != _key(stage, depends):
                return None
            if not all((self.output / file).exists() for file in stored["files"]):
                return None
            return StageResult(stored["values"], tensors, stored["files"])
        except (TdqError, KeyError, TypeError):
            return None

    def store(self, stage: str, depends: Mapping[str, Any], result: StageResult) -> None:
        """Keep a result."""
        stored = {"key": _key(stage, depends), "values": result.values, "files": list(result.files)}
        write_arrays(self.folder / stage, _KIND, FORMAT, result.tensors, stored)


def _key(stage: str, depends: Mapping[str, Any]) -> str:
    versions = {package: installed(package) for package in _PACKAGES}
    content = {"stage": stage, "format": FORMAT, "versions": versions, "depends": depends}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
