"""``modelopt-tdq build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        str, typer.Option(help="tensorrt_rtx builds ahead of time, also without a GPU; tensorrt for the GPU here.")
    ] = "tensorrt_rtx",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to compile for, such as 8.9; may be repeated. Default: 8.9 and 12.0.", metavar="X.Y"),
    ] = None,
    dynamic_size: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of an open dimension; may be repeated.", metavar="NAME=MIN,LIKELY,MAX"),
    ] = None,
) -> None:
    """Build a TensorRT engine and say which quantized layers got low-precision kernels.

    Writes a manifest beside the engine. An engine is executable code: run only those that you built.
    """
    from modelopt_tdq.runtime.build import DEFAULT_COMPUTE_CAPABILITIES, build_engine
    from modelopt_tdq.runtime.engine_report import float_layers

    target = output or onnx.with_suffix(".engine")
    capabilities = tuple(compute_capability or DEFAULT_COMPUTE_CAPABILITIES)
    sizes = _sizes(dynamic_size or [])
    report = build_engine(onnx, target, backend=backend, compute_capabilities=capabilities, dynamic_sizes=sizes)
    fallen = float_layers(report)
    typer.echo(
        f"{report.engine}: {report.kernels} kernels, {len(report.quantized) - len(fallen)} of "
        f"{len(report.quantized)} quantized layers in low precision ({report.backend} {report.backend_version})"
    )
    for name in fallen:
        typer.echo(f"  in float: {name} ({report.quantized[name]})")
