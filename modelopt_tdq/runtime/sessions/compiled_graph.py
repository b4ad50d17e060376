"""Graphs that ONNX Runtime has compiled for a provider: EPContext nodes in the place of what it computes.

Such a file opens in a moment, on the provider, version and GPU that it was compiled for. It holds executable code, so
it is opened only with the manifest that was written with it, ``<file>.json``, or with ``trust=True``.

On the machine that this was written on only the CPU's provider was there, which compiles a graph to itself, without an
EPContext node: writing, manifest and errors are tested, TensorRT's and TensorRT-RTX's have not run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modelopt_tdq.core.files import replacing, require_writable
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.report import manifest_path, sha256
from modelopt_tdq.runtime.sessions.providers import Chosen, add_providers, resolved

__all__ = ["CompiledGraph", "compile_graph", "require_runnable"]

_SCHEMA, _KIND, _CONTEXT = 1, "modelopt_tdq.CompiledGraph", "EPContext"


@dataclass(frozen=True)
class CompiledGraph:
    """What a compiled graph was made by and for.

    Attributes:
        providers: As ONNX Runtime calls them, in order.
        versions: Of ONNX Runtime and of the providers' own packages.
        compute_capability: Of the GPU; None without one.
        files: Checksums of the graph and of all that lies beside it, by file name.
        onnx_sha256: Of the graph that was compiled, by file name.
        onnx_metadata: What that graph says about itself.
    """

    providers: tuple[str, ...]
    versions: Mapping[str, str]
    compute_capability: str | None
    files: Mapping[str, str]
    onnx_sha256: Mapping[str, str]
    onnx_metadata: Mapping[str, str]


def compile_graph(
    onnx_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    providers: Sequence[Chosen],
    dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
) -> CompiledGraph:
    """Compile an ONNX file for providers of ONNX Runtime, and write it with its manifest.

    :class:`~modelopt_tdq.OnnxRuntimeSession` opens it with the same providers. Weights and compiled code may lie in
    further files beside it, which belong to it.

    Args:
        onnx_path: Of the exported graph.
        path: Of the file to write.
        providers: As of :class:`~modelopt_tdq.OnnxRuntimeSession`.
        dynamic_sizes: Likewise.

    Raises:
        TdqError: A provider is not there, the graph cannot be compiled, or ``path`` names no file. Nothing is written
            then.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    ort = require("onnxruntime", "onnx")
    source, target = Path(onnx_path).absolute(), Path(path).absolute()
    facts = read_onnx(source)
    require_writable(target, "path")
    if source == target:
        raise TdqError("path", str(target), "it is onnx_path as well", "Name another file")
    options = ort.SessionOptions()
    for name, own in add_providers(ort, options, providers, source, dynamic_sizes):
        if name != "CPUExecutionProvider":  # which ONNX Runtime has of itself
            options.add_provider(name, own)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        try:
            ort.ModelCompiler(options, os.fspath(source)).compile_to_file(str(Path(folder) / target.name))
        except Exception as error:  # of ONNX Runtime, which has a class for each code
            raise TdqError(
                "onnx_path", str(source), f"ONNX Runtime cannot compile it ({error})", "Use other providers"
            ) from error
        made = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)  # the graph last
        compiled = CompiledGraph(
            tuple(provider.name for provider, _ in map(resolved, providers)),
            _versions(providers),
            _capability(),
            {file.name: sha256(file) for file in made},
            {file.name: sha256(file) for file in (source, *facts.external_data)},
            facts.metadata,
        )
        places = [target.parent / file.name for file in made]
        with replacing(*places, manifest_path(target)) as partial:
            for file, place in zip(made, partial, strict=False):
                os.replace(file, place)
            content = {"schema_version": _SCHEMA, "kind": _KIND, **asdict(compiled)}
            partial[-1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return compiled


def require_runnable(file: Path, providers: Sequence[Chosen], trust: bool = False) -> CompiledGraph | None:
    """The manifest of a compiled graph, if it is one and can run here.

    Args:
        file: Any ONNX file.
        providers: That are to compute it.
        trust: Open a compiled graph without a manifest, or with one that is not its own.

    Raises:
        TdqError: It was compiled for another provider, version or GPU; it was changed since; or it has no manifest.
    """
    wanted = [provider.name for provider, _ in map(resolved, providers)]
    compiled = _read(manifest_path(file))
    if compiled is None:
        only_cpu = set(wanted) == {"CPUExecutionProvider"}  # which has no use for such nodes, and says so
        if not only_cpu and not trust and _has_context(file):
            raise TdqError(
                "model",
                str(file),
                f"it holds compiled code ({_CONTEXT} nodes) and no manifest that says whose",
                "Write it with modelopt_tdq.compile_graph; or pass trust=True if you know who compiled it",
            )
        return None
    again = f"Compile it again: modelopt_tdq.compile_graph(onnx_path, {file.name!r}, providers={list(wanted)})"
    for name, expected in compiled.files.items():
        part = file.parent / name
        if not part.is_file() or (sha256(part) != expected and not trust):
            raise TdqError("model", str(part), "it is missing or was changed since it was compiled", again)
    if list(compiled.providers) != wanted:
        raise TdqError(
            "providers", wanted, f"{file.name} was compiled for {', '.join(compiled.providers)}", f"Use these. {again}"
        )
    here = _versions(providers)
    for package, version in compiled.versions.items():
        if here.get(package) != version:
            raise TdqError(
                "model",
                str(file),
                f"it was compiled by {package} {version}, and here is {here.get(package, 'none')}",
                f"Install {package}=={version}. {again}",
            )
    if compiled.compute_capability not in (None, _capability()):
        raise TdqError(
            "model",
            str(file),
            f"it was compiled for a GPU of compute capability {compiled.compute_capability}, and here is "
            f"{_capability() or 'none'}",
            again,
        )
    return compiled


def _read(manifest: Path) -> CompiledGraph | None:
    """None if there is none, or if it is that of something else."""
    if not manifest.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        if content.get("kind") != _KIND:
            return None
        if int(content["schema_version"]) > _SCHEMA:
            raise TdqError(
                "schema_version", content["schema_version"], "written by a newer version", "Upgrade modelopt-tdq"
            )
        return CompiledGraph(
            tuple(content["providers"]),
            dict(content["versions"]),
            content["compute_capability"],
            dict(content["files"]),
            dict(content["onnx_sha256"]),
            dict(content["onnx_metadata"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TdqError(
            "model", str(manifest), f"no manifest of a compiled graph: {error}", "Compile it again"
        ) from error


def _has_context(file: Path) -> bool:
    onnx = require("onnx", "onnx")
    return any(node.op_type == _CONTEXT for node in onnx.load(str(file), load_external_data=False).graph.node)


def _versions(providers: Sequence[Chosen]) -> dict[str, str]:
    """Of ONNX Runtime, and of the packages that bring these providers."""
    found = {"onnxruntime": str(require("onnxruntime", "onnx").__version__)}
    packages = [provider.package for provider, _ in map(resolved, providers) if provider.package is not None]
    of_modules = importlib.metadata.packages_distributions() if packages else {}
    for package in packages:
        for distribution in of_modules.get(package, ()):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def _capability() -> str | None:
    """Of the GPU that this PyTorch sees."""
    return "{}.{}".format(*torch.cuda.get_device_capability(0)) if torch.cuda.is_available() else None
