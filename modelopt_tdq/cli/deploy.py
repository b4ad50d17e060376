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
        typer.Option("--print-trtexec", help="Build nothing; print the command of trtexec (or tensorrt_rtx) instead."),
    ] = False,
) -> None:
    """Build a TensorRT engine and show the precision in which every quantized layer really runs.

    Fails if one runs in float, unless --allow-float. Writes a manifest beside the engine. An engine is executable
    code: run only those that you built.
    """
    import shlex

    from rich.console import Console

    from modelopt_tdq.runtime.build import DEFAULT_COMPUTE_CAPABILITIES, build_engine
    from modelopt_tdq.runtime.precision import FloatLayersError, float_layers, render_precision
    from modelopt_tdq.runtime.trtexec import trtexec_command

    target = output or onnx.with_suffix(".engine")
    capabilities = tuple(compute_capability or DEFAULT_COMPUTE_CAPABILITIES)
    sizes = _sizes(dynamic_size or [])
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
        typer.echo(shlex.join(trtexec_command(onnx, target, **options)))
        return
    try:
        report = build_engine(onnx, target, allow_float=allow_float, **options)
    except FloatLayersError as error:
        if error.report is not None:
            Console().print(render_precision(error.report))
        raise
    Console().print(render_precision(report, full=layers or None))
    fallen = float_layers(report)
    low = sum(layer.low_precision for layer in report.precisions)
    typer.echo(
        f"{report.engine}: {report.kernels} kernels, {low} of {len(report.quantized)} quantized layers in low "
        f"precision, {len(fallen)} in float ({report.backend} {report.backend_version})"
    )


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
