"""A comparison as a self-contained HTML page: the figure and the tables, no scripts, no outside requests."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelopt_tdq.compare.metrics import TOLERANCES
from modelopt_tdq.compare.results import ModelComparison
from modelopt_tdq.compare.table import first_fault
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import require
from modelopt_tdq.lab.report.comparison_plots import draw_comparison
from modelopt_tdq.lab.report.page import write_page

__all__ = ["write_comparison"]

#: Rows of the table of faulty layers; a fault in a row of the scale table usually shows in every layer.
_MOST_FAULTS = 50


def write_comparison(comparison: ModelComparison, path: str | os.PathLike[str], title: str = "", fed: str = "") -> Path:
    """Write the page.

    Args:
        comparison: From :func:`~modelopt_tdq.compare.compare_model`.
        path: Of the HTML file.
        title: What was compared.
        fed: What the models were fed with, such as "the calls of a sampling trajectory".

    Raises:
        TdqError: ``path`` is a folder.
        MissingExtraError: The extra ``report`` is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report")
    require_writable(path, "report")
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_comparison(comparison, Path(folder) / "comparison.svg").read_bytes()
    backends = list(dict.fromkeys(step.backend for step in comparison.steps))
    faults = comparison.faults
    return write_page(
        "comparison.html.j2",
        path,
        title=title,
        passed=comparison.passed,
        headline=_headline(comparison),
        facts=[*_facts(comparison, backends)],
        tolerances=TOLERANCES,
        notes=comparison.notes,
        fed=fed,
        figure={
            "title": "Comparison per layer and time",
            "data": "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii"),
            "alt": _seen(comparison, backends),
            "caption": "Left: share of the codes of each layer that differ, at each time; crossed where rounding does "
            "not explain it. Right: how far the outputs differ; above the line of the noise it is too much.",
        },
        backends=backends,
        outputs=list(_outputs(comparison, backends)),
        codes=[
            {
                "backend": backend,
                "count": f"{count:,}",
                "moved": f"{sum(codes.differing for codes in comparison.codes(backend)):,}",
                "faults": sum(fault.backend == backend for fault in faults),
            }
            for backend, count in comparison.compared_codes.items()
        ],
        faults=[
            {"name": f.name, "time": f"{f.time:g}", "backend": f.backend, "found": str(f.difference)}
            for f in faults[:_MOST_FAULTS]
        ],
        more_faults=max(0, len(faults) - _MOST_FAULTS),
    )


def _headline(comparison: ModelComparison) -> str:
    if comparison.passed:
        return "What is deployed computes what was quantized: what differs is rounding."
    if comparison.faults:
        return first_fault(comparison.faults[0])
    if comparison.failures:
        return str(comparison.failures[0])
    return "An output differs by more than the quantization noise."


def _facts(comparison: ModelComparison, backends: list[str]) -> Iterator[str]:
    """A line per backend: the step that is worst, and the codes."""
    for backend in backends:
        steps = [step for step in comparison.steps if step.backend == backend]
        worst = min(steps, key=lambda step: step.difference.sqnr_db - step.difference.noise_db)
        found, allowed = worst.difference.sqnr_db, worst.difference.noise_db
        line = f"{backend}: its output is the reference's, to the last bit, at all of {len(steps)} times."
        if not (math.isinf(found) and found > 0):
            line = (
                f"{backend}: the difference of its output is {found:.1f} dB below the signal at the worst of "
                f"{len(steps)} times ({worst.time:g}); it has to be {allowed:.1f} dB at least."
            )
        if backend in comparison.compared_codes:
            moved = sum(codes.differing for codes in comparison.codes(backend))
            line += f" {moved:,} of {comparison.compared_codes[backend]:,} codes differ."
        yield line
    for failure in comparison.failures:
        yield str(failure)


def _seen(comparison: ModelComparison, backends: list[str]) -> str:
    """What the figure shows, in words."""
    layers = len(comparison.quantizers)
    faulty = len({fault.name for fault in comparison.faults})
    maps = f"Heat maps of {layers} layers over time, {faulty or 'none'} of them faulty; " if layers else ""
    lines = f"lines of the outputs' difference over time for {', '.join(backends)}"
    return f"{maps}{lines}. The tables below have the numbers."


def _outputs(comparison: ModelComparison, backends: list[str]) -> Iterator[dict[str, Any]]:
    for number in dict.fromkeys(step.step for step in comparison.steps):
        found = {step.backend: step for step in comparison.steps if step.step == number}
        first = next(iter(found.values()))
        yield {
            "time": f"{first.time:g}",
            "noise": f"{first.difference.noise_db:.1f}",
            "cells": [
                {"text": f"{found[name].difference.sqnr_db:.1f}", "passed": bool(found[name].difference)}
                if name in found
                else {"text": "-", "passed": True}
                for name in backends
            ],
        }
