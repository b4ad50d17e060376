"""The comparison as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.bench.temporal.rows import TemporalRun
from modelopt_tdq.lab.report.feature_plots import FeatureErrorPanels, draw_feature_errors
from modelopt_tdq.temporal_features.report import memory_text

__all__ = ["Found", "markdown", "panels", "plot"]

#: Of one row: what was measured, and what its export is; None where it was not run.
Found = tuple["dict[str, Any] | None", "dict[str, Any] | None"]

#: Rows that the heat maps show, and what they are called there.
_PANELS = {"naive": "naive", "TIB": "TIB", "cache": "cache", "auto": "chosen"}


def _db(value: Any) -> str:
    number = float(value)
    return "exact" if number == float("-inf") else db_text(number)


def _cells(run: TemporalRun, found: Found, steps: list[str]) -> list[str]:
    result, deployed = found
    errors, judged, cost = ["-", "-"], ["-"] * (2 * len(steps)), ["-", "-"]
    frechet = "-"
    if result is not None:
        errors = [_db(result[f"{which}_feature_error_db"]) for which in ("mean", "worst")]
        judged = []
        for count in steps:
            one = result["judged"][count]
            judged.append(f"{_db(one['mean_sqnr_db'])} / {_db(one['worst_sqnr_db'])}")
            judged.append(_db(one["psnr_db"]))
        if result["frechet"] is not None:
            frechet = f"{float(result['frechet']):.2f}"
        cost[0] = "-" if run.options is None else f"{result['maintenance_seconds']:.0f}"
        if result["table_bytes"] is not None:
            cost[1] = memory_text(result["table_bytes"])
    size, kernels = "-", "-"
    if deployed is not None:
        size = "-" if deployed["onnx_bytes"] is None else memory_text(deployed["onnx_bytes"])
        kernels = "-" if deployed["kernels"] is None else str(deployed["kernels"])
    return [*errors, *judged, frechet, *cost, size, kernels]


def markdown(found: Mapping[TemporalRun, Found], notes: list[str]) -> str:
    """The table, and notes below it.

    Args:
        found: Every row, in order.
        notes: Lines of Markdown.
    """
    first = next((result for result, _ in found.values() if result is not None), None)
    steps = [] if first is None else list(first["judged"])
    columns = ["bits", "temporal layers", "feature error, dB: mean", "worst"]
    for count in steps:
        columns += [f"SQNR, {count} steps, dB: mean / worst", f"images, {count} steps, PSNR dB"]
    columns += ["Fréchet distance", "temporal block, s", "feature table", "ONNX file", "engine kernels"]
    lines = ["Temporal features", "", f"| {' | '.join(columns)} |", f"|---|---|{'--:|' * (len(columns) - 2)}"]
    before = ""
    for run, one in found.items():
        bits = "" if run.bits == before else run.bits
        before = run.bits
        lines.append(f"| {' | '.join([bits, run.label, *_cells(run, one, steps)])} |")
    return "\n".join([*lines, "", *notes])


def panels(found: Mapping[TemporalRun, Found]) -> list[FeatureErrorPanels]:
    """A line of panels per bit width of which all rows that they show were run."""
    lines = []
    for bits, group in groupby(found.items(), key=lambda item: item[0].bits):
        results = {run.label: result for run, (result, _) in group if result is not None}
        if not _PANELS.keys() <= results.keys():
            continue
        some = results["naive"]
        features = list(some["feature_error_db"])
        errors = {
            name: torch.tensor([[float(v) for v in results[label]["feature_error_db"][f]] for f in features])
            for label, name in _PANELS.items()
        }
        longest = max(some["judged"], key=int)
        sqnr = {}
        for label, name in {"none": "none", **_PANELS}.items():
            if label in results:
                one = results[label]["judged"][longest]
                sqnr[name] = (one["timesteps"], [float(v) for v in one["sqnr_db"]])
        lines.append(FeatureErrorPanels(bits, some["times"], features, errors, sqnr))
    return lines


def plot(found: Mapping[TemporalRun, Found], title: str, path: Path) -> Path | None:
    """Heat maps and curves; None where too little was run."""
    lines = panels(found)
    return draw_feature_errors(lines, path, title) if lines else None
