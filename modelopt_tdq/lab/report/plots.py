"""The plots, one function each. Each writes a PNG or an SVG, as its path says, and returns the path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modelopt_tdq.lab.report.canvas import COLORS, FONT, new_figure, save_figure, short_name

__all__ = ["correction_heat_map", "image_grid", "scale_heat_map", "scales_over_time", "sqnr_per_step"]


def _finite(values: Sequence[float]) -> list[float]:
    """NaN, which matplotlib leaves out, in place of infinities."""
    return [v if math.isfinite(v) else math.nan for v in values]


def image_grid(rows: Mapping[str, Tensor], path: Path) -> Path:
    """Images of the same seeds, one way of computing per row.

    Args:
        rows: Label to [N, C, H, W] in [-1, 1]; C is 3, or 1 for height maps, whose colours run from the least to the
            largest height of the first row.
        path: Of the PNG or SVG to write.
    """
    columns = len(next(iter(rows.values())))
    figure = new_figure(0.95 * columns + 1.5, 0.95 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    first = next(iter(rows.values()))
    look: dict[str, Any] = {}
    if first.shape[1] == 1:
        look = {"cmap": "gist_earth", "vmin": float(first.min()), "vmax": float(first.max())}
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        pixels = images.squeeze(1) if look else _bytes(images)
        for axis, picture in zip(row, pixels.numpy(), strict=True):
            axis.imshow(picture, interpolation="nearest", **look)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT + 1)
    return save_figure(figure, path)


def _bytes(images: Tensor) -> Tensor:
    """[N, H, W, 3] uint8 of images [N, 3, H, W] in [-1, 1]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def time_axis(times: Sequence[float]) -> Literal["log", "linear"]:
    """How to draw times: by their logarithms where the gaps between them differ much, as those between sigmas do."""
    ordered = sorted(times)
    gaps = [after - before for before, after in pairwise(ordered)]
    return "log" if gaps and ordered[0] > 0 and max(gaps) > 10 * min(gaps) else "linear"


def sqnr_per_step(
    panels: Mapping[str, Mapping[str, tuple[str, Sequence[float]]]], times: list[float], path: Path
) -> Path:
    """SQNR of the prediction at each step, one panel per bit width.

    Args:
        panels: Title to {variant: (label, [S] dB)}.
        times: [S], in the order of sampling.
        path: Of the PNG or SVG to write.
    """
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(5.2 * columns, 2.9 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)  # so that panels can be compared
    for (title, curves), axis in zip(panels.items(), axes, strict=False):
        for variant, (label, decibels) in curves.items():
            width = 2.2 if variant == "tdq" else 1.4
            axis.plot(times, _finite(decibels), color=COLORS[variant], label=label, linewidth=width)
        axis.set_title(title, fontsize=FONT + 2)
        axis.set_ylabel("SQNR, dB", fontsize=FONT)
        axis.set_xlabel("timestep (sampling runs to the right)", fontsize=FONT)
        axis.tick_params(labelsize=FONT, labelleft=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=FONT, frameon=False)
        axis.set_xscale(time_axis(times))
        axis.invert_xaxis()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return save_figure(figure, path)


def scales_over_time(
    names: Sequence[str], times: Tensor, scales: Mapping[str, tuple[str, Tensor]], path: Path, columns: int = 5
) -> Path:
    """The scale of each quantizer over time, one small panel each, all with the same axes so that they can be compared.

    Scales are relative: to the static one of the quantizer where there is one, else to their geometric mean over time.

    Args:
        names: [Q], one per panel.
        times: [K] ascending.
        scales: Variant to (label, [K, Q] or, where static, [Q]).
        path: Of the PNG or SVG to write.
        columns: Panels side by side.
    """
    columns = min(columns, max(1, len(names)))
    lines = math.ceil(len(names) / columns)
    base = scales["static"][1] if "static" in scales else next(iter(scales.values()))[1]
    base = base if base.dim() == 1 else base.log().mean(0).exp()
    relative = {variant: (label, (values / base).log2()) for variant, (label, values) in scales.items()}
    reach = max(0.25, *(float(values[values.isfinite()].abs().max()) for _, values in relative.values()))
    step = max(1, math.ceil(reach) // 2) if reach > 1 else 0.5
    ticks = [step * i for i in range(-math.floor(reach / step), math.floor(reach / step) + 1)]
    # margins by hand: matplotlib takes seconds to find them for fifty panels
    width, height, head, foot = 2.45 * columns, 1.45 * lines + 0.75, 0.45, 0.42
    figure = new_figure(width, height, layout=None)
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.1 / width, bottom=foot / height, top=1 - head / height, wspace=0.28, hspace=0.28
    )
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    scaling = time_axis(times.tolist())
    for index, (name, axis) in enumerate(zip(names, axes, strict=False)):
        for variant, (label, values) in relative.items():
            if values.dim() == 1:
                axis.axhline(float(values[index]), color=COLORS[variant], linewidth=1.1, linestyle="--", label=label)
            else:
                axis.plot(times, values[:, index], color=COLORS[variant], linewidth=1.8, label=label)
        axis.set_title(short_name(name), fontsize=FONT - 2, pad=2)
        axis.tick_params(labelsize=FONT - 2, length=2, pad=1)
        axis.set_ylim(-1.08 * reach, 1.08 * reach)
        axis.set_yticks(ticks, [f"{2.0**tick:.3g}x" for tick in ticks])
        axis.set_xscale(scaling)
        axis.set_xlim(float(times[-1]), float(times[0]))
        if scaling == "linear":
            axis.locator_params(axis="x", nbins=4)
        axis.grid(alpha=0.25)
        axis.tick_params(labelbottom=index + columns >= len(names), labelleft=index % columns == 0)
    against = "the static scale" if "static" in scales else "its own mean"
    figure.text(0.5, 0.06 / height, "timestep (sampling runs to the right)", ha="center", fontsize=FONT)
    figure.text(0.1 / width, 0.5, f"against {against}", rotation=90, va="center", fontsize=FONT)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=FONT, frameon=False)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return save_figure(figure, path)


def scale_heat_map(names: Sequence[str], times: Tensor, scale: Tensor, path: Path) -> Path:
    """All scales over time at once: each against its own geometric mean, in powers of two.

    Args:
        names: [Q].
        times: [K] ascending.
        scale: [K, Q].
        path: Of the PNG or SVG to write.
    """
    relative = scale.log2()
    relative = relative - relative.mean(0, keepdim=True)
    limit = max(0.25, float(relative.abs().max()))
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return _heat_map(names, times, relative, "scale, log2 against its mean over time", path, look)


def correction_heat_map(names: Sequence[str], times: Tensor, gain: Tensor, path: Path) -> Path:
    """How much the gains of each layer are, over time.

    Args:
        names: [L] layers.
        times: [K] ascending.
        gain: [K, L] root mean square of gain - 1 over the channels of the layer.
        path: Of the PNG or SVG to write.
    """
    look = {"cmap": "viridis", "vmin": 0.0}
    return _heat_map(names, times, 100 * gain, "gain - 1, root mean square over channels, %", path, look)


def _heat_map(
    names: Sequence[str], times: Tensor, values: Tensor, label: str, path: Path, look: Mapping[str, Any]
) -> Path:
    """[K, N] values, one line for each name, the last time first."""
    figure = new_figure(9.0, 0.17 * len(names) + 1.1)
    axis = figure.subplots()
    drawn = axis.imshow(values.flip(0).T, aspect="auto", interpolation="nearest", **look)
    axis.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=FONT - 1)
    shown = range(0, len(times), max(1, len(times) // 10))
    axis.set_xticks(list(shown), [f"{t:.4g}" for t in times.flip(0)[:: max(1, len(times) // 10)]], fontsize=FONT - 1)
    axis.set_xlabel("timestep (sampling runs to the right)", fontsize=FONT)
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    return save_figure(figure, path)
