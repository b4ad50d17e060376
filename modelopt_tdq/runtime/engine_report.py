"""What a TensorRT engine is made of: its fused kernels, and which quantized layers they serve."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError

__all__ = [
    "LOW_PRECISION_TYPES",
    "EngineLayer",
    "EngineReport",
    "float_layers",
    "manifest_path",
    "parse_layers",
    "require_low_precision",
    "sha256",
]

MANIFEST_VERSION = 1

#: The types of a quantized operand, as TensorRT prints them.
LOW_PRECISION_TYPES = frozenset({"Int8", "FP8", "Int4", "FP4"})

# Entries of the list that launch nothing: events between streams.
_NOT_A_KERNEL = frozenset({"signal", "wait"})
# Generated elementwise code. It may read codes only to turn them into floats, so it proves nothing.
_ELEMENTWISE = frozenset({"kgen", "PointWise", "PointWiseV2", "Reformat", "Scale", "NoOp"})
# TensorRT 11 and TensorRT-RTX print "Datatype: Int8", TensorRT 10 "Format/Datatype: ... Int8 format".
_TYPE_NAMES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT4": "Int4"}
_TYPE = re.compile(r"(?<![A-Za-z])Datatype: (.*?)(?:, [A-Z][A-Za-z]*: | \}|$)")
_TYPE_WORD = re.compile(r"\b(Float|Half|BFloat16|FP32|FP16|BF16|FP8|FP4|Int(?:4|8|32|64)|Bool|UInt8)\b", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\s|\x1e|\[|$)")


@dataclass(frozen=True)
class EngineLayer:
    """One entry of the engine, usually a kernel that several ONNX nodes were fused into.

    Attributes:
        name: TensorRT's name.
        kind: TensorRT's layer type: ``correlation`` (convolution), ``gemm``, ``kgen`` (elementwise) ...
        inputs: Types of the tensors it reads, constants excluded: ``Int8``, ``FP8``, ``Float``, ``Half`` ...
        outputs: Types of the tensors it writes.
        onnx_nodes: Names of the ONNX nodes it does (part of) the work of.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether it launches anything."""
        return self.kind not in _NOT_A_KERNEL

    @property
    def low_precision(self) -> bool:
        """Whether it multiplies codes: a convolution or product with a quantized operand."""
        return self.kind not in _ELEMENTWISE and not LOW_PRECISION_TYPES.isdisjoint(self.inputs)


@dataclass(frozen=True)
class EngineReport:
    """An engine, what it was built from, and its layers.

    Attributes:
        engine: The engine file.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        backend_version: Version of that library.
        compute_capabilities: The GPUs it was compiled for; empty for TensorRT, which builds for the GPU it runs on.
        engine_sha256: Checksum of the engine file.
        onnx_sha256: Checksum of the ONNX file, and of each file of external data, by file name.
        quantized: ONNX nodes with quantized operands, name to operator: what should run in low precision.
        layers: The entries of the engine, in execution order.
    """

    engine: Path
    backend: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    engine_sha256: str
    onnx_sha256: Mapping[str, str]
    quantized: Mapping[str, str]
    layers: tuple[EngineLayer, ...]

    @property
    def kernels(self) -> int:
        """Number of kernels that one call of the model launches."""
        return sum(layer.is_kernel for layer in self.layers)

    def low_precision(self, name: str) -> bool:
        """Whether the convolution or product ``name`` (an ONNX node) reads INT8 or FP8 codes in the engine.

        Raises:
            TdqError: No kernel of the engine carries that name.
        """
        serving = [layer for layer in self.layers if name in layer.onnx_nodes]
        if not serving:
            raise TdqError(
                "layer",
                name,
                "no kernel of the engine carries this name",
                "Use names of ONNX nodes; those with quantized operands are in `report.quantized`",
            )
        return any(layer.low_precision for layer in serving)

    def save(self) -> Path:
        """Write the manifest next to the engine."""
        target = manifest_path(self.engine)
        content = asdict(self) | {"engine": self.engine.name, "kernels": self.kernels}
        content = {"schema_version": MANIFEST_VERSION, "kind": "modelopt_tdq.Engine"} | content
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, target)
        return target

    @classmethod
    def load(cls, engine: str | os.PathLike[str]) -> EngineReport:
        """Read the manifest of ``engine`` and check that the engine is the one it was written for.

        An engine is executable code: run only one that was built here, or by someone you trust.

        Raises:
            TdqError: A file is missing or no manifest, its schema is newer, or the engine's checksum differs.
        """
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
            )
        except (ValueError, KeyError, TypeError) as error:
            raise TdqError("manifest", str(manifest), f"no manifest of an engine: {error}", "Build again") from error
        if newer:
            raise TdqError(
                "schema_version", content["schema_version"], "written by a newer version", "Upgrade modelopt-tdq"
            )
        if sha256(path) != report.engine_sha256:
            raise TdqError(
                "engine", str(path), "its checksum is not the manifest's: changed since it was built", "Build again"
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


def float_layers(report: EngineReport, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The quantized layers that run in float all the same: TensorRT falls back without a word.

    Args:
        report: What :func:`~modelopt_tdq.build_engine` returned.
        names: ONNX nodes to check; by default all that have quantized operands.

    Raises:
        TdqError: No kernel of the engine carries one of ``names``.
    """
    return tuple(name for name in (report.quantized if names is None else names) if not report.low_precision(name))


def require_low_precision(report: EngineReport, names: Sequence[str] | None = None) -> None:
    """Fail unless every quantized layer has a kernel that reads codes. Arguments as :func:`float_layers`.

    Raises:
        TdqError: Some run in float; the error names them.
    """
    if fallen := float_layers(report, names):
        operators = sorted({report.quantized.get(name, "?") for name in fallen})
        raise TdqError(
            "layers",
            list(fallen),
            f"{len(fallen)} quantized layers ({', '.join(operators)}) run in float in {report.engine.name}",
            'Export with lowering="ratio", whose quantize scales are constants; leave operators that the backend has '
            "no low-precision kernel for (ConvTranspose on TensorRT-RTX) out of `quant_cfg`",
        )


def parse_layers(message: str) -> tuple[EngineLayer, ...]:
    """The entries of TensorRT's verbose ``Layers:`` message, printed when profiling verbosity is DETAILED.

    Raises:
        TdqError: An entry has another form.
    """
    lines = message.removeprefix("Layers:").lstrip("\n").split("\n\n", 1)[0].split("\n")
    return tuple(_parse_layer(line) for line in lines if line.strip())


def _parse_layer(line: str) -> EngineLayer:
    head = re.match(r"Name: (.*?), LayerType: (.*?), ", line)
    inputs, outputs = _bracket(line, ", Inputs: "), _bracket(line, ", Outputs: ")
    if head is None or inputs is None or outputs is None:
        raise TdqError(
            "layers",
            line,
            "TensorRT describes its layers in a form not known here",
            "Please report it with the version of TensorRT",
        )
    nodes = tuple(dict.fromkeys(_NODE.findall(line.rpartition("Metadata:")[2])))
    return EngineLayer(head[1], head[2], _types(inputs), _types(outputs), nodes)


def _bracket(line: str, field: str) -> str | None:
    """The bracketed list after ``field``."""
    start = line.find(field + "[")
    if start < 0:
        return None
    start += len(field)
    depth = 0
    for position in range(start, len(line)):
        depth += {"[": 1, "]": -1}.get(line[position], 0)
        if depth == 0:
            return line[start + 1 : position]
    return None


def _types(tensors: str) -> tuple[str, ...]:
    names = []
    for value in _TYPE.findall(tensors):
        word = _TYPE_WORD.search(value)
        name = word[1] if word else value
        names.append(_TYPE_NAMES.get(name.upper(), name))
    return tuple(names)
