"""Errors of temporal features, feature by feature and time by time, and what they do to the noise prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.lab.report.canvas import FONT, new_figure, save_figure

__all__ = ["STRATEGY_COLORS", "FeatureErrorPanels", "draw_feature_errors", "feature_labels"]

#: Color-blind safe (Okabe-Ito), one per strategy.
STRATEGY_COLORS = {
    "naive": "#D55E00",
    "TIB": "#0072B2",
    "tib": "#0072B2",
    "cache": "#CC79A7",
    "chosen": "#009E73",
}

#: Dashes that let curves be seen which lie upon each other.
_DASHES = {"cache": (0, (4, 2)), "chosen": (0, (2, 3))}

#: dB; a colour scale is never wider, so that an exact feature does not take all of it.
_RANGE = 60.0

_TIME = "timestep (sampling runs to the right)"


@dataclass(frozen=True)
class FeatureErrorPanels:
    """One line of panels: a heat map per strategy, and curves beside them.

    Attributes:
        title: Of the line, such as the bits.
        times: [K] ascending.
        features: [F] names of layers.
        errors: Strategy to [F, K] relative squared error in dB, minus infinity where there is none.
        sqnr: Strategy to (times [S], SQNR of the noise prediction at each, in dB). With one called "none", the others
            are drawn as what they change against it.
    """

    title: str
    times: Sequence[float]
    features: Sequence[str]
    errors: Mapping[str, Tensor]
    sqnr: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


def feature_labels(names: Sequence[str]) -> list[str]:
    """The names without what they share in front and behind, and short."""
    parts = [name.split(".") for name in names]
    end = 0
    while len(names) > 1 and min(map(len, parts)) > end + 1 and len({tuple(p[-end - 1 :]) for p in parts}) == 1:
        end += 1
    kept = [p[: len(p) - end] for p in parts]
    start = 0
    while len(names) > 1 and min(map(len, kept)) > start + 1 and len({tuple(p[: start + 1]) for p in kept}) == 1:
        start += 1
    if all(p[start:][0].isdigit() for p in kept):  # a number alone says nothing
        start = max(0, start - 1)
    return [".".join(p[start:]).replace("_blocks", "").replace("_block", "").replace("resnets", "res") for p in kept]


def draw_feature_errors(panels: Sequence[FeatureErrorPanels], path: Path, title: str = "") -> Path:
    """Draw the lines of panels below each other, with one colour scale for all heat maps.

    Args:
        panels: At least one; all with the same strategies.
        path: Of the PNG to write.
        title: Of the figure.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    strategies = list(panels[0].errors)
    curves = any(line.sqnr for line in panels)
    values = torch.cat([error.flatten() for line in panels for error in line.errors.values()])
    finite = values[values.isfinite()]
    high = math.ceil(float(finite.max())) if len(finite) else 0
    low = max(math.floor(float(finite.min())), high - _RANGE) if len(finite) else high - _RANGE
    heights = [max(1.7, 0.15 * len(line.features) + 0.5) for line in panels]
    widths = [1.0] * len(strategies) + [1.25] * curves
    figure = new_figure(2.5 * sum(widths) + 1.6, sum(heights) + 0.75)
    axes = figure.subplots(
        len(panels), len(widths), squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": widths}
    )
    drawn: Any = None
    for row, line in zip(axes, panels, strict=True):
        for axis, strategy in zip(row, strategies, strict=False):
            drawn = _heat_map(axis, line, strategy, (low, high))
            if line is panels[0]:
                axis.set_title(strategy, fontsize=FONT + 1, pad=4)
            if line is not panels[-1]:
                axis.tick_params(labelbottom=False)
        row[0].set_yticks(range(len(line.features)), feature_labels(line.features), fontsize=FONT - 2)
        row[0].set_ylabel(line.title, fontsize=FONT + 2, fontweight="bold")
        if curves:
            _curves(row[-1], line, legend=line is panels[0], last=line is panels[-1])
    last_heat_maps = list(axes[:, len(strategies) - 1])
    bar = figure.colorbar(drawn, ax=last_heat_maps, fraction=0.08, pad=0.04, extend="min" if len(finite) else "neither")
    bar.set_label("feature error, dB", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    figure.supxlabel(_TIME, fontsize=FONT)
    if title:
        figure.suptitle(title, fontsize=FONT + 2)
    return save_figure(figure, path, dpi=130)


def _heat_map(axis: Any, line: FeatureErrorPanels, strategy: str, limits: tuple[float, float]) -> Any:
    """Columns are rows of the table, at equal distances whatever their times."""
    shown = line.errors[strategy].flip(1).clamp(min=limits[0])  # minus infinity has no colour
    drawn = axis.imshow(shown, aspect="auto", cmap="magma", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    times = list(line.times)[::-1]
    places = [round(i * (len(times) - 1) / 4) for i in range(5)] if len(times) > 5 else list(range(len(times)))
    axis.set_xticks(places, [f"{times[i]:g}" for i in places], fontsize=FONT - 2)
    axis.set_yticks([])
    axis.tick_params(length=2, pad=2)
    return drawn


def _curves(axis: Any, line: FeatureErrorPanels, legend: bool, last: bool) -> None:
    base = line.sqnr.get("none")
    for strategy, (times, decibels) in line.sqnr.items():
        if strategy == "none":
            axis.axhline(0.0, label="exact features", color="#000000", linewidth=0.8)
            continue
        less = [0.0] * len(decibels) if base is None else base[1]
        shown = [value - other for value, other in zip(decibels, less, strict=True)]
        axis.plot(
            times,
            [value if math.isfinite(value) else math.nan for value in shown],
            label=strategy,
            color=STRATEGY_COLORS.get(strategy),
            linestyle=_DASHES.get(strategy, "-") if len(line.sqnr) > 2 else "-",
            linewidth=1.3,
        )
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.set_ylabel("SQNR, dB" if base is None else "change of the SQNR, dB", fontsize=FONT)
    axis.tick_params(labelsize=FONT - 2, length=2, pad=2, labelbottom=last)
    axis.grid(alpha=0.3)
    axis.spines[["top", "left"]].set_visible(False)
    axis.invert_xaxis()
    if legend:
        axis.set_title("SQNR of the noise prediction", fontsize=FONT + 1, pad=4)
        axis.legend(fontsize=FONT - 2, frameon=False, ncols=2, loc="best", handlelength=2.2, columnspacing=1.0)
