"""``modelopt-tdq analyze``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelopt_tdq.cli.options import (
    CalibrationScript,
    Device,
    Dtype,
    Model,
    Recipe,
    Samples,
    Seed,
    Steps,
    Subfolder,
)
from modelopt_tdq.cli.output import finish
from modelopt_tdq.cli.script import script_file
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.lab.sources import require_model
from modelopt_tdq.recipes import read_recipe

__all__ = ["analyze"]


def analyze(
    model: Model = None,
    subfolder: Subfolder = None,
    recipe: Recipe = "int8",
    target: Annotated[
        float | None,
        typer.Option(help="SQNR in dB to reach: proposes the fewest layers to keep in high precision.", metavar="DB"),
    ] = None,
    probes: Annotated[int, typer.Option(min=0, help="Times to test every layer alone at; 0 leaves it out.")] = 3,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Measure each layer by itself, rather than all by backward passes.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json and the plots.", show_default=False)
    ] = None,
    calibration_script: CalibrationScript = None,
    samples: Samples = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
) -> None:
    """Say, before you invest, whether scales over time will help a model, and which layers are delicate.

    Headroom: what the best single scale of a layer loses against the best scale per step. Sensitivity: what
    quantizing one layer alone does to the model's output, estimated for all layers at once by backward passes.
    """
    # before all that takes seconds to import
    if output is not None:
        require_writable(output, folder=True)
    read_recipe(recipe)
    require_model(model, subfolder)
    if calibration_script is not None:
        script_file(calibration_script, "calibration_script")
    from modelopt_tdq.lab.placement import Placement

    placement = Placement.of(device, dtype)
    from modelopt_tdq.analysis import analyze as run_analysis
    from modelopt_tdq.cli.calibration import prepare
    from modelopt_tdq.config import recipe as recipe_config
    from modelopt_tdq.core.metrics import json_numbers
    from modelopt_tdq.lab.report.analysis import analysis_tables, draw_analysis, proposal_lines

    config = recipe_config(recipe)
    prepared = prepare(model, subfolder, calibration_script, samples, steps, seed, 8, placement)
    config["algorithm"].setdefault("expected_calls", prepared.expected_calls)
    analysis = run_analysis(
        prepared.model, prepared.forward_loop, config, target=target, probes=probes, one_by_one=one_by_one
    )
    console = Console()
    console.print(analysis_tables(analysis))
    typer.echo(str(analysis.coverage))
    for line in proposal_lines(analysis.proposals):
        typer.echo(line)
    found = json_numbers(analysis.to_dict())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "analysis.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        for path in draw_analysis(analysis, output):
            console.print(f"Plot: {path}", highlight=False)
    finish(found)
