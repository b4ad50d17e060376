"""Plots of activations and images, Figures 4 to 9 of the TDQ supplementary. Each writes a PNG and returns its path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modelopt_tdq.lab.report.canvas import FONT, new_figure, save_figure
from modelopt_tdq.lab.report.panels import DPI, time_panels

__all__ = ["density_over_time", "rows_of_samples"]

#: Densities below this part of a panel's largest are white.
_SMALLEST_DENSITY = 1e-4


def density_over_time(densities: Mapping[str, tuple[Tensor, Tensor, Tensor]], path: Path, columns: int = 3) -> Path:
    """Figures 4 and 5: the distribution of each activation over time.

    Args:
        densities: Name of the quantizer to times [K] ascending, edges [B + 1] and density [K, B].
        path: Of the PNG to write.
        columns: Panels side by side.
    """
    figure, axes = time_panels(list(densities), columns, "value of the activation", height=2.1)
    from matplotlib.colors import LogNorm

    drawn = None
    for (times, edges, density), axis in zip(densities.values(), axes, strict=True):
        relative = density / density.max().clamp(min=torch.finfo(torch.float64).tiny)
        shown = relative.clamp(min=_SMALLEST_DENSITY).T
        norm = LogNorm(_SMALLEST_DENSITY, 1.0)
        drawn = axis.pcolormesh(_time_edges(times), edges, shown, cmap="Blues", norm=norm, rasterized=True)
    axes[0].invert_xaxis()
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("density, against the panel's largest", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    return save_figure(figure, path, DPI)


def _time_edges(times: Tensor) -> Tensor:
    """[K + 1] borders half-way between the times; the outer ones as far out as the inner ones are in."""
    times = times.double()
    if len(times) == 1:
        return torch.cat([times - 0.5, times + 0.5])
    middle = (times[1:] + times[:-1]) / 2
    return torch.cat([2 * times[:1] - middle[:1], middle, 2 * times[-1:] - middle[-1:]])


def rows_of_samples(rows: Mapping[str, Tensor], title: str, path: Path) -> Path:
    """Figures 6 to 9: images of the same seeds, a way of computing per row.

    Args:
        rows: Label to [N, C, H, W] in [-1, 1], C 1 or 3.
        title: Above the images.
        path: Of the PNG to write.
    """
    columns = len(next(iter(rows.values())))
    figure = new_figure(1.0 * columns + 1.6, 1.0 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        for axis, picture in zip(line, pixels.expand(-1, -1, -1, 3).numpy(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT + 1, labelpad=8)
    figure.suptitle(title, fontsize=FONT + 1)
    return save_figure(figure, path, DPI)
