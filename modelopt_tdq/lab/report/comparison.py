"""A comparison as a self-contained HTML page: the figure and the tables, no scripts, no outside requests."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

from modelopt_tdq.compare.results import ModelComparison
from modelopt_tdq.compare.table import render
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.report.comparison_plots import draw_comparison
from modelopt_tdq.lab.report.page import write_page

__all__ = ["check_page", "write_comparison"]


def check_page(path: str | os.PathLike[str]) -> None:
    """Whether a page may be written there, before a long comparison is run.

    Raises:
        TdqError: It is a folder.
        MissingExtraError: The extra ``report`` is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report")
    if Path(path).is_dir():
        raise TdqError("report", str(path), "it is a folder", "Name the HTML file to write")


def write_comparison(comparison: ModelComparison, path: str | os.PathLike[str], title: str = "") -> Path:
    """Write the page.

    Args:
        comparison: From :func:`~modelopt_tdq.compare.compare_model`.
        path: Of the HTML file.
        title: What was compared.

    Raises:
        TdqError: ``path`` is a folder.
        MissingExtraError: The extra ``report`` is not installed.
    """
    check_page(path)
    from rich.console import Console

    console = Console(record=True, width=140, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(render(comparison))
    with tempfile.TemporaryDirectory() as folder:
        figure = draw_comparison(comparison, Path(folder) / "comparison.png").read_bytes()
    return write_page(
        "comparison.html.j2",
        path,
        title=title,
        passed=comparison.passed,
        figure=base64.b64encode(figure).decode("ascii"),
        text=console.export_html(inline_styles=True, code_format="{code}"),
    )
