"""Small multiples over time, with one legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from modelopt_tdq.lab.report.canvas import FONT, new_figure, short_name

__all__ = ["DPI", "legend_above", "time_panels"]

#: Pixels per inch.
DPI = 130

_TIME = "timestep (sampling runs to the right)"


def time_panels(names: Sequence[str], columns: int, unit: str, height: float = 1.75) -> tuple[Any, list[Any]]:
    """A figure with a panel per quantizer over time; ``unit`` labels the vertical axis."""
    columns = min(columns, len(names))
    lines = math.ceil(len(names) / columns)
    figure = new_figure(3.1 * columns + 0.2, height * lines + 0.7)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes, strict=False):
        axis.set_title(short_name(name), fontsize=FONT, pad=3)
        axis.tick_params(labelsize=FONT - 1, length=2, pad=2, labelbottom=True)
        axis.locator_params(axis="y", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_TIME, fontsize=FONT + 1)
    figure.supylabel(unit, fontsize=FONT + 1)
    return figure, axes[: len(names)]


def legend_above(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, above them."""
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        list(labels.values()),
        list(labels),
        loc="outside upper center",
        ncols=max(1, len(labels)),
        fontsize=FONT,
        frameon=False,
    )
