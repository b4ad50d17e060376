"""ONNX to TensorRT engine, in a process of its own, with a report of every fused kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.export.table_input import ROWS
from modelopt_tdq.runtime.engine_report import EngineReport, parse_layers, sha256
from modelopt_tdq.runtime.onnx_model import OnnxFacts, read_onnx

__all__ = ["BACKENDS", "DEFAULT_COMPUTE_CAPABILITIES", "build_engine"]

#: Backend (the library's import name) to the extra that installs it.
BACKENDS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}

#: Ada and consumer Blackwell: the oldest and the newest GPUs with FP8 that TensorRT-RTX names.
DEFAULT_COMPUTE_CAPABILITIES = ("8.9", "12.0")

#: Compute capability from which a type has tensor-core kernels. Below, TensorRT-RTX refuses FP8, and
#: runs INT8 in float without a word.
_FIRST_WITH = {"FP8": (8, 9), "INT8": (8, 0)}

#: Smallest, most likely and largest batch, where the model leaves it open and the caller does not say.
DEFAULT_BATCH = (1, 2, 16)

#: Likewise for the rows of a table that is an input: the whole schedule of a model with 1000 training steps.
DEFAULT_ROWS = (1, 50, 1000)


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt_rtx",
    compute_capabilities: Sequence[str] = DEFAULT_COMPUTE_CAPABILITIES,
    dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
    log_path: str | os.PathLike[str] | None = None,
) -> EngineReport:
    """Build an engine, and write it with its manifest (``<engine_path>.json``).

    Both appear only when the build succeeded; an older engine stays until then. The build runs in a
    process of its own, so a crash of the native builder is an error like any other.

    Args:
        onnx_path: The model, as :func:`~modelopt_tdq.export_onnx` writes it.
        engine_path: Where the engine goes.
        backend: ``"tensorrt_rtx"`` builds ahead of time, also on a machine without a GPU. ``"tensorrt"``
            (10.13 or later) builds for the GPU of this machine.
        compute_capabilities: GPUs that TensorRT-RTX compiles for, as ``"8.9"``. TensorRT takes none.
        dynamic_sizes: Named dimensions that the model leaves open, to their smallest, most likely and
            largest size. A leading dimension not named here is a batch of 1, 2, 16; the rows of a table that is
            an input are 1, 50, 1000.
        log_path: Where the builder's verbose log goes. By default it is kept, as ``<engine_path>.log``,
            only if the build fails.

    Raises:
        TdqError: An argument cannot be used, the model does not parse, needs a type that a target cannot
            run, or the builder fails or crashes.
        MissingExtraError: The backend is not installed.
    """
    _check_backend(backend, compute_capabilities)
    onnx_file, engine = Path(onnx_path).absolute(), Path(engine_path).absolute()
    if engine.is_dir() or not engine.parent.is_dir():
        problem = "it is a folder" if engine.is_dir() else "its folder does not exist"
        raise TdqError("engine_path", str(engine_path), problem, "Name a file in an existing folder")
    facts = read_onnx(onnx_file)
    if backend == "tensorrt_rtx":
        _check_types(facts, compute_capabilities)
    profile = _profile(facts, dynamic_sizes or {})
    targets = tuple(compute_capabilities) if backend == "tensorrt_rtx" else ()
    log = Path(log_path).absolute() if log_path is not None else engine.with_name(engine.name + ".log")
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as folder:
        partial = Path(folder) / engine.name
        answer = _run_worker(
            {
                "backend": backend,
                "onnx": str(onnx_file),
                "engine": str(partial),
                "log": str(log),
                "answer": str(Path(folder) / "answer.json"),
                "compute_capabilities": targets,
                "profile": profile,
            },
            Path(folder) / "request.json",
        )
        report = EngineReport(
            engine=engine,
            backend=backend,
            backend_version=answer["version"],
            compute_capabilities=targets,
            engine_sha256=sha256(partial),
            onnx_sha256={file.name: sha256(file) for file in (onnx_file, *facts.external_data)},
            quantized=facts.quantized,
            layers=parse_layers(answer["layers"]),
        )
        os.replace(partial, engine)
    report.save()
    if log_path is None:
        log.unlink(missing_ok=True)
    return report


def _check_backend(backend: str, compute_capabilities: Sequence[str]) -> None:
    if backend not in BACKENDS:
        raise TdqError("backend", backend, "not a known backend", f"Use one of {', '.join(BACKENDS)}")
    if backend == "tensorrt":
        if tuple(compute_capabilities) != DEFAULT_COMPUTE_CAPABILITIES:
            raise TdqError(
                "compute_capabilities",
                compute_capabilities,
                "TensorRT builds for the GPU of this machine only",
                "Leave the argument out, or use backend='tensorrt_rtx'",
            )
        return
    well_formed = not isinstance(compute_capabilities, str) and all(
        isinstance(capability, str) and re.fullmatch(r"\d+\.\d", capability) for capability in compute_capabilities
    )
    if not well_formed or not compute_capabilities or len(set(compute_capabilities)) < len(compute_capabilities):
        raise TdqError(
            "compute_capabilities",
            compute_capabilities,
            "not a list of different compute capabilities",
            f"Pass strings such as {DEFAULT_COMPUTE_CAPABILITIES}",
        )


def _check_types(facts: OnnxFacts, compute_capabilities: Sequence[str]) -> None:
    for name in sorted(facts.quantized_types & set(_FIRST_WITH)):
        first = _FIRST_WITH[name]
        for capability in compute_capabilities:
            if tuple(int(part) for part in capability.split(".")) < first:
                raise TdqError(
                    "compute_capabilities",
                    capability,
                    f"TensorRT-RTX has no {name} kernels for this GPU, and the model is quantized to {name}",
                    f"Build for {first[0]}.{first[1]} or later" + (", or quantize to INT8" if name == "FP8" else ""),
                )


def _profile(facts: OnnxFacts, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, list[list[int]]]:
    """Input name to smallest, most likely and largest shape, for the inputs with open dimensions."""
    names = {size for shape in facts.inputs.values() for size in shape if isinstance(size, str)}
    if unknown := set(sizes) - names:
        raise TdqError(
            "dynamic_sizes",
            sorted(unknown),
            "the model has no open dimension of this name",
            f"Its open dimensions: {', '.join(sorted(names)) or 'none'}",
        )
    for name, sizes_of_name in sizes.items():
        if len(sizes_of_name) != 3 or not 0 < sizes_of_name[0] <= sizes_of_name[1] <= sizes_of_name[2]:
            raise TdqError(
                "dynamic_sizes",
                {name: sizes_of_name},
                "not three ascending sizes",
                "Pass smallest, most likely, largest",
            )
    batches = {shape[0] for shape in facts.inputs.values() if shape and isinstance(shape[0], str)}
    profile = {}
    for tensor, shape in facts.inputs.items():
        if all(isinstance(size, int) for size in shape):
            continue
        ranges: list[tuple[int, int, int]] = []
        for size in shape:
            if isinstance(size, int):
                ranges.append((size, size, size))
            elif size in sizes or size in batches:
                smallest, likely, largest = sizes.get(size, DEFAULT_ROWS if size == ROWS else DEFAULT_BATCH)
                ranges.append((smallest, likely, largest))
            else:
                raise TdqError(
                    "dynamic_sizes",
                    dict(sizes),
                    f"input {tensor!r} leaves its dimension {size!r} open",
                    f"Pass dynamic_sizes={{{size!r}: (smallest, most likely, largest)}}",
                )
        profile[tensor] = [[each[which] for each in ranges] for which in range(3)]
    return profile


def _run_worker(request: dict[str, Any], request_file: Path) -> dict[str, Any]:
    request_file.write_text(json.dumps(request))
    worker = Path(__file__).with_name("_build_worker.py")
    with open(request["log"], "ab") as log:
        done = subprocess.run(
            [sys.executable, str(worker), str(request_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    answer_file = Path(request["answer"])
    log_file = Path(request["log"])
    if log_file.stat().st_size == 0:
        log_file.unlink()
    if done.returncode != 0 or not answer_file.is_file():
        how = f"exit status {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        raise TdqError(
            "onnx_path",
            request["onnx"],
            f"the builder crashed ({how})",
            f"Its log is kept in {log_file}; a quantize scale that is not a constant is a known cause",
        )
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    if error := answer.get("error"):
        if error[0] == "missing":
            extra = BACKENDS[request["backend"]]
            raise MissingExtraError(
                "backend",
                request["backend"],
                f"it is not installed ({error[1]})",
                f"Install the extra that brings it: pip install 'modelopt-tdq[{extra}]'",
            )
        field, value, problem, cure = error
        raise TdqError(field, value, problem, cure)
    return answer
