"""The comparison as Markdown, a table per model and number format, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelopt_tdq.core.metrics import db_text
from modelopt_tdq.lab.bench.rivals.rows import ROWS, Row
from modelopt_tdq.lab.provenance import provenance_line
from modelopt_tdq.lab.report.canvas import COLORS, FONT, new_figure, save_figure

__all__ = ["Tables", "draw", "markdown"]

#: (model, format) to rows, in order, with what was found; None where a row was not run.
Tables = Mapping["tuple[str, str]", Sequence["tuple[Row, dict[str, Any] | None]"]]

#: Measure to its heading, whether more is better, and its digits.
_MEASURES = {
    "mean_sqnr_db": ("SQNR mean, dB", True, 2),
    "worst_sqnr_db": ("SQNR worst step, dB", True, 2),
    "psnr_db": ("images, PSNR dB", True, 2),
    "frechet": ("Fréchet distance", False, 2),
}

_GROUP_COLORS = {"others": COLORS["max"], "static": COLORS["static"], "ours": COLORS["tdq"]}
_GROUP_LABELS = {"others": "others", "static": "static, ours", "ours": "over time, ours"}


def _measured(found: dict[str, Any] | None) -> bool:
    return found is not None and "failed" not in found


def _is_whole(found: Mapping[str, Any]) -> bool:
    return bool(found["layers"] == found["of_layers"])


def _best(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Measure to its best value, of those that were measured."""
    best = {}
    for name, (_, more, _) in _MEASURES.items():
        values = [float(found[name]) for found in results if found[name] is not None]
        if values:
            best[name] = max(values) if more else min(values)
    return best


def _table(rows: Sequence[tuple[Row, dict[str, Any] | None]]) -> list[str]:
    results = [found for _, found in rows if found is not None and _measured(found)]
    best = _best(results)
    headings = [_MEASURES[name][0] for name in best]
    lines = [
        f"| | layers | {' | '.join([*headings, 'calibration, s'])} | costs when deployed |",
        f"|---|--:|{'--:|' * (len(headings) + 1)}---|",
    ]
    for row, found in rows:
        if found is None or not _measured(found):
            why = "not run" if found is None else f"failed: {found['failed']}"
            lines.append(f"| {row.title} | - |{' - |' * (len(headings) + 1)} {' '.join(why.split())} |")
            continue
        cells = []
        for name, value in best.items():
            text = db_text(None if found[name] is None else float(found[name]), _MEASURES[name][2])
            cells.append(f"**{text}**" if found[name] is not None and float(found[name]) == value else text)
        layers = f"{found['layers']} of {found['of_layers']}"
        seconds = f"{found['calibration_seconds']:.0f}"
        lines.append(f"| {row.title} | {' | '.join([layers, *cells, seconds])} | {row.costs} |")
    whole = _best([found for found in results if _is_whole(found)])
    if whole and whole != best:
        told = ", ".join(f"{_MEASURES[name][0]} {value:.{_MEASURES[name][2]}f}" for name, value in whole.items())
        lines += ["", f"The best of the rows that quantize all layers: {told}."]
    return lines


def _sizes(rows: Sequence[tuple[Row, dict[str, Any] | None]]) -> str:
    """How the rows of one table were calibrated and judged."""
    told = {
        f"calibrated on {s['samples']} trajectories of {s['steps']} steps, judged on {s['held_out']} others"
        + (f", Fréchet distance of {s['frechet']} images" if s["frechet"] else "")
        for s in (found["sizes"] for _, found in rows if found is not None)
    }
    return "; ".join(sorted(told))


def markdown(tables: Tables) -> str:
    """All tables, what the rows are, and where the results come from."""
    lines = [
        "# Against what people deploy today",
        "",
        "SQNR of the model's prediction, mean and worst of the steps, on held-out trajectories, and PSNR of the images "
        "of the same seeds, both against full precision. All rows have the same calibration noise, the same held-out "
        "trajectories, and weights per output channel; all quantize the layers of our recipe, or as many of them as "
        "the column says. The best of each column is bold. Where fewer layers are quantized, the rest has no error: "
        "compare such rows with each other. Calibration: wall time, all stages of a row together.",
    ]
    shown: dict[str, Row] = {}
    sources: dict[str, None] = {}
    for (model, bits), rows in tables.items():
        if not rows:
            continue
        lines += ["", f"## {model}, {bits}", "", f"{_sizes(rows) or 'not run'}.", "", *_table(rows)]
        shown |= {row.name: row for row, _ in rows}
        sources |= {provenance_line(found["source"]): None for _, found in rows if found is not None}
    lines += ["", "## The rows", ""]
    lines += [f"- **{row.title}** (`{row.name}`): {row.what}." for row in ROWS.values() if row.name in shown]
    lines += [
        "",
        "Costs: products of one layer on an NVIDIA H100, by our kernels (`benchmarks/results/gpu`). Codes of 4 bits "
        "travel as INT8. Dynamic scales per tensor are measured for each image alone, as where a call has one image; "
        "one scale for several images is worse.",
        "",
        *sources,
    ]
    return "\n".join(lines)


def draw(tables: Tables, path: Path) -> Path | None:
    """SQNR of every row: a panel per model and format, dots for the mean, thin lines to the worst step.

    Args:
        tables: Of :func:`markdown`.
        path: Of the PNG to write.

    Returns:
        None where nothing was run.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    from matplotlib.lines import Line2D

    measured = {key: [(r, f) for r, f in rows if f is not None and _measured(f)] for key, rows in tables.items()}
    measured = {key: rows for key, rows in measured.items() if rows}
    if not measured:
        return None
    models = list(dict.fromkeys(model for model, _ in measured))
    formats = list(dict.fromkeys(bits for _, bits in measured))
    names = {
        model: [
            row
            for row in ROWS.values()
            if any(row is r for (m, _), rows in measured.items() if m == model for r, _ in rows)
        ]
        for model in models
    }
    heights = [0.19 * len(names[model]) + 0.5 for model in models]
    figure = new_figure(2.4 * len(formats) + 2.3, sum(heights) + 0.8)
    axes = figure.subplots(len(models), len(formats), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, model in zip(axes, models, strict=True):
        for axis, bits in zip(line, formats, strict=True):
            _panel(axis, names[model], measured.get((model, bits), []))
            axis.set_title(f"{model}, {bits}", fontsize=FONT + 1, pad=4)
            axis.tick_params(labelleft=axis is line[0])
        line[0].set_yticks(range(len(names[model])), [row.title for row in names[model]], fontsize=FONT - 1)
    for axis in axes[-1]:
        axis.set_xlabel("SQNR of the prediction, dB", fontsize=FONT)
    handles = [
        *(Line2D([], [], color=color, marker="o", linestyle="", label=_GROUP_LABELS[group], markersize=5)
          for group, color in _GROUP_COLORS.items()),
        Line2D([], [], color="#666666", marker="o", linestyle="", label="some layers in high precision",
               markerfacecolor="white", markersize=5),
        Line2D([], [], color="#666666", marker="|", label="mean (dot) and worst step (bar)", linewidth=1.0),
    ]  # fmt: skip
    columns = {1: 2, 2: 3}.get(len(formats), len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=FONT - 1, frameon=False)
    return save_figure(figure, path, dpi=130)


def _panel(axis: Any, order: Sequence[Row], rows: Sequence[tuple[Row, dict[str, Any]]]) -> None:
    places = {row.name: number for number, row in enumerate(order)}
    for row, found in rows:
        mean, worst, color = float(found["mean_sqnr_db"]), float(found["worst_sqnr_db"]), _GROUP_COLORS[row.group]
        place = places[row.name]
        axis.plot([worst, mean], [place, place], color=color, linewidth=1.0, alpha=0.6, zorder=1)
        axis.plot(worst, place, color=color, marker="|", markersize=6, zorder=1)
        face = color if _is_whole(found) else "white"
        axis.plot(mean, place, color=color, marker="o", markersize=5, markerfacecolor=face, zorder=2)
    axis.set_yticks(range(len(order)), [""] * len(order))
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=FONT - 1, length=2)
    axis.spines[["top", "right"]].set_visible(False)
