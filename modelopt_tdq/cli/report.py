"""``modelopt-tdq report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelopt_tdq.cli.options import command_line
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import TdqError

__all__ = ["report"]


def report(
    results: Annotated[
        Path | None,
        typer.Argument(
            help="results.json of a demo, with its figures beside it. Default: tdq-demo/results.json.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write, by default report.html beside the results. With --figures: the folder of the "
            "figures, by default CLASS_figures in --results.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Draw Figures 1 to 9 of the TDQ supplementary.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="With --figures: folder of the benchmarked model. Default: the bundled CIFAR-10 denoiser."),
    ] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option("--results", help="With --figures: the folder that `modelopt-tdq bench supplement` wrote."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="With --figures: trajectories to measure and to calibrate on, images per row.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=2, help="With --figures: sampling steps.")] = 20,
    seed: Annotated[
        int, typer.Option(help="With --figures: of the noise to calibrate on; the images have the next.")
    ] = 0,
) -> None:
    """Print the table of a demo and write its self-contained HTML page again; or draw the supplementary's figures."""
    if figures:
        if results is not None:
            raise TdqError(
                "results", str(results), "a demo's results, given with --figures", "Name the benchmark with --results"
            )
        if output is not None:
            require_writable(output, folder=True)
        _figures(model, benchmark, output, samples, steps, seed)
        return
    for option, value in (("model", model), ("results", benchmark)):
        if value is not None:
            raise TdqError(option, str(value), "of use with --figures only", "Add --figures")
    source = results or Path("tdq-demo/results.json")
    target = output or source.parent / "report.html"
    require_writable(target)
    _page(source, target)


def _page(results: Path, output: Path) -> None:
    from modelopt_tdq.lab.report.html import write_html
    from modelopt_tdq.lab.report.results import load_results
    from modelopt_tdq.lab.report.table import print_verdict, results_table

    content = load_results(results)
    console = Console()
    console.print(results_table(content))
    print_verdict(content, console)
    written = write_html(content, results.parent, output)
    console.print(f"Report: {written}", highlight=False)


def _figures(
    model: Path | None, results: Path | None, output: Path | None, samples: int, steps: int, seed: int
) -> None:
    from modelopt_tdq.lab.bench.budget import budget
    from modelopt_tdq.lab.bench.figures import FigureSettings, supplement_figures
    from modelopt_tdq.lab.bench.sample_rows import SampleSettings
    from modelopt_tdq.lab.bench.supplement import Bench
    from modelopt_tdq.lab.reference_models import bundled_model

    folder = Path("benchmarks/results/supplement") if results is None else results
    source = model or bundled_model()
    if output is None:
        output = folder / f"{Bench(source, None, budget('quick'), folder).name}_figures"
    settings = FigureSettings(
        source,
        folder,
        output,
        command_line(),
        SampleSettings(samples, samples, steps, seed),
    )
    typer.echo(f"Figures: {supplement_figures(settings)}")
