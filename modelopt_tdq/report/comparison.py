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
from modelopt_tdq.report.comparison_plots import draw_comparison

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

    jinja2 = require("jinja2", "report")
    console = Console(record=True, width=140, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(render(comparison))
    with tempfile.TemporaryDirectory() as folder:
        figure = draw_comparison(comparison, Path(folder) / "comparison.png").read_bytes()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("comparison.html.j2").render(
        title=title,
        passed=comparison.passed,
        figure=base64.b64encode(figure).decode("ascii"),
        text=console.export_html(inline_styles=True, code_format="{code}"),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target
