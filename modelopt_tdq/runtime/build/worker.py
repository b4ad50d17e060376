"""The process that builds one engine: ``python worker.py request.json``.

A native builder can crash, so it runs in a process of its own. This file is started as a script and
imports nothing of the package: importing torch would take longer than most builds. Only the Python form of the
plugin, if it is asked for, needs part of it.

The request is what :func:`modelopt_tdq.build_engine` writes; the answer is
``{"version", "layers", "warnings"}``, or ``{"error"}`` with the arguments of a TdqError.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any


class BuildError(Exception):
    """The four arguments of a TdqError."""


def make_logger(trt: Any, file: Any) -> Any:
    """A logger that writes every message to ``file`` at once, and keeps errors and the list of layers."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            print(f"[{severity.name}] {message}", file=file, flush=True)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            if message.startswith("Layers:"):
                self.layers = message

    return Logger()


def make_network(trt: Any, builder: Any, aot_plugin: bool) -> Any:
    """A strongly typed network: Q/DQ nodes decide the precision. TensorRT 11 knows no other kind."""
    names = ["STRONGLY_TYPED", *(["PREFER_AOT_PYTHON_PLUGINS"] if aot_plugin else [])]
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))


def load_plugins(trt: Any, request: dict[str, Any]) -> None:
    """Register what ``plugins`` of build_engine names, and check that the model's plugins are there."""
    registry = trt.get_plugin_registry()
    for path in request["libraries"]:
        try:
            library = ctypes.CDLL(path)  # some libraries register their plugins when they are loaded
            registers = not hasattr(library, "getCreators") or registry.load_library(path) is not None
        except OSError as error:
            raise BuildError("plugins", path, f"it cannot be loaded ({error})", "Build it for this TensorRT") from error
        if not registers:
            raise BuildError("plugins", path, "TensorRT does not take it", "Build it with the headers of this TensorRT")
    if request["aot_plugin"]:
        # a bare package of this name: the real one imports torch, which takes longer than most builds
        package = types.ModuleType("modelopt_tdq")
        package.__path__ = [request["package"]]
        sys.modules.setdefault("modelopt_tdq", package)
        from modelopt_tdq.errors import TdqError
        from modelopt_tdq.plugin import register

        try:
            register()
        except TdqError as error:
            raise BuildError(error.field, error.value, error.problem, error.cure) from error
    for plugin in request["plugins"]:
        if registry.get_creator(plugin["name"], plugin["version"], plugin["namespace"]) is None:
            full = "::".join(part for part in (plugin["namespace"], plugin["name"]) if part)
            raise BuildError(
                "plugins",
                [*request["libraries"]],
                f"none registers {full}, version {plugin['version']}, which the model needs",
                "Pass its library, or plugins=['aot'] for the Python form of TdqScaleLookup",
            )


def set_compatibility(trt: Any, config: Any, request: dict[str, Any]) -> None:
    """Let other versions and other GPUs run the engine. Without the lean runtime in it: that is host code."""
    if request["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if request["hardware_compatibility"] != "NONE":
        level = getattr(trt.HardwareCompatibilityLevel, request["hardware_compatibility"], None)
        if level is None:
            raise BuildError(
                "hardware_compatibility",
                request["hardware_compatibility"].lower(),
                f"TensorRT {trt.__version__} does not know it",
                "Use another level, or a later TensorRT",
            )
        config.hardware_compatibility_level = level


def set_timing_cache(config: Any, path: str, warnings: list[str]) -> None:
    """Give the builder the times of earlier builds; one it does not take is replaced by an empty one."""
    file = Path(path)
    if file.is_file():
        cache = config.create_timing_cache(file.read_bytes())
        if cache is not None and config.set_timing_cache(cache, False):
            return
        warnings.append(f"timing cache {path}: made for another GPU or TensorRT, or damaged; it will be replaced")
    config.set_timing_cache(config.create_timing_cache(b""), False)


def parse(trt: Any, network: Any, logger: Any, onnx: str) -> Any:
    """Fill ``network`` from the ONNX file; external data is looked for beside it."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        reasons = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            place = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
            reasons.append(f"{place}: {error.desc()}" if place else error.desc())
        raise BuildError(
            "onnx_path", onnx, "the ONNX parser refuses it: " + "; ".join(reasons or logger.errors), "Change the model"
        )
    return parser


def add_profile(builder: Any, config: Any, network: Any, profile: dict[str, list[list[int]]]) -> None:
    """Ranges of the inputs with dynamic shapes: name to smallest, most likely and largest shape."""
    if not profile:
        return
    optimization = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in profile:
            optimization.set_shape(tensor.name, *profile[tensor.name])
    config.add_optimization_profile(optimization)


def rtx_targets(trt: Any, capabilities: list[str]) -> list[Any]:
    """TensorRT-RTX's constants for compute capabilities given as "8.9"."""
    if not capabilities:
        return []
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    for capability in capabilities:
        if capability not in known:
            raise BuildError(
                "compute_capabilities",
                capability,
                f"TensorRT-RTX {trt.__version__} has no such target",
                f"Use {', '.join(known)}",
            )
    return [known[capability] for capability in capabilities]


def describe_layers(trt: Any, logger: Any, engine: Any, version_compatible: bool, warnings: list[str]) -> str:
    """The list of layers: the builder logs it, or else the engine's own inspector, which needs a GPU, has it.

    An engine without a lean runtime may not load here; then nothing is known of its layers.
    """
    if logger.layers:
        return str(logger.layers)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None and version_compatible:
        warnings.append("this TensorRT does not tell the layers of a version-compatible engine: all types are unknown")
        return ""
    if loaded is None:
        raise BuildError(
            "backend",
            trt.__name__,
            "it built an engine but does not tell its layers: " + "; ".join(logger.errors[-2:]),
            "Report this with the version of TensorRT",
        )
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def build(request: dict[str, Any], log: Any) -> dict[str, Any]:
    """Build the engine that ``request`` describes and write it."""
    backend = request["backend"]
    try:
        trt = import_module(backend)
    except ImportError as error:
        raise BuildError("missing", str(error)) from error
    oldest = request["oldest"]
    release, first = (tuple(int(part) for part in version.split(".")[:2]) for version in (trt.__version__, oldest))
    if backend == "tensorrt" and release < first:
        raise BuildError(
            "tensorrt",
            trt.__version__,
            "too old",
            f"Install TensorRT {oldest} or later, the first in which scales need not be constants of the build, and "
            f"that keeps the kernel of a Python plugin in the engine: {request['install']}",
        )
    targets = rtx_targets(trt, request["compute_capabilities"])
    logger = make_logger(trt, log)  # stays referenced until the builder is gone
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise BuildError(
            "backend",
            backend,
            "it cannot start here: " + "; ".join([*logger.errors, str(error)]),
            "TensorRT builds only on a machine with an NVIDIA GPU; build with backend='tensorrt_rtx' elsewhere",
        ) from error
    load_plugins(trt, request)
    network = make_network(trt, builder, request["aot_plugin"])
    parser = parse(trt, network, logger, request["onnx"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if targets:  # TensorRT-RTX compiles ahead of time for these; TensorRT for the GPU that is here
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    add_profile(builder, config, network, request["profile"])
    set_compatibility(trt, config, request)
    warnings: list[str] = []
    if request["timing_cache"]:
        set_timing_cache(config, request["timing_cache"], warnings)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(
            "onnx_path",
            request["onnx"],
            "the builder failed: " + "; ".join(logger.errors[-2:] or ["no reason given"]),
            "Change the model or the compute capabilities",
        )
    layers = describe_layers(trt, logger, engine, request["version_compatible"], warnings)
    if request["timing_cache"]:
        Path(request["new_timing_cache"]).write_bytes(config.get_timing_cache().serialize())
    Path(request["engine"]).write_bytes(engine)
    del engine, config, parser, network, builder
    return {"version": trt.__version__, "layers": layers, "warnings": warnings}


def main() -> None:
    """Build, and answer."""
    # Started as a script, the folder of this file heads the path; its modules are named like the libraries they wrap.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    request = json.loads(Path(sys.argv[1]).read_text())
    with open(request["log"], "a", encoding="utf-8", errors="replace") as log:
        try:
            answer = build(request, log)
        except BuildError as error:
            answer = {"error": error.args}
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
