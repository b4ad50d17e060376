"""From a file to an engine that may run: built here or trusted, by this release, for this GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.runtime.build.options import BUILDERS
from modelopt_tdq.runtime.build.report import EngineReport
from modelopt_tdq.runtime.sessions.device_queue import DeviceQueue

__all__ = ["LoadedEngine", "load_engine"]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine, and what has to live as long as it does.

    Attributes:
        trt: The library, ``tensorrt`` or ``tensorrt_rtx``.
        engine: TensorRT's engine.
        errors: The last messages of TensorRT, errors and warnings.
        report: Its manifest; None for a trusted engine without one.
        path: The file.
        keep: Logger and runtimes.
    """

    trt: Any
    engine: Any
    errors: deque[str]
    report: EngineReport | None
    path: Path
    keep: tuple[Any, ...]

    @property
    def backend(self) -> str:
        """Import name of the library."""
        return str(self.trt.__name__)

    def said(self) -> str:
        """The last messages, as part of a sentence."""
        return "; ".join(self.errors) or "no reason given"


def load_engine(
    path: str | os.PathLike[str],
    queue: DeviceQueue,
    *,
    backend: str | None = None,
    trust: bool = False,
    plugins: Sequence[str | os.PathLike[str]] = (),
    lean_runtime: str | os.PathLike[str] | None = None,
) -> LoadedEngine:
    """Load an engine, after everything that can be checked before has been.

    Args and errors: as of :class:`~modelopt_tdq.runtime.sessions.tensorrt.TensorRTSession`.
    """
    file = Path(path)
    report, content = _read(file, trust)
    name = _backend(backend, report)
    trt = require(name, BUILDERS[name])
    if report is not None:
        _check_version(trt, report, lean_runtime)
        _check_gpu(report, queue.capability)
    errors: deque[str] = deque(maxlen=3)
    logger = _logger(trt, errors)
    _load_plugins(trt, plugins, report)
    with queue.active():
        runtime = _runtime(trt, logger, errors)
        lean = runtime.load_runtime(os.fspath(lean_runtime)) if lean_runtime is not None else runtime
        if lean is None:
            raise TdqError(
                "lean_runtime", str(lean_runtime), f"it cannot be loaded ({'; '.join(errors)})", "Pass its path"
            )
        _check_validity(trt, runtime, content, file, errors)
        engine = lean.deserialize_cuda_engine(content)
    if engine is None:
        raise TdqError(
            "engine",
            str(file),
            f"{name} {trt.__version__} cannot load it: {'; '.join(errors) or 'no reason given'}",
            "Build it on this machine, with this version",
        )
    return LoadedEngine(trt, engine, errors, report, file, (logger, runtime, lean))


def _read(file: Path, trust: bool) -> tuple[EngineReport | None, bytes]:
    """The manifest, if it is this engine's; and the bytes that were checked against it."""
    if not file.is_file():
        raise TdqError("engine", str(file), "no such file", "Write it with build_engine")
    content = file.read_bytes()
    try:
        report = EngineReport.read(file)
        report.require_checksum(hashlib.sha256(content).hexdigest())
    except TdqError as error:
        if trust:
            return None, content
        cure = f"{error.cure}; or pass trust=True if you know who built it: an engine is executable code"
        raise TdqError(error.field, error.value, error.problem, cure) from error
    return report, content


def _backend(wanted: str | None, report: EngineReport | None) -> str:
    name = wanted or (report.backend if report is not None else None)
    if name not in BUILDERS:
        problem = "not a known backend" if name else "an engine without a manifest does not tell its backend"
        raise TdqError("backend", name, problem, f"Use one of {', '.join(BUILDERS)}")
    if report is not None and name != report.backend:
        raise TdqError("backend", name, f"{report.engine.name} was built by {report.backend}", "Leave the argument out")
    return name


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _check_version(trt: Any, report: EngineReport, lean_runtime: str | os.PathLike[str] | None) -> None:
    built, here = _release(report.backend_version), _release(trt.__version__)
    if built == here:
        return
    what = f"{report.engine.name} was built by {report.backend} {report.backend_version}"
    if not report.version_compatible or here < built:
        problem = f"{what}, and engines run in the release that built them"
        if report.version_compatible:
            problem = f"{what}, and runs in that release and later ones"
        raise TdqError(
            report.backend, trt.__version__, problem, f"Install {report.backend_version}, or build the engine again"
        )
    if lean_runtime is None or not Path(lean_runtime).is_file():
        raise TdqError(
            "lean_runtime",
            None if lean_runtime is None else str(lean_runtime),
            f"{what} to run in later ones too, which takes that version's lean runtime library",
            f"Pass the path of libnvinfer_lean.so of TensorRT {report.backend_version}",
        )


def _check_gpu(report: EngineReport, capability: str | None) -> None:
    built = report.compute_capabilities
    if capability is None or not built or capability in built:
        return
    if report.hardware_compatibility == "ampere_plus" and _release(capability) >= (8, 0):
        return
    cure = "Build the engine on this machine"
    if report.backend == "tensorrt_rtx":
        cure = f"Build it with compute_capabilities={[*built, capability]}"
    raise TdqError(
        "engine", str(report.engine), f"built for compute capability {', '.join(built)}, and this is {capability}", cure
    )


def _logger(trt: Any, errors: deque[str]) -> Any:
    severity = trt.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in kept:
                errors.append(message)

    return Logger()


def _runtime(trt: Any, logger: Any, errors: deque[str]) -> Any:
    try:
        return trt.Runtime(logger)  # engine_host_code_allowed stays False
    except (TypeError, RuntimeError) as error:
        raise TdqError(
            "backend",
            trt.__name__,
            f"it cannot start here: {'; '.join([*errors, str(error)])}",
            "Run on a machine with an NVIDIA GPU and a driver that is new enough",
        ) from error


def _load_plugins(trt: Any, plugins: Sequence[str | os.PathLike[str]], report: EngineReport | None) -> None:
    registry = trt.get_plugin_registry()
    for path in [os.fspath(plugin) for plugin in plugins]:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise TdqError("plugins", path, f"it cannot be loaded ({error})", "Pass a plugin library") from error
        if hasattr(library, "getCreators"):
            registry.load_library(path)
    for plugin in report.plugins if report is not None else ():
        if registry.get_creator(plugin.name, plugin.version, plugin.namespace) is None:
            raise TdqError(
                "plugins",
                [os.fspath(path) for path in plugins],
                f"the engine needs the plugin {plugin}, which is not registered",
                "Pass the library that the engine was built with: plugins=['libtdq_scale_lookup.so']",
            )


def _check_validity(trt: Any, runtime: Any, content: bytes, file: Path, errors: deque[str]) -> None:
    """TensorRT-RTX judges an engine by its header."""
    if not hasattr(trt, "EngineValidity"):
        return
    validity, diagnostics = runtime.get_engine_validity(content)
    if validity == trt.EngineValidity.INVALID:
        reasons = [
            name
            for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
            if int(flag) and int(diagnostics) & int(flag) == int(flag)
        ]
        raise TdqError(
            "engine",
            str(file),
            f"TensorRT-RTX {trt.__version__} finds it invalid: {', '.join([*reasons, *errors]) or 'no reason given'}",
            "Build it again with this release, for this GPU",
        )
