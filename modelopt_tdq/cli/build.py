"""``modelopt-tdq build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modelopt_tdq.cli.options import Program
from modelopt_tdq.cli.output import finish
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import TdqError

__all__ = ["build"]


def _sizes(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    sizes = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        values = numbers.split(",")
        if not name or len(values) != 3 or not all(value.strip().isdigit() for value in values):
            raise TdqError("dynamic_size", text, "not of the form NAME=MIN,LIKELY,MAX", "For example batch=1,2,16")
        smallest, likely, largest = (int(value) for value in values)
        sizes[name] = (smallest, likely, largest)
    return sizes


def build(
    onnx: Annotated[Path, typer.Argument(help="ONNX file, from `modelopt-tdq export`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Engine to write. Default: beside the ONNX file.", show_default=False)
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="tensorrt_rtx builds ahead of time, also without a GPU; tensorrt for the GPU here. Default: "
            "tensorrt_rtx, or what the program of --for runs.",
            show_default=False,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to compile for, such as 8.9; may be repeated. Default: 8.9 and 12.0.", metavar="X.Y"),
    ] = None,
    dynamic_size: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of an open dimension; may be repeated.", metavar="NAME=MIN,LIKELY,MAX"),
    ] = None,
    allow_float: Annotated[
        bool, typer.Option("--allow-float", help="Write the engine although quantized layers run in float.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every quantized layer, also when all are in low precision.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Library with a plugin that the model needs, or aot for the Python form of TdqScaleLookup; may be "
            "repeated. tensorrt only.",
            metavar="FILE",
        ),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later versions may run it too. tensorrt only.")
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="none, same_compute_capability or ampere_plus. tensorrt only.")
    ] = "none",
    timing_cache: Annotated[
        Path | None, typer.Option(help="File with times of kernels, read and written. tensorrt only.")
    ] = None,
    print_trtexec: Annotated[
        bool,
        typer.Option(
            "--print-trtexec",
            help="Build nothing; print the command of trtexec (or tensorrt_rtx) instead, with --for that of Polygraphy "
            "as well.",
        ),
    ] = False,
    program: Program = None,
) -> None:
    """Build a TensorRT engine and show the precision in which every quantized layer really runs.

    Fails if one runs in float, unless --allow-float. Writes a manifest beside the engine. An engine is executable
    code: run only those that you built.
    """
    target = output or onnx.with_suffix(".engine")
    sizes = _sizes(dynamic_size or [])
    require_writable(target, "engine_path")
    if timing_cache is not None:
        require_writable(timing_cache, "timing_cache")
    import shlex

    from rich.console import Console

    from modelopt_tdq.runtime.build.build import DEFAULT_COMPUTE_CAPABILITIES, build_engine
    from modelopt_tdq.runtime.build.onnx_model import read_onnx
    from modelopt_tdq.runtime.build.precision import FloatLayersError, render_precision
    from modelopt_tdq.runtime.build.programs import backend_of, engine_lines, place_of, sizes_of
    from modelopt_tdq.runtime.build.trtexec import trtexec_command

    capabilities = tuple(compute_capability or DEFAULT_COMPUTE_CAPABILITIES)
    lines = []
    if program is not None:
        lines = list(engine_lines(program, onnx, target, sizes))
        sizes = sizes_of(place_of(program, onnx)[1], read_onnx(onnx), sizes)
    backend = backend or backend_of(program)
    options: dict[str, Any] = {
        "backend": backend,
        "compute_capabilities": capabilities,
        "dynamic_sizes": sizes,
        "plugins": tuple(plugin or ()),
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "timing_cache": timing_cache,
    }
    if print_trtexec:
        typer.echo("\n".join(lines or [shlex.join(trtexec_command(onnx, target, **options))]))
        return
    try:
        report = build_engine(onnx, target, allow_float=allow_float, **options)
    except FloatLayersError as error:
        if error.report is not None:
            Console().print(render_precision(error.report))
        raise
    Console().print(render_precision(report, full=layers or None))
    typer.echo(str(report))
    for line in lines:
        typer.echo(line)
    finish(
        {
            "engine": str(report.engine),
            "backend": report.backend,
            "backend_version": report.backend_version,
            "compute_capabilities": list(report.compute_capabilities),
            "kernels": report.kernels,
            "quantized_layers": {layer.name: layer.type for layer in report.precisions},
        }
    )
