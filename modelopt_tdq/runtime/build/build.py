"""ONNX to TensorRT engine, with a report of every fused kernel and of the precision of every quantized layer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import modelopt_tdq
from modelopt_tdq.core.files import replacing, require_writable
from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.install import install_command
from modelopt_tdq.runtime.build.onnx_model import OnnxFacts, read_onnx
from modelopt_tdq.runtime.build.options import (
    AOT_PLUGIN,
    BUILDERS,
    DEFAULT_COMPUTE_CAPABILITIES,
    HARDWARE_COMPATIBILITY,
    OLDEST_TENSORRT,
    BuildOptions,
)
from modelopt_tdq.runtime.build.precision import FloatLayersError, render_precision, require_low_precision
from modelopt_tdq.runtime.build.report import EngineReport, parse_layers, sha256
from modelopt_tdq.runtime.build.shape_profile import DEFAULT_BATCH, DEFAULT_ROWS, shape_profile

__all__ = ["BUILDERS", "DEFAULT_BATCH", "DEFAULT_COMPUTE_CAPABILITIES", "DEFAULT_ROWS", "build_engine", "run_builder"]


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt_rtx",
    compute_capabilities: Sequence[str] = DEFAULT_COMPUTE_CAPABILITIES,
    dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
    allow_float: bool = False,
    plugins: Sequence[str | os.PathLike[str]] = (),
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    timing_cache: str | os.PathLike[str] | None = None,
    log_path: str | os.PathLike[str] | None = None,
) -> EngineReport:
    """Build an engine, and write it with its manifest (``<engine_path>.json``).

    Both appear only when the build succeeded; an older engine stays until then. The build runs in a
    process of its own, so a crash of the native builder is an error like any other. A build in which a quantized
    layer runs in float fails: the error names the layers and has the ``report``, and the log ends with the table.

    Args:
        onnx_path: The model, as :func:`~modelopt_tdq.export_onnx` writes it.
        engine_path: Where the engine goes.
        backend: ``"tensorrt_rtx"`` builds ahead of time, also on a machine without a GPU. ``"tensorrt"``
            (10.13 or later) builds for the GPU of this machine.
        compute_capabilities: GPUs that TensorRT-RTX compiles for, as ``"8.9"``. TensorRT takes none.
        dynamic_sizes: Named dimensions that the model leaves open, to their smallest, most likely and
            largest size. A leading dimension not named here is a batch of 1, 2, 16; the rows of a table that is
            an input are 1, 50, 1000.
        allow_float: Write the engine although quantized layers run in float; the report names them.
        plugins: Libraries with plugins that the model needs; ``["aot"]`` for the Python form of TdqScaleLookup, whose
            kernel becomes part of the engine. TensorRT only.
        version_compatible: Let later versions of TensorRT run the engine, with the lean runtime library of this
            one beside it: the engine itself holds no host code. TensorRT only.
        hardware_compatibility: ``"same_compute_capability"`` or ``"ampere_plus"`` for an engine that runs on other
            GPUs too, at some cost in speed. TensorRT only.
        timing_cache: File with the times of kernels, to make the next build faster: used if it is there, written
            after the build. TensorRT ignores what it cannot use, and this function warns. TensorRT only.
        log_path: Where the builder's verbose log goes. By default it is kept, as ``<engine_path>.log``,
            only if the build fails.

    Raises:
        FloatLayersError: A quantized layer runs in float, and ``allow_float`` is False.
        TdqError: An argument cannot be used, the model does not parse, needs a type that a target cannot
            run or a plugin that is not there, or the builder fails or crashes.
        MissingExtraError: The backend is not installed.
    """
    options = BuildOptions(
        backend, compute_capabilities, plugins, version_compatible, hardware_compatibility, timing_cache
    )
    options.check()
    onnx_file, engine = Path(onnx_path).absolute(), Path(engine_path).absolute()
    require_writable(engine, "engine_path")
    if timing_cache is not None:
        require_writable(timing_cache, "timing_cache")
    facts = read_onnx(onnx_file)
    options.check(facts)
    profile = shape_profile(facts, dynamic_sizes or {})
    log = Path(log_path).absolute() if log_path is not None else engine.with_name(engine.name + ".log")
    engine.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    cache = None if timing_cache is None else Path(timing_cache).absolute()
    with tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as folder:
        partial = Path(folder) / engine.name
        answer = _built(
            facts,
            {
                "backend": backend,
                "oldest": OLDEST_TENSORRT,
                "install": install_command(BUILDERS[backend]),
                "onnx": str(onnx_file),
                "engine": str(partial),
                "log": str(log),
                "answer": str(Path(folder) / "answer.json"),
                "compute_capabilities": options.targets,
                "profile": profile,
                "plugins": [asdict(plugin) for plugin in facts.plugins],
                "libraries": options.libraries,
                "aot_plugin": AOT_PLUGIN in plugins,
                "package": str(Path(modelopt_tdq.__file__).parent),
                "version_compatible": version_compatible,
                "hardware_compatibility": HARDWARE_COMPATIBILITY[hardware_compatibility],
                "timing_cache": None if cache is None else str(cache),
                "new_timing_cache": str(Path(folder) / "timing.cache"),
            },
            Path(folder) / "request.json",
        )
        report = EngineReport(
            engine=engine,
            backend=backend,
            backend_version=answer["version"],
            compute_capabilities=options.targets or _own_capability(),
            engine_sha256=sha256(partial),
            onnx_sha256={file.name: sha256(file) for file in (onnx_file, *facts.external_data)},
            quantized=facts.quantized,
            layers=parse_layers(answer["layers"]),
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            plugins=facts.plugins if options.libraries else (),  # the Python form is part of the engine
            onnx_metadata=facts.metadata,
        )
        for text in answer["warnings"]:
            warnings.warn(text, stacklevel=2)
        if not allow_float:
            _require_low_precision(report, log)
        if cache is not None:
            _replace(Path(folder) / "timing.cache", cache)
        os.replace(partial, engine)
    report.save()
    if log_path is None:
        log.unlink(missing_ok=True)
    return report


def _built(facts: OnnxFacts, request: dict[str, Any], request_file: Path) -> dict[str, Any]:
    """:func:`run_builder`, whose errors also tell of sizes that depend on numbers: not every builder knows these."""
    try:
        return run_builder(request, request_file)
    except MissingExtraError:
        raise
    except TdqError as error:
        if not facts.sized_by:
            raise
        names = list(facts.sized_by)
        cure = (
            f"{error.cure}. How large tensors of the graph are depends on the numbers of {', '.join(names)}: where "
            f"these are the same in every call, export with constants={names}"
        )
        raise TdqError(error.field, error.value, error.problem, cure) from error


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is, in one step; they may be on different disks."""
    with replacing(target) as (beside,):
        shutil.copyfile(new, beside)


def _own_capability() -> tuple[str, ...]:
    """That of the GPU that TensorRT builds for, if this PyTorch sees it."""
    if not torch.cuda.is_available():
        return ()
    return ("{}.{}".format(*torch.cuda.get_device_capability(0)),)


def _require_low_precision(report: EngineReport, log: Path) -> None:
    """Fail if a layer runs in float; the log, which is kept then, ends with the table."""
    try:
        require_low_precision(report)
    except FloatLayersError as error:
        from rich.console import Console

        with log.open("a", encoding="utf-8") as file:
            Console(file=file, width=200, no_color=True).print(render_precision(report, full=True))
        kept = FloatLayersError(error.field, error.value, error.problem, f"{error.cure}. The table is in {log}")
        kept.report = report
        raise kept from None


def run_builder(request: dict[str, Any], request_file: Path) -> dict[str, Any]:
    """Build what ``request`` describes; returns the worker's answer.

    Raises:
        TdqError: What the worker says, or its crash.
        MissingExtraError: The backend is not installed.
    """
    request_file.write_text(json.dumps(request))
    worker = Path(__file__).with_name("worker.py")
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
            extra = BUILDERS[request["backend"]]
            raise MissingExtraError(
                "backend",
                request["backend"],
                f"it is not installed ({error[1]})",
                f"Install the extra that brings it: {install_command(extra)}",
            )
        field, value, problem, cure = error
        raise TdqError(field, value, problem, cure)
    return answer
