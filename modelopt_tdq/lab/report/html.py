"""The self-contained HTML page: images inside, no scripts, no outside requests."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.report.page import write_page
from modelopt_tdq.lab.report.results import demo_model
from modelopt_tdq.lab.report.table import COLUMNS, row_cells
from modelopt_tdq.lab.report.verdict import verdict

__all__ = ["write_html"]

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def write_html(results: dict[str, Any], folder: Path, output: str | os.PathLike[str]) -> Path:
    """Write the page.

    Args:
        results: Content of ``results.json``.
        folder: That its figures lie in.
        output: Of the page.

    Raises:
        TdqError: A figure is missing.
        MissingExtraError: The extra ``report`` is not installed.
    """
    figures = [
        {**figure, "data": _data_uri(folder, figure["file"]), "alt": figure.get("alt", figure["title"])}
        for figure in results["figures"]
    ]
    rows = [
        {"cells": row_cells(row), "variant": row["variant"], "first": row["variant"] in ("fp32", "max")}
        for row in results["rows"]
    ]
    return write_page(
        "report.html.j2",
        output,
        results=results,
        model=demo_model(results),
        verdict=verdict(results),
        columns=COLUMNS,
        rows=rows,
        gains=_gains(results["rows"]),
        features={
            row["recipe"]: row["label"] for row in results["rows"] if row["recipe"] in results.get("features", {})
        },
        sections={
            name: [f for f in figures if f["section"] == name]
            for name in ("sqnr", "images", "scales", "details", "features")
        },
    )


def _data_uri(folder: Path, name: str) -> str:
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()) or file.suffix not in _TYPES:
        raise TdqError("figures", name, "not a PNG or SVG inside the folder of the results", "Run the demo again")
    if not file.is_file():
        raise TdqError("figures", str(file), "this figure is missing", "Run the demo again")
    # as an image: what an SVG holds is drawn, and never run
    return f"data:{_TYPES[file.suffix]};base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _gains(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per recipe_name: what scales over time gain, in dB, against both kinds of static scales."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["recipe"], {})[row["variant"]] = row
    found = []
    for group in groups.values():
        if not {"max", "static", "tdq"} <= set(group):
            continue
        ours = group["tdq"]
        gains = {"label": ours["label"]}
        for variant in ("max", "static"):
            for key in ("sqnr_mean_db", "psnr_db"):
                gains[f"{variant}_{key}"] = f"{float(ours[key]) - float(group[variant][key]):+.1f} dB"
        found.append(gains)
    return found
