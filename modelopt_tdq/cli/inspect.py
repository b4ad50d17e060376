"""``modelopt-tdq report`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["doctor", "report"]


def report(
    results: Annotated[Path, typer.Argument(help="results.json of a demo, with its figures beside it.")] = Path(
        "tdq-demo/results.json"
    ),
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: report.html beside it.", show_default=False)
    ] = None,
) -> None:
    """Print the table of a demo, and write its self-contained HTML page again."""
    from modelopt_tdq.report.html import write_html
    from modelopt_tdq.report.results import load_results
    from modelopt_tdq.report.table import results_table

    content = load_results(results)
    console = Console()
    console.print(results_table(content))
    written = write_html(content, results.parent, output or results.parent / "report.html")
    console.print(f"Report: {written}", highlight=False)


def doctor() -> None:
    """Show what is installed, what each backend can do here, and what to install for the rest."""
    from modelopt_tdq.runtime.doctor import doctor as examine
    from modelopt_tdq.runtime.doctor import render

    diagnosis = examine()
    Console().print(render(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)
