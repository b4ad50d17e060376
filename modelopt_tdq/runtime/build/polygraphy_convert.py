"""The command line of ``polygraphy convert`` that builds an engine, as NVIDIA's demos call it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.options import BUILDERS
from modelopt_tdq.runtime.build.shape_profile import shape_profile

__all__ = ["polygraphy_command"]


def polygraphy_command(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    *,
    backend: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt",
    dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
    optimization_level: int = 4,
) -> list[str]:
    """The words of the command, for ``shlex.join``.

    For TensorRT-RTX it begins with ``env POLYGRAPHY_USE_TENSORRT_RTX=1``, which is how Polygraphy is told. Polygraphy
    writes no manifest and does not tell which layers run in float; :func:`~modelopt_tdq.build_engine` does.

    Args:
        onnx_path: The model; read for its inputs.
        engine_path: Where the engine is to go.
        backend: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        dynamic_sizes: As of :func:`~modelopt_tdq.build_engine`.
        optimization_level: Of the builder; 4 is NVIDIA's choice for quantized denoisers.

    Raises:
        TdqError: As :func:`~modelopt_tdq.build_engine`.
    """
    if backend not in BUILDERS:
        raise TdqError("backend", backend, "no such builder", f"Use one of {list(BUILDERS)}")
    command = ["env", "POLYGRAPHY_USE_TENSORRT_RTX=1"] if backend == "tensorrt_rtx" else []
    command += ["polygraphy", "convert", os.fspath(onnx_path), "--convert-to", "trt"]
    command += ["--output", os.fspath(engine_path), "--strongly-typed"]
    command += ["--builder-optimization-level", str(optimization_level)]
    profile = shape_profile(read_onnx(Path(onnx_path)), dynamic_sizes or {})
    for which, flag in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
        shapes = [f"{name}:[{','.join(map(str, ranges[which]))}]" for name, ranges in profile.items()]
        command += [flag, *shapes] if shapes else []
    return command
