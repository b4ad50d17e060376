"""``modelopt-tdq compare``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_tdq.cli.options import Folder
from modelopt_tdq.cli.output import finish
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import require
from modelopt_tdq.lab.sources import require_quantized

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_tdq.compare import ModelComparison

__all__ = ["compare"]

#: For the page.
_FED = "random inputs of the shapes that calibration used, at times of the scale table; not with a sampling trajectory"


def _calls(described: dict[str, Any], times: Tensor, argument: str, batch: int) -> Iterator[dict[str, Any]]:
    import torch

    from modelopt_tdq.lab.model_folder import make_inputs

    for step, time in enumerate(times):
        inputs = make_inputs(described, batch, seed=step)
        inputs[argument] = torch.full_like(inputs[argument], float(time))
        yield inputs


def compare(
    folder: Folder,
    onnx: Annotated[
        Path | None,
        typer.Option(
            help="Its export, with --lowering ratio or plugin (then the plugin-free twin is run), also with "
            "--table-input. Default: exported now, by ratios.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Its export with --lowering reference. Default: exported now.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Time steps to compare, spread over the table.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Batch size; that of --onnx, if given.")] = 1,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, onnxruntime, openvino, or onnxruntime: with a provider behind it (cpu, cuda, tensorrt, "
            "tensorrt_rtx); may be repeated. Default: the first three that are installed."
        ),
    ] = None,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="Engine of TensorRT or TensorRT-RTX, built from --onnx, to compare too; it needs the GPU.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Compare codes, layer by layer, too.")] = True,
    report: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write: a heat map of layers and time steps, and the tables.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare the quantized model with what it is exported to, per time step and per layer.

    Prints what is allowed and what was found. Exit status 1 if a backend differs from the reference by more than
    rounding explains; the first faulty layer is named last.
    """
    # before all that takes seconds to import
    if report is not None:
        require_writable(report, "report")
    require_quantized(folder)
    import importlib.util

    import torch
    from rich.console import Console

    from modelopt_tdq.compare import WITHOUT_ENGINE, compare_model, render
    from modelopt_tdq.lab.model_folder import load_quantized
    from modelopt_tdq.model.model_table import scale_table
    from modelopt_tdq.runtime.build.report import EngineReport

    if report is not None:
        for module in ("jinja2", "matplotlib"):
            require(module, "report")
        from modelopt_tdq.lab.report.comparison import write_comparison
    found = load_quantized(folder)
    table = scale_table(found.model)
    rows = torch.linspace(0, len(table) - 1, min(steps, len(table))).round().long()
    argument = table.metadata["timestep_argument"]
    files = {} if engine is None else {EngineReport.load(engine).backend: engine}
    comparison = compare_model(
        found.model,
        _calls(found.inputs, table.timesteps[rows], argument, batch),
        backends=[*(backend or [name for name in WITHOUT_ENGINE if importlib.util.find_spec(name)]), *files],
        layers=layers,
        reference_path=reference,
        lowered_path=onnx,
        files=files,
    )
    Console().print(render(comparison))
    if report is not None:
        typer.echo(f"Report: {write_comparison(comparison, report, folder.name, _FED)}")
    finish(_found(comparison), failed=not comparison.passed)


def _found(comparison: ModelComparison) -> dict[str, Any]:
    """For --json."""
    from modelopt_tdq.core.metrics import json_number

    return {
        "passed": comparison.passed,
        "outputs": [
            {
                "backend": step.backend,
                "time": step.time,
                "difference_db": json_number(step.difference.sqnr_db),
                "allowed_db": json_number(step.difference.noise_db),
                "passed": bool(step.difference),
            }
            for step in comparison.steps
        ],
        "compared_codes": dict(comparison.compared_codes),
        "faulty_layers": [
            {"layer": fault.name, "backend": fault.backend, "time": fault.time, "found": str(fault.difference)}
            for fault in comparison.faults
        ],
        "failures": [str(failure) for failure in comparison.failures],
    }
