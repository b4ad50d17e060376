"""The command line of TensorRT's own tools that builds what :func:`~modelopt_tdq.build_engine` builds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.options import AOT_PLUGIN, DEFAULT_COMPUTE_CAPABILITIES, BuildOptions
from modelopt_tdq.runtime.build.shape_profile import shape_profile

__all__ = ["trtexec_command"]

_HARDWARE = {"same_compute_capability": "sameComputeCapability", "ampere_plus": "ampere+"}


def trtexec_command(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    backend: str = "tensorrt",
    compute_capabilities: Sequence[str] = DEFAULT_COMPUTE_CAPABILITIES,
    dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
    plugins: Sequence[str | os.PathLike[str]] = (),
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    timing_cache: str | os.PathLike[str] | None = None,
) -> list[str]:
    """The arguments of ``trtexec``, or of TensorRT-RTX's ``tensorrt_rtx``, beginning with the program.

    Join them with ``shlex.join`` for a shell. Neither tool writes a manifest, nor tells which layers run in float;
    :class:`~modelopt_tdq.runtime.sessions.tensorrt.TensorRTSession` takes their engines with ``trust=True``.

    Args:
        onnx_path: The model; read for its inputs.
        engine_path: Where the engine is to go.
        backend: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        compute_capabilities: As all that follow, an argument of :func:`~modelopt_tdq.build_engine`.
        dynamic_sizes: Likewise.
        plugins: Likewise, but files only.
        version_compatible: Likewise.
        hardware_compatibility: Likewise.
        timing_cache: Likewise.

    Raises:
        TdqError: As :func:`~modelopt_tdq.build_engine`; or the Python form of the plugin is asked for.
    """
    options = BuildOptions(
        backend, compute_capabilities, plugins, version_compatible, hardware_compatibility, timing_cache
    )
    options.check()
    if AOT_PLUGIN in plugins:
        raise TdqError(
            "plugins",
            list(plugins),
            "trtexec loads plugins from .so files only",
            "Pass the C++ library, or build with build_engine",
        )
    facts = read_onnx(Path(onnx_path))
    options.check(facts)
    command = ["trtexec" if backend == "tensorrt" else "tensorrt_rtx"]
    command += [f"--onnx={os.fspath(onnx_path)}", f"--saveEngine={os.fspath(engine_path)}"]
    profile = shape_profile(facts, dynamic_sizes or {})
    for which, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        shapes = [f"{name}:{'x'.join(map(str, shapes[which]))}" for name, shapes in profile.items()]
        command += [f"{flag}={','.join(shapes)}"] if shapes else []
    if backend == "tensorrt":
        command += ["--stronglyTyped", *_tensorrt_only(options)]
    else:
        command.append(f"--computeCapabilities={','.join(c.replace('.', '') for c in options.targets)}")
    return [*command, "--profilingVerbosity=detailed", "--skipInference"]


def _tensorrt_only(options: BuildOptions) -> list[str]:
    flags = []
    if options.timing_cache is not None:
        flags.append(f"--timingCacheFile={os.fspath(options.timing_cache)}")
    if options.version_compatible:
        flags += ["--versionCompatible", "--excludeLeanRuntime"]
    if options.hardware_compatibility != "none":
        flags.append(f"--hardwareCompatibilityLevel={_HARDWARE[options.hardware_compatibility]}")
    for library in options.libraries:
        # one that exports getCreators is for the registry to load; the other registers itself
        registry = b"getCreators" in Path(library).read_bytes()
        flags.append(f"--{'dynamic' if registry else 'static'}Plugins={library}")
    return flags
