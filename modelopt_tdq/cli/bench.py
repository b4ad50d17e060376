"""``modelopt-tdq bench``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure the tables of the papers on a model.")


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
    from modelopt_tdq.bench.budget import budget as named_budget
    from modelopt_tdq.bench.command import run_supplement
    from modelopt_tdq.bench.supplement import Bench
    from modelopt_tdq.demo.bundled import bundled_model

    if workers is None:
        workers = (os.cpu_count() or 1) if device == "cpu" else 1
    shared = Bench(model or bundled_model(), data, named_budget(budget), output, workers, device)
    command = " ".join(["modelopt-tdq", *sys.argv[1:]])
    for text in run_supplement(shared, [part.strip() for part in table.split(",") if part.strip()], command, run):
        typer.echo(text + "\n")
