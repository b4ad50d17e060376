"""What a TensorRT engine is made of, and the manifest beside it that says so."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.build.layers import LOW_PRECISION_TYPES, EngineLayer, parse_layers
from modelopt_tdq.runtime.build.onnx_model import PluginNode
from modelopt_tdq.runtime.build.precision import (
    FloatLayersError,
    LayerPrecision,
    float_layers,
    layer_precisions,
    require_low_precision,
)

__all__ = [
    "LOW_PRECISION_TYPES",
    "EngineLayer",
    "EngineReport",
    "FloatLayersError",
    "LayerPrecision",
    "float_layers",
    "manifest_path",
    "parse_layers",
    "require_low_precision",
    "sha256",
]

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class EngineReport:
    """An engine, what it was built from, and its layers.

    Attributes:
        engine: The engine file.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        backend_version: Version of that library.
        compute_capabilities: The GPUs it was compiled for; for TensorRT the one it was built on, empty if unknown.
        engine_sha256: Checksum of the engine file.
        onnx_sha256: Checksum of the ONNX file, and of each file of external data, by file name.
        quantized: ONNX nodes with quantized operands, name to operator: what should run in low precision.
        layers: The entries of the engine, in execution order.
        version_compatible: Whether later versions of TensorRT can run it, with the lean runtime of this one.
        hardware_compatibility: ``none``, ``same_compute_capability`` or ``ampere_plus``.
        plugins: Plugins that have to be registered to run it.
        onnx_metadata: The metadata of the ONNX file, where the meaning of a table input is.
    """

    engine: Path
    backend: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    engine_sha256: str
    onnx_sha256: Mapping[str, str]
    quantized: Mapping[str, str]
    layers: tuple[EngineLayer, ...]
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    plugins: tuple[PluginNode, ...] = ()
    onnx_metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """In a line: kernels, and how many quantized layers run in low precision and in float."""
        low = sum(layer.low_precision for layer in self.precisions)
        fallen = sum(layer.in_float for layer in self.precisions)
        return (
            f"{self.engine}: {self.kernels} kernels, {low} of {len(self.quantized)} quantized layers in low "
            f"precision, {fallen} in float ({self.backend} {self.backend_version})"
        )

    @property
    def kernels(self) -> int:
        """Number of kernels that one call of the model launches."""
        return sum(layer.is_kernel for layer in self.layers)

    @property
    def precisions(self) -> tuple[LayerPrecision, ...]:
        """How each of the ``quantized`` layers runs."""
        return layer_precisions(self.layers, self.quantized)

    def low_precision(self, name: str) -> bool:
        """Whether the convolution or product ``name`` (an ONNX node) reads INT8 or FP8 codes in the engine.

        Raises:
            TdqError: No kernel of the engine carries that name.
        """
        wanted = self.quantized if name in self.quantized else {**self.quantized, name: "?"}
        found = next(layer for layer in layer_precisions(self.layers, wanted) if layer.name == name)
        if not found.kernel:
            raise TdqError(
                "layer",
                name,
                "no kernel of the engine carries this name",
                "Use names of ONNX nodes; those with quantized operands are in `report.quantized`",
            )
        return found.low_precision

    def save(self) -> Path:
        """Write the manifest next to the engine."""
        content = asdict(self) | {"engine": self.engine.name, "kernels": self.kernels}
        content = {"schema_version": MANIFEST_VERSION, "kind": "modelopt_tdq.Engine"} | content
        return write_text(manifest_path(self.engine), json.dumps(content, indent=1))

    @classmethod
    def load(cls, engine: str | os.PathLike[str]) -> EngineReport:
        """Read the manifest of ``engine`` and check that the engine is the one it was written for.

        An engine is executable code: run only one that was built here, or by someone you trust.

        Raises:
            TdqError: A file is missing or no manifest, its schema is newer, or the engine's checksum differs.
        """
        report = cls.read(engine)
        report.require_checksum(sha256(report.engine))
        return report

    def require_checksum(self, found: str) -> None:
        """Fail unless ``found`` is the checksum of the engine that this describes."""
        if found != self.engine_sha256:
            raise TdqError(
                "engine",
                str(self.engine),
                "its checksum is not the manifest's: changed since it was built",
                "Build again",
            )

    @classmethod
    def read(cls, engine: str | os.PathLike[str]) -> EngineReport:
        """Read the manifest of ``engine``, and do not look at the engine itself. Errors as of :meth:`load`."""
        path = Path(engine)
        manifest = manifest_path(path)
        for file in (path, manifest):
            if not file.is_file():
                raise TdqError(
                    "engine", str(file), "no such file", "build_engine writes the engine and its manifest side by side"
                )
        try:
            content: dict[str, Any] = json.loads(manifest.read_text())
            newer = int(content["schema_version"]) > MANIFEST_VERSION
            layers = tuple(
                EngineLayer(
                    entry["name"],
                    entry["kind"],
                    tuple(entry["inputs"]),
                    tuple(entry["outputs"]),
                    tuple(entry["onnx_nodes"]),
                )
                for entry in content["layers"]
            )
            report = cls(
                path,
                content["backend"],
                content["backend_version"],
                tuple(content["compute_capabilities"]),
                content["engine_sha256"],
                content["onnx_sha256"],
                content["quantized"],
                layers,
                bool(content.get("version_compatible", False)),
                str(content.get("hardware_compatibility", "none")),
                tuple(PluginNode(**plugin) for plugin in content.get("plugins", ())),
                dict(content.get("onnx_metadata", {})),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise TdqError("manifest", str(manifest), f"no manifest of an engine: {error}", "Build again") from error
        if newer:
            raise TdqError(
                "schema_version", content["schema_version"], "written by a newer version", "Upgrade modelopt-tdq"
            )
        return report


def manifest_path(engine: Path) -> Path:
    """The manifest of an engine: ``<engine>.json``."""
    return engine.with_name(engine.name + ".json")


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
