"""``modelopt-tdq export``, ``build`` and ``compare``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modelopt_tdq.cli.options import Folder
from modelopt_tdq.errors import TdqError

__all__ = ["build", "compare", "export"]


class Lowering(str, Enum):
    """How time-dependent scales are written in ONNX."""

    RATIO = "ratio"
    REFERENCE = "reference"


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="ONNX file to write.")] = Path("model.onnx"),
    lowering: Annotated[
        Lowering, typer.Option(help="ratio: for TensorRT and OpenVINO; reference: the yardstick, for ONNX Runtime.")
    ] = Lowering.RATIO,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size. Default: that of the calibration.", show_default=False)
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")] = False,
) -> None:
    """Export a quantized model to ONNX, standard operators only.

    The inputs have the names and shapes that calibration used. Calibrate with one time per sample to get an
    ONNX file that takes one time per sample.
    """
    import logging
    import warnings

    from modelopt_tdq.export import export_onnx
    from modelopt_tdq.model_folder import load_quantized, make_inputs

    # torch's exporter tells of its own deprecations and of packages that it does without
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = load_quantized(folder)
    inputs = make_inputs(found.inputs, batch)
    report = export_onnx(found.model, output, inputs, lowering=lowering.value, dynamic_batch=dynamic_batch)
    typer.echo(f"{report.path}: {len(report.quantized)} quantizers in low precision, {len(report.skipped)} skipped")
    for name, reason in report.skipped:
        typer.echo(f"  skipped {name}: {reason}")
    if lowering is Lowering.RATIO:
        typer.echo(f"Next: modelopt-tdq build {report.path}")


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


def _calls(described: dict[str, Any], times: torch.Tensor, argument: str, batch: int) -> Iterator[dict[str, Any]]:
    from modelopt_tdq.model_folder import make_inputs

    for step, time in enumerate(times):
        inputs = make_inputs(described, batch, seed=step)
        inputs[argument] = torch.full_like(inputs[argument], float(time))
        yield inputs


def compare(
    folder: Folder,
    onnx: Annotated[Path | None, typer.Option(help="Its export with --lowering ratio. Default: exported now.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Time steps to compare, spread over the table.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Batch size; that of --onnx, if given.")] = 1,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="torch, onnxruntime, openvino; may be repeated. Default: those that are installed."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Compare codes, layer by layer, too.")] = True,
) -> None:
    """Compare the quantized model with what it is exported to, per time step and per layer.

    Exit status 1 if a backend differs from the reference by more than rounding explains.
    """
    import importlib.util

    from rich.console import Console

    from modelopt_tdq.compare import compare_model, render
    from modelopt_tdq.model_folder import load_quantized
    from modelopt_tdq.model_table import scale_table

    found = load_quantized(folder)
    table = scale_table(found.model)
    rows = torch.linspace(0, len(table) - 1, min(steps, len(table))).round().long()
    argument = table.metadata["timestep_argument"]
    installed = [b for b in ("torch", "onnxruntime", "openvino") if importlib.util.find_spec(b)]
    comparison = compare_model(
        found.model,
        _calls(found.inputs, table.timesteps[rows], argument, batch),
        backends=backend or installed,
        layers=layers,
        ratio_path=onnx,
    )
    Console().print(render(comparison))
    if not comparison.passed:
        raise typer.Exit(1)
