"""A comparison as a self-contained HTML page: the figure and the tables, no scripts, no outside requests."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

from modelopt_tdq.compare.results import ModelComparison
from modelopt_tdq.compare.table import render
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import require
from modelopt_tdq.lab.report.comparison_plots import draw_comparison
from modelopt_tdq.lab.report.page import write_page

__all__ = ["write_comparison"]


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
    for module in ("jinja2", "matplotlib"):
        require(module, "report")
    require_writable(path, "report")
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
