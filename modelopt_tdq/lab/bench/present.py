"""A table of runs as Markdown and as a plot, our rows beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelopt_tdq.lab.bench.summary import RowSummary, rank_correlation
from modelopt_tdq.lab.bench.tables import Table

__all__ = ["markdown", "plot"]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, and half the range over the seeds."""
    if not values:
        return "-"
    if any(math.isinf(v) for v in values):
        failed = sum(math.isinf(v) for v in values)
        return "failed" if failed == len(values) else f"{failed} of {len(values)} failed"
    mean = f"{math.fsum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _paper(value: float | None) -> str:
    return "-" if value is None else "no result" if math.isinf(value) else f"{value:g}"


def markdown(table: Table, rows: Sequence[RowSummary], notes: Sequence[str]) -> str:
    """The table: paper, test loss and its excess over full precision, SQNR, PSNR, seeds, wall time."""
    full = next((r.mean_loss for r in rows if r.label == "full precision"), math.nan)
    lines = [
        f"Table {table.number}: {table.title}",
        "",
        "| | paper, FID | test loss | over full precision, % | SQNR mean, dB | SQNR worst step, dB | images, PSNR dB "
        "| seeds | wall time, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        excess = [100 * (loss / full - 1) for loss in row.loss]
        reference = row.label == "full precision"
        cells = [
            row.label,
            _paper(row.paper),
            _spread(row.loss, 5),
            "-" if reference else _spread(excess, 1),
            _spread(row.sqnr_db, 2),
            _spread(row.worst_sqnr_db, 2),
            _spread(row.psnr_db, 1),
            "-" if reference else f"{len(row.seeds)} of {row.wanted}",
            f"{row.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    correlation = rank_correlation(rows)
    lines += ["", f"The paper's setting: {table.paper_setting}. ± is half the range over the seeds."]
    if correlation is not None:
        lines.append(
            f"Rank correlation of our loss with the paper's FID over the rows that both have: {correlation:+.2f}."
        )
    return "\n".join([*lines, *notes])


def plot(table: Table, rows: Sequence[RowSummary], title: str, path: Path) -> Path:
    """Excess of the test loss over full precision, each seed a point; the paper's FID beside it."""
    from modelopt_tdq.lab.report.canvas import COLORS, new_figure, save_figure

    full = next((r.mean_loss for r in rows if r.label == "full precision"), math.nan)
    shown = [r for r in rows if r.label != "full precision"][::-1]
    figure = new_figure(8.5, 0.9 + 0.32 * len(shown))
    ours, theirs = figure.subplots(1, 2, sharey=True)
    for y, row in enumerate(shown):
        excess = [100 * (loss / full - 1) for loss in row.loss if math.isfinite(loss)]
        ours.plot(excess, [y] * len(excess), "o", color=COLORS["tdq"], alpha=0.6, markersize=5)
        if len(row.loss) > len(excess):
            ours.annotate("failed", (0, y), color=COLORS["max"], fontsize=8, va="center")
        if row.paper is not None and math.isfinite(row.paper):
            theirs.plot([row.paper], [y], "s", color=COLORS["static"], markersize=5)
        elif row.paper is not None:
            theirs.annotate("no result", (theirs.get_xlim()[0], y), color=COLORS["max"], fontsize=8, va="center")
    ours.set_yticks(range(len(shown)), [r.label for r in shown], fontsize=8)
    values = [100 * (loss / full - 1) for r in shown for loss in r.loss if math.isfinite(loss) and loss > full]
    if values and max(values) > 4 * min(values):  # one row far off would leave no room for the others
        from matplotlib.ticker import LogLocator, NullLocator

        ours.set_xscale("log")
        ours.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ours.xaxis.set_minor_locator(NullLocator())
        ours.xaxis.set_major_formatter("{x:g}")
    ours.set_xlabel("test loss over full precision, %", fontsize=8)
    theirs.set_xlabel("paper, FID", fontsize=8)
    _style([ours, theirs])
    figure.suptitle(f"Table {table.number}: {table.title}; {title}", fontsize=9)
    return save_figure(figure, path)


def _style(axes: Sequence[Any]) -> None:
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
