"""Figures 1 to 9 of the TDQ supplementary, for one model: what is measured, what is drawn, and an index of it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.activations import (
    LayerActivation,
    distinct_inputs,
    measure_activations,
    most_and_least,
    ratio_over_time,
)
from modelopt_tdq.lab.bench.kept_tables import KeptTables, kept_tables
from modelopt_tdq.lab.bench.qat_run import checksum
from modelopt_tdq.lab.bench.sample_rows import (
    SHOWN_RECIPES,
    SampleRow,
    SampleSettings,
    full_precision_images,
    quantized_images,
)
from modelopt_tdq.lab.demo.settings import recipe_label
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.report.figure_index import IndexedFigure, write_index
from modelopt_tdq.lab.report.interval_plots import (
    Curve,
    IntervalAndSpread,
    Panel,
    correlation,
    interval_and_spread,
    intervals_over_time,
)
from modelopt_tdq.lab.report.supplement import density_over_time, rows_of_samples
from modelopt_tdq.lab.trajectories import is_unconditional, load_scheduler

__all__ = ["FigureSettings", "supplement_figures"]

#: Layers in Figures 2 and 3; in Figures 4 and 5; those that move most, and least, in Figure 1.
_SPREAD_LAYERS, _DENSITY_LAYERS, _MOST, _LEAST = 9, 6, 6, 3

_ONCE = "Layers with the same input, such as the projections of an attention, are shown once."

#: What moves by less than this factor is not said to follow anything.
_MOVES = 1.01


@dataclass(frozen=True)
class FigureSettings:
    """What the figures are made of.

    Attributes:
        model: Folder of the full-precision model, its scheduler in ``scheduler/``.
        results: Folder that ``modelopt-tdq bench supplement`` wrote.
        output: Folder for the figures and their index.
        command: As shown in the index.
        samples: How images are made; its trajectories are those on which activations are measured.
    """

    model: Path
    results: Path
    output: Path
    command: str
    samples: SampleSettings = field(default_factory=SampleSettings)


def supplement_figures(settings: FigureSettings, progress: bool = True) -> Path:
    """Draw the figures, and write ``figures.md`` beside them.

    Returns:
        The path of the index.

    Raises:
        TdqError: There are no results, none of this model, or the model cannot be sampled from noise alone.
        MissingExtraError: matplotlib or diffusers is not installed.
    """
    require("matplotlib", "report")
    if not settings.model.is_dir():
        raise TdqError(
            "model", str(settings.model), "no such folder", "Name the folder of the model that was benchmarked"
        )
    kept = kept_tables(settings.results, settings.model)
    model, scheduler = load_model(settings.model), load_scheduler(settings.model)
    if not is_unconditional(model):
        problem = f"{type(model).__name__} takes more than a sample, a time and class labels"
        raise TdqError("model", str(settings.model), problem, "Pass a model that samples from noise alone")
    how = settings.samples
    layers = distinct_inputs(measure_activations(model, scheduler, how.trajectories, how.steps, how.seed, progress))
    figures = _intervals(layers, kept, settings) + _densities(layers, settings)
    figures += _samples(model, scheduler, settings, progress)
    seeds = {
        "training": ", ".join(str(seed) for seed in sorted({*kept.temporal, *kept.static})) or "none",
        "activations and calibration": str(how.seed),
        "images": str(how.image_seed),
    }
    facts = {
        "command": f"`{settings.command}`",
        "model": f"{type(model).__name__}, checksum {checksum(settings.model)}",
        "seeds": "; ".join(f"{use} {seed}" for use, seed in seeds.items()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return write_index(settings.output / "figures.md", facts, figures, _missing(kept))


def _missing(kept: KeptTables) -> list[str]:
    missing = list(kept.missing)
    if not kept.temporal:
        missing.insert(0, "Figures 1, 2 and 3 are missing: they need learned intervals.")
    return missing


def _column(tables: Mapping[int, ScaleTable], name: str) -> dict[int, Curve]:
    return {
        seed: Curve(table.timesteps, table.column(table.names.index(name)).value_scale)
        for seed, table in tables.items()
        if name in table.names
    }


def _intervals(layers: list[LayerActivation], kept: KeptTables, settings: FigureSettings) -> list[IndexedFigure]:
    """Figures 1 to 3."""
    shown = [layer for layer in layers if _column(kept.temporal, layer.name)]
    if not shown or kept.budget is None:
        return []
    seeds = "s " * (len(kept.temporal) > 1) + " and ".join(", ".join(map(str, sorted(kept.temporal))).rsplit(", ", 1))
    seeds = f"seed{seeds}" if len(kept.temporal) > 1 else f"seed {seeds}"
    rows = len(next(iter(kept.temporal.values())))
    trained = (
        f"{kept.label}, {kept.budget.steps} steps of QAT with batch {kept.budget.batch} (budget "
        f"{kept.budget.name}), {seeds}; tables of {rows} times."
    )
    most, least = most_and_least(shown, _SPREAD_LAYERS)
    first = [*most_and_least(shown, _MOST)[0], *most_and_least(shown, _LEAST)[1]]
    first = list({layer.name: layer for layer in first}.values())
    panels = [
        Panel(layer.name, _column(kept.temporal, layer.name), _column(kept.static, layer.name)) for layer in first
    ]
    static = "Dashed: static LSQ of the same budget." if kept.static else "No static LSQ was found to compare with."
    figures = [
        IndexedFigure(
            "Figure 1: learned interval over time",
            intervals_over_time(panels, settings.output / "figure-1.png").name,
            f"The layers whose activations move most over time, then those that move least; all panels "
            f"show the same range, as a factor of their middle. {trained} {static} {_ONCE}",
        )
    ]
    for number, chosen, which in ((2, most, "most"), (3, least, "least")):
        path = settings.output / f"figure-{number}.png"
        followed = [_followed(layer, kept.temporal) for layer in chosen]
        text = (
            f"The {len(chosen)} layers whose activations move {which}. Each curve is divided by its own geometric mean "
            f"over time; all panels of this figure share one scale. Written in a panel: largest over smallest "
            f"interval (first seed), standard deviation and 99.9 % magnitude; r: correlation of the first two, where "
            f"both move by 1 % or more. {trained} "
            f"{_measured(settings)} {_ONCE}"
        )
        title = f"Figure {number}: interval against activation spread, layers that move {which}"
        figures.append(IndexedFigure(title, interval_and_spread(followed, path).name, text))
    return figures


def _followed(layer: LayerActivation, tables: Mapping[int, ScaleTable]) -> IntervalAndSpread:
    curves = _column(tables, layer.name)
    first = tables[min(curves)].resample(layer.times)
    interval = first.column(first.names.index(layer.name)).value_scale
    movement = (ratio_over_time(interval), ratio_over_time(layer.deviation), ratio_over_time(layer.magnitude))
    related = correlation(interval, layer.deviation) if min(movement[:2]) >= _MOVES else None
    return IntervalAndSpread(layer.name, curves, layer.times, layer.deviation, layer.magnitude, movement, related)


def _measured(settings: FigureSettings) -> str:
    how = settings.samples
    return f"Activations of full precision on {how.trajectories} trajectories of {how.steps} steps."


def _densities(layers: list[LayerActivation], settings: FigureSettings) -> list[IndexedFigure]:
    """Figures 4 and 5."""
    figures = []
    for number, chosen, which in zip((4, 5), most_and_least(layers, _DENSITY_LAYERS), ("most", "least"), strict=True):
        found = {layer.name: layer.distribution() for layer in chosen}
        drawn = {layer.name: (layer.times, found[layer.name].edges, found[layer.name].density) for layer in chosen}
        path = density_over_time(drawn, settings.output / f"figure-{number}.png")
        moves = f"{min(layer.movement for layer in chosen):.2f} to {max(layer.movement for layer in chosen):.2f}"
        caption = (
            f"The {len(chosen)} layers whose activations move {which}: largest over smallest standard "
            f"deviation or 99.9 % magnitude {moves}. "
            f"{_measured(settings)} Values rarer than 0.05 % on either side are left out. {_ONCE}"
        )
        title = f"Figure {number}: activations over time, layers that move {which}"
        figures.append(IndexedFigure(title, path.name, caption))
    return figures


def _samples(model: nn.Module, scheduler: Any, settings: FigureSettings, progress: bool) -> list[IndexedFigure]:
    """Figures 6 to 9."""
    how = settings.samples
    made = f"calibrated on {how.trajectories} trajectories of {how.steps} steps, not trained"
    reference = full_precision_images(model, scheduler, how)
    figures = []
    with tqdm(total=2 * len(SHOWN_RECIPES), desc="samples", unit="row", disable=not progress) as bar:

        def tick() -> None:
            bar.update()

        for number, recipe_name in enumerate(SHOWN_RECIPES, 6):
            bits = recipe_label(recipe_name)
            rows = quantized_images(model, scheduler, recipe_name, reference, how, tick)
            images = {_label(row): row.images for row in (reference, *rows)}
            path = rows_of_samples(images, f"{bits}, {made}", settings.output / f"figure-{number}.png")
            caption = (
                f"{how.images} images of {how.steps} steps, the same noise in every row; {made}. Static: one scale per "
                "layer; TDQ: one per layer and step; both with the recipe's statistic. The PSNR is that of all images "
                "against full precision."
            )
            figures.append(IndexedFigure(f"Figure {number}: samples, {bits}", path.name, caption))
    return figures


def _label(row: SampleRow) -> str:
    return row.label if row.psnr_db is None else f"{row.label}\nPSNR {row.psnr_db:.1f} dB"
