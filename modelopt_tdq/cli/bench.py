"""``modelopt-tdq bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from modelopt_tdq.cli.options import command_line, names
from modelopt_tdq.core.files import require_writable

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure the tables of the papers on a model, and this machine's GPU.")


@bench.callback()
def _main() -> None:
    pass


@bench.command("supplement")
def supplement(
    table: Annotated[str, typer.Option(help="Numbers of tables of the TDQ supplementary, separated by commas.")],
    budget: Annotated[str, typer.Option(help="quick: minutes on two CPU cores; full: hours on a GPU.")] = "quick",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a diffusers model trained on CIFAR-10. Default: the bundled UNet.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="cifar10.npz; left out, it is downloaded with `datasets`.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; finished runs in it are kept.")] = Path(
        "benchmarks/results/supplement"
    ),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per core; 1 on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    run: Annotated[bool, typer.Option("--run/--no-run", help="--no-run: write tables of the runs there are.")] = True,
) -> None:
    """Train and judge the rows of Tables 1, 2, 4, 5, 6 and 7, and print them beside the paper's.

    The same data, steps and seeds for every row. Writes a JSON file with every run (seed, steps, checksum of the
    model, wall time), and per table a Markdown file and a plot. An interrupted benchmark goes on where it stopped.
    """
    require_writable(output, folder=True)
    from modelopt_tdq.lab.bench.budget import budget as named_budget
    from modelopt_tdq.lab.bench.command import run_supplement
    from modelopt_tdq.lab.bench.supplement import Bench
    from modelopt_tdq.lab.reference_models import bundled_model

    if workers is None:
        workers = (os.cpu_count() or 1) if device == "cpu" else 1
    shared = Bench(model or bundled_model(), data, named_budget(budget), output, workers, device)
    for text in run_supplement(shared, names(table), command_line(), run):
        typer.echo(text + "\n")


@bench.command("temporal-features")
def temporal_features(
    budget: Annotated[str, typer.Option(help="quick: minutes on two CPU cores; full: hours.")] = "quick",
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a diffusers model with its scheduler. Default: the bundled UNet."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; finished rows in it are kept.")] = Path(
        "benchmarks/results/temporal"
    ),
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="--no-run: write the table of the rows there are.")
    ] = True,
) -> None:
    """Compare what becomes of the temporal features: full precision, naive, TIB, cache, or whichever is better.

    At W8A8, W4A8 and W4A4, on one calibration each: error of the features, SQNR of the noise prediction on other
    trajectories of 20 and of 50 steps, images, calibration time, engine kernels and sizes. Writes a Markdown table, a
    plot of every feature at every time, and a JSON file. An interrupted benchmark goes on where it stopped.
    """
    require_writable(output, folder=True)
    from modelopt_tdq.lab.bench.temporal.command import run_temporal
    from modelopt_tdq.lab.bench.temporal.rows import temporal_budget
    from modelopt_tdq.lab.bench.temporal.run import TemporalBench
    from modelopt_tdq.lab.reference_models import bundled_model

    shared = TemporalBench(model or bundled_model(), temporal_budget(budget), output)
    typer.echo(run_temporal(shared, command_line(), run))


@bench.command("gpu")
def gpu(
    output: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.md.")] = Path("benchmarks/results/gpu"),
    only: Annotated[
        str,
        typer.Option(
            help="Parts, separated by commas: machine, lookup, products, model, real_size, engines. Default: all."
        ),
    ] = "",
    engines: Annotated[
        Path | None,
        typer.Option(
            help="Folder with engines that were built elsewhere, each beside its ONNX file (name.engine, name.onnx): "
            "they are loaded, run and compared, too.",
            show_default=False,
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On the CPU, with stand-ins and tiny sizes: shows that the command runs.")
    ] = False,
) -> None:
    """Measure on the GPU of this machine: the lookup, layers, the quantized model, engines; under six minutes.

    Every part runs in a process of its own with a time limit: one that crashes ends no other, and a library that
    refuses the GPU is recorded in its own words. Results are written after every part.
    """
    require_writable(output, folder=True)
    from modelopt_tdq.lab.bench.gpu.command import run_gpu

    for line in run_gpu(output, names(only), command_line(), rehearse, engines):
        typer.echo(line)


@bench.command("rivals")
def rivals(
    models: Annotated[
        str, typer.Option(help="Reference models, separated by commas: unet, dit, terrain.")
    ] = "unet,dit",
    formats: Annotated[
        str, typer.Option(help="Number formats, separated by commas: W8A8, FP8, W4A8, W4A4.")
    ] = "W8A8,FP8,W4A8,W4A4",
    only: Annotated[str, typer.Option(help="Names of rows, separated by commas. Default: all but long ones.")] = "",
    long: Annotated[bool, typer.Option("--long", help="Reconstruction as well, and QAT if there is --data.")] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration trajectories. Default: by model.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Trajectories to judge on. Default: by model.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of a trajectory. Default: by model.")] = None,
    frechet: Annotated[int, typer.Option(min=0, help="Images for the Fréchet distance; 0: left out.")] = 0,
    data: Annotated[Path | None, typer.Option(help="cifar10.npz, to train on in the row qat.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of the reconstruction, per block.")] = 1000,
    training_steps: Annotated[int, typer.Option(min=1, help="Of QAT.")] = 1000,
    output: Annotated[Path, typer.Option(help="Folder of rivals.json, .md and .png; finished rows are kept.")] = Path(
        "benchmarks/results"
    ),
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="--no-run: write the tables of the rows there are.")
    ] = True,
) -> None:
    """Compare our quality, stage by stage, with what people deploy today: static and dynamic quantization.

    NVIDIA's diffusers example, ModelOpt's max and mse, dynamic scales per tensor and per token, Pruna's time-aware FP8,
    each on the same layers, calibration noise and held-out trajectories as ours. Writes a table per model and format, a
    plot, and a JSON file after every row; an interrupted benchmark goes on where it stopped.
    """
    require_writable(output, folder=True)
    from modelopt_tdq.lab.bench.rivals.command import run_rivals
    from modelopt_tdq.lab.bench.rivals.run import Bench

    shared = Bench(
        names(models),
        names(formats),
        output,
        only=names(only),
        long=long,
        samples=samples,
        held_out=held_out,
        steps=steps,
        frechet=frechet,
        data=data,
        iterations=iterations,
        training_steps=training_steps,
    )
    typer.echo(run_rivals(shared, command_line(), run))


@bench.command("zoo")
def zoo(
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a class of diffusers; repeat it for more. Default: all.")
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="Stages, separated by commas, with those that they need: full, quantize, save, restore, temporal, "
            "export, onnxruntime, openvino, tensorrt_rtx, temporal_export. Default: all but the last."
        ),
    ] = "",
    limit: Annotated[float, typer.Option(help="Seconds that one class may take.")] = 300.0,
    again: Annotated[bool, typer.Option("--again", help="Run finished classes anew.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of zoo.json and zoo.md; finished classes are kept.")] = Path(
        "benchmarks/results"
    ),
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="--no-run: write the matrix of the classes there are.")
    ] = True,
) -> None:
    """Take a tiny model of every class of diffusers through quantization, saving, export and every backend.

    A process per class with a time limit, and another that restores what it saved: what fails ends nothing else, and
    is told with its reason. Classes that ran with the versions that are installed are kept.
    """
    require_writable(output, folder=True)
    from modelopt_tdq.lab.bench.zoo.command import Bench, run_zoo

    typer.echo(run_zoo(Bench(output, tuple(only or ()), names(stages), limit, again), run))
