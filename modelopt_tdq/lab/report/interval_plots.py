"""Plots of learned intervals, Figures 1 to 3 of the TDQ supplementary. Each writes a PNG and returns its path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.lab.report.canvas import COLORS, FONT, save_figure
from modelopt_tdq.lab.report.panels import DPI, legend_above, time_panels

__all__ = ["Curve", "IntervalAndSpread", "Panel", "correlation", "interval_and_spread", "intervals_over_time"]

#: Shades of the color of TDQ, one per seed; more seeds begin again.
SEED_COLORS = ("#00543D", COLORS["tdq"], "#7FD1B3")

#: Ticks of a logarithmic axis around 1, in pairs.
_TICKS = ((0.95, 1.05), (0.9, 1.1), (0.8, 1.25), (0.5, 2.0), (0.25, 4.0), (0.125, 8.0), (0.0625, 16.0), (0.02, 50.0))

_DEVIATION, _MAGNITUDE = "#D55E00", "#888888"


@dataclass(frozen=True)
class Curve:
    """Intervals of one quantizer.

    Attributes:
        times: [K] ascending.
        interval: [K] in units of the activation.
    """

    times: Tensor
    interval: Tensor


@dataclass(frozen=True)
class Panel:
    """Learned intervals of one quantizer.

    Attributes:
        name: Of the quantizer.
        temporal: By seed.
        static: By seed; constant over time.
    """

    name: str
    temporal: Mapping[int, Curve]
    static: Mapping[int, Curve]


@dataclass(frozen=True)
class IntervalAndSpread:
    """The intervals of one quantizer, and the activation that they serve.

    Attributes:
        name: Of the quantizer.
        temporal: By seed.
        times: [K'] ascending, at which the activation was measured.
        deviation: [K'] its standard deviation.
        magnitude: [K'] what 99.9 % of its magnitudes do not exceed.
        movement: Largest over smallest value of the first seed's interval at these times, of the deviation, and of
            the magnitude.
        correlation: Of the first two; None where one of them hardly moves.
    """

    name: str
    temporal: Mapping[int, Curve]
    times: Tensor
    deviation: Tensor
    magnitude: Tensor
    movement: tuple[float, float, float]
    correlation: float | None


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation of two [K] series; None where one of them does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    if not scale > 1e-12 * len(a):
        return None
    return max(-1.0, min(1.0, float(a @ b) / scale))


def _shades(seeds: Mapping[int, Curve]) -> Iterator[tuple[int, Curve, str, float]]:
    """Seed, curve, color and width: later ones are thinner, so that equal curves stay visible."""
    for index, (seed, curve) in enumerate(sorted(seeds.items())):
        yield seed, curve, SEED_COLORS[index % len(SEED_COLORS)], max(1.0, 2.6 - 0.8 * index)


def intervals_over_time(panels: Sequence[Panel], path: Path, columns: int = 3) -> Path:
    """Figure 1: the learned interval of each quantizer over time, a line per seed, and the static one, dashed.

    All panels show the same range, as a factor of their middle, and at least 10 % up and down: what moves looks so.

    Args:
        panels: One per quantizer.
        path: Of the PNG to write.
        columns: Panels side by side.
    """
    figure, axes = time_panels([panel.name for panel in panels], columns, "interval s(t), in units of the activation")
    centers, reach = [], 1.1
    for panel, axis in zip(panels, axes, strict=True):
        for seed, curve, color, width in _shades(panel.temporal):
            axis.plot(curve.times, curve.interval, color=color, linewidth=width, label=f"TDQ, seed {seed}")
        for index, curve in enumerate(panel.static.values()):
            label = "static LSQ, each seed" if len(panel.static) > 1 else "static LSQ"
            level = float(curve.interval[0])
            axis.axhline(level, color=COLORS["static"], linewidth=1.2, linestyle="--", label=None if index else label)
        center, far = _center_and_reach(panel)
        centers.append(center)
        reach = max(reach, far)
        axis.grid(alpha=0.25)
    for center, axis in zip(centers, axes, strict=True):
        axis.set_ylim(center / reach**1.15, center * reach**1.15)
    axes[0].invert_xaxis()
    legend_above(figure, axes)
    return save_figure(figure, path, DPI)


def _center_and_reach(panel: Panel) -> tuple[float, float]:
    """Middle of all curves of a panel on a log scale, and the largest factor between it and any of them."""
    values = torch.cat([curve.interval for curve in (*panel.temporal.values(), *panel.static.values())])
    low, high = float(values.min()), float(values.max())
    return math.sqrt(low * high), math.sqrt(high / low)


def interval_and_spread(panels: Sequence[IntervalAndSpread], path: Path, columns: int = 3) -> Path:
    """Figures 2 and 3: interval and activation over time, each against its own geometric mean, on a log scale.

    Args:
        panels: One per quantizer.
        path: Of the PNG to write.
        columns: Panels side by side.
    """
    names = [panel.name for panel in panels]
    figure, axes = time_panels(names, columns, "against its own geometric mean over time")
    reach = 1.25
    for panel, axis in zip(panels, axes, strict=True):
        for label, values, color, style in (
            ("99.9 % magnitude of the activation", panel.magnitude, _MAGNITUDE, ":"),
            ("standard deviation of the activation", panel.deviation, _DEVIATION, "--"),
        ):
            relative = _relative(values)
            reach = max(reach, _reach(relative))
            axis.plot(panel.times, relative, color=color, linestyle=style, linewidth=1.5, label=label)
        for seed, curve, color, width in _shades(panel.temporal):
            relative = _relative(curve.interval)
            reach = max(reach, _reach(relative))
            axis.plot(curve.times, relative, color=color, linewidth=width, label=f"interval, seed {seed}")
        text = "interval {:.2f}x, std {:.2f}x, 99.9 % {:.2f}x".format(*panel.movement)
        if panel.correlation is not None:
            text += f"\nr = {panel.correlation:+.2f}"
        axis.text(0.97, 0.94, text, transform=axis.transAxes, ha="right", va="top", fontsize=FONT - 1)
    _logarithmic(axes, reach**1.35)
    axes[0].invert_xaxis()
    legend_above(figure, axes)
    return save_figure(figure, path, DPI)


def _relative(values: Tensor) -> Tensor:
    values = values.double().clamp(min=torch.finfo(torch.float64).tiny)
    return values / values.log().mean().exp()


def _reach(relative: Tensor) -> float:
    """Largest factor by which a relative curve leaves 1, up or down."""
    return float(relative.log().abs().max().exp())


def _logarithmic(axes: Sequence[Any], reach: float) -> None:
    """The same logarithmic axis for all panels, from 1/reach to reach, so that they can be compared."""
    from matplotlib.ticker import FixedLocator, NullLocator

    pairs = [(down, up) for down, up in _TICKS if max(up, 1 / down) <= reach][-2:]
    ticks = sorted({1.0, *(tick for pair in pairs for tick in pair)})
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylim(1 / reach, reach)
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_yticklabels([f"{tick:.2g}" for tick in ticks])
        axis.grid(alpha=0.25)
