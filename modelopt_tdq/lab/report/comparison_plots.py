"""A comparison as a figure: which layers differ from the reference at which times, and how far the outputs do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelopt_tdq.compare.metrics import FLIP_RATE, CodesDifference
from modelopt_tdq.compare.results import LayerResult, ModelComparison
from modelopt_tdq.lab.report.canvas import COLORS, FONT, new_figure, save_figure, short_name

__all__ = ["draw_comparison"]

#: Shares of codes at the ends of the colour scale, whose middle is what rounding may do.
_SHARES = (FLIP_RATE**2, 1.0)

#: dB below the limit; an output that is equal to the last bit does not take all of the axis.
_BELOW = 40.0

_FAULT = "#D55E00"
_TIME = "timestep (sampling runs to the right)"


def draw_comparison(comparison: ModelComparison, path: Path) -> Path:
    """Draw a heat map per backend (quantizers down, time steps across), and the outputs over time.

    The colour is the share of a layer's codes that differ from the reference's, on a logarithmic scale: blue for what
    rounding may do, red above, nothing where none differs. Cells that rounding does not explain are crossed, and the
    first is named above the heat map.

    Args:
        comparison: From :func:`~modelopt_tdq.compare.compare_model`.
        path: Of the PNG or SVG to write.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    backends = list(comparison.compared_codes)
    names = list(comparison.quantizers)
    times = dict(sorted(((s.step, s.time) for s in comparison.steps), key=lambda pair: -pair[1]))
    height = max(3.4, 0.16 * len(names) + 1.4)
    widths = [1.0] * len(backends) + [1.25]
    figure = new_figure(3.0 * sum(widths) + 1.8, height)
    axes = figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    drawn = None
    for axis, backend in zip(axes, backends, strict=False):
        drawn = _heat_map(axis, comparison, backend, names, list(times))
        _time_axis(axis, list(times.values()))
        axis.set_yticks([])
    if backends:
        axes[0].set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=FONT - 2)
        bar = figure.colorbar(drawn, ax=list(axes[: len(backends)]), fraction=0.06, pad=0.02, extend="min")
        bar.set_label(f"share of codes that differ ({FLIP_RATE:g}: what rounding may do)", fontsize=FONT - 1)
        bar.ax.tick_params(labelsize=FONT - 1)
    _outputs(axes[-1], comparison)
    figure.supxlabel(_TIME, fontsize=FONT)
    return save_figure(figure, path, dpi=130)


def _heat_map(axis: Any, comparison: ModelComparison, backend: str, names: list[str], steps: list[int]) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    shares = np.full((len(names), len(steps)), np.nan)
    found = [layer for layer in comparison.layers if layer.backend == backend]
    for layer in found:
        if isinstance(layer.difference, CodesDifference):
            shares[names.index(layer.name), steps.index(layer.step)] = layer.difference.differing / max(
                1, layer.difference.count
            )
    colours = colormaps["coolwarm"].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
    drawn = axis.imshow(shares, aspect="auto", cmap=colours, norm=LogNorm(*_SHARES), interpolation="nearest", zorder=1)
    _mark_faults(axis, found, names, steps)
    axis.tick_params(length=2, pad=2)
    return drawn


def _mark_faults(axis: Any, found: Sequence[LayerResult], names: list[str], steps: list[int]) -> None:
    faults = [layer for layer in found if not layer.difference]
    inside = [layer for layer in faults if layer.name in names]
    axis.scatter(
        [steps.index(layer.step) for layer in inside],
        [names.index(layer.name) for layer in inside],
        marker="x",
        s=12,
        linewidths=1.0,
        color="#000000",
        zorder=2,
    )
    title = faults[0].backend if faults else found[0].backend if found else ""
    if faults:
        title += f": first {short_name(faults[0].name)}, {faults[0].time:g}"
    axis.set_title(title, fontsize=FONT, color=_FAULT if faults else "#000000", pad=4)


def _time_axis(axis: Any, times: list[float]) -> None:
    places = [round(i * (len(times) - 1) / 4) for i in range(5)] if len(times) > 5 else list(range(len(times)))
    axis.set_xticks(places, [f"{times[i]:g}" for i in places], fontsize=FONT - 2)


def _outputs(axis: Any, comparison: ModelComparison) -> None:
    """The difference of each backend's output, and the noise that it must stay below, over time."""
    backends = list(dict.fromkeys(step.backend for step in comparison.steps))
    ordered = sorted(comparison.steps, key=lambda step: -step.time)
    noise = [step for step in ordered if step.backend == backends[0]]
    # dB below the signal grow downwards, so that what is above the noise is too much
    limit = [-step.difference.noise_db for step in noise]
    axis.plot(
        [step.time for step in noise], limit, color="#000000", linewidth=1.3, label="quantization noise: the limit"
    )
    for backend, colour in zip(backends, [*COLORS.values(), "#CC79A7", "#56B4E9"], strict=False):
        own = [step for step in ordered if step.backend == backend]
        values = [_finite(-step.difference.sqnr_db) for step in own]
        axis.plot([s.time for s in own], values, color=colour, linewidth=1.2, marker=".", markersize=4, label=backend)
        wrong = [(step.time, value) for step, value in zip(own, values, strict=True) if not step.difference]
        axis.scatter([t for t, _ in wrong], [v for _, v in wrong], marker="x", color=_FAULT, zorder=3)
    bottom = max(axis.get_ylim()[0], min(limit) - _BELOW)
    axis.set_ylim(bottom=bottom)
    # what lies below the axis, or is equal to the last bit, is shown at its edge
    below = [step.time for step in ordered if not -step.difference.sqnr_db >= bottom]
    if below:
        axis.scatter(
            below,
            [bottom] * len(below),
            marker="v",
            s=18,
            facecolors="none",
            edgecolors="#000000",
            clip_on=False,
            zorder=4,
            label="less than this, or none",
        )
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.set_ylabel("difference from the reference's output, dB of the signal", fontsize=FONT - 1)
    axis.tick_params(labelsize=FONT - 2, length=2, pad=2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "left"]].set_visible(False)
    axis.invert_xaxis()
    axis.set_title("outputs", fontsize=FONT, pad=4)
    axis.legend(fontsize=FONT - 2, frameon=False, loc="best")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
