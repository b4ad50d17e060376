"""The figures of the demo: which ones, in which order, and what they show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.lab.report.canvas import short_name
from modelopt_tdq.lab.report.feature_plots import FeatureErrorPanels, draw_feature_errors
from modelopt_tdq.lab.report.plots import (
    correction_heat_map,
    image_grid,
    scale_heat_map,
    scales_over_time,
    sqnr_per_step,
)
from modelopt_tdq.lab.report.results import demo_model

__all__ = ["draw_figures"]


def draw_figures(
    results: dict[str, Any], arrays: Mapping[str, Mapping[str, Tensor]], folder: Path
) -> list[dict[str, str]]:
    """Draw all figures into ``folder``.

    Args:
        results: Of the demo.
        arrays: Per recipe_name ``images.<variant>`` [N, C, H, W], ``timesteps`` [K], ``scale.tdq`` [K, Q],
            ``scale.static`` and ``scale.max`` [Q]; ``correction.gain`` [K, L] where layers are corrected;
            ``feature_error.<strategy>`` [F, K] where temporal features are maintained; and ``images`` of "reference".
        folder: Of the demo.

    Returns:
        Per figure: its section, file (relative to ``folder``), title, caption, and what is to be seen (``alt``).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["variant"] != "fp32":
            groups.setdefault(row["recipe"], []).append(row)
    figures = [_sqnr(groups, results["timesteps"], demo_model(results)["predicts"], folder)]
    for recipe_name, rows in groups.items():
        figures.append(_images(recipe_name, rows, arrays, folder))
    for index, (recipe_name, rows) in enumerate(groups.items()):
        section = "scales" if index == 0 else "details"
        figures += _scales(recipe_name, rows, results["quantizers"][recipe_name], arrays[recipe_name], folder, section)
        if "correction.gain" in arrays[recipe_name]:
            figures.append(
                _correction(recipe_name, rows, results["corrected"][recipe_name], arrays[recipe_name], folder)
            )
    if results.get("features"):
        figures.append(_features(results, groups, arrays, folder))
    return figures


def _figure(section: str, path: Path, folder: Path, title: str, caption: str, alt: str) -> dict[str, str]:
    return {"section": section, "file": str(path.relative_to(folder)), "title": title, "caption": caption, "alt": alt}


def _sqnr(groups: dict[str, list[dict[str, Any]]], times: list[float], predicts: str, folder: Path) -> dict[str, str]:
    panels = {
        rows[0]["label"]: {row["variant"]: (row["name"], [float(v) for v in row["sqnr_db"]]) for row in rows}
        for rows in groups.values()
    }
    path = sqnr_per_step(panels, times, folder / "plots" / "sqnr.svg")
    caption = (
        f"Prediction of the {predicts} against full precision at each step of held-out trajectories. Higher is better."
    )
    seen = [
        f"{rows[0]['label']}: "
        + ", ".join(f"{row['name']} {_range([float(v) for v in row['sqnr_db']])} dB" for row in rows)
        for rows in groups.values()
    ]
    alt = f"Lines of SQNR over the timestep, a panel for each bit width, from the least to the most. {'; '.join(seen)}."
    return _figure("sqnr", path, folder, "SQNR per step", caption, alt)


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def _images(
    recipe_name: str, rows: list[dict[str, Any]], arrays: Mapping[str, Mapping[str, Tensor]], folder: Path
) -> dict[str, str]:
    pictures = {"FP32": arrays["reference"]["images"]}
    pictures |= {row["name"]: arrays[recipe_name][f"images.{row['variant']}"] for row in rows}
    shown = {label: images[:8] for label, images in pictures.items()}
    path = image_grid(shown, folder / "images" / f"{recipe_name}.svg")
    caption = (
        "Same seeds in every row; what matters is the difference from the first row, not the beauty of the images. All "
        "rows are calibrated only: with 4-bit activations a model needs training."
    )
    nearness = ", ".join(f"{row['name']} {float(row['psnr_db']):.1f} dB" for row in rows)
    count = len(shown["FP32"])
    alt = f"Rows of {count} images of the same seeds: full precision, then {nearness} of PSNR against it."
    return _figure("images", path, folder, rows[0]["label"], caption, alt)


def _scales(
    recipe_name: str,
    rows: list[dict[str, Any]],
    names: list[str],
    arrays: Mapping[str, Tensor],
    folder: Path,
    section: str,
) -> list[dict[str, str]]:
    label, times, scale = rows[0]["label"], arrays["timesteps"], arrays["scale.tdq"]
    titles = {row["variant"]: row["name"] for row in rows}
    heat = scale_heat_map(names, times, scale, folder / "plots" / f"{recipe_name}-heat-map.svg")
    order = (scale.amax(0) / scale.amin(0)).argsort(descending=True)

    def drawn(chosen: Tensor, name: str) -> Path:
        scales = {
            "max": (titles["max"], arrays["scale.max"][chosen]),
            "static": (titles["static"], arrays["scale.static"][chosen]),
            "tdq": (titles["tdq"], scale[:, chosen]),
        }
        return scales_over_time([names[i] for i in chosen.tolist()], times, scales, folder / "plots" / name)

    moving = drawn(order[:10], f"{recipe_name}-scales-most.svg")
    every = drawn(torch.arange(len(names)), f"{recipe_name}-scales.svg")
    ratios = scale.amax(0) / scale.amin(0)
    most = ", ".join(f"{short_name(names[i])} {float(ratios[i]):.1f}" for i in order[:3].tolist())
    return [
        _figure(
            section,
            heat,
            folder,
            f"{label}: all scales over time",
            "One line per quantizer; white is its own mean.",
            f"Heat map of {len(names)} quantizers and {len(times)} times. Largest over least scale: "
            f"{float(ratios.median()):.1f} at the median quantizer; most at {most}.",
        ),
        _figure(
            section,
            moving,
            folder,
            f"{label}: the ten that move most",
            "All panels have the same axes: the scale against the static one. Dashed: one scale for all times.",
            f"A small panel for each of the quantizers whose scales move most, first {most} times from least to most.",
        ),
        _figure(
            "details",
            every,
            folder,
            f"{label}: every quantizer",
            "In the order of the model; all panels have the same axes.",
            f"A small panel for each of {len(names)} quantizers: its scale over time against the static one.",
        ),
    ]


def _correction(
    recipe_name: str, rows: list[dict[str, Any]], names: list[str], arrays: Mapping[str, Tensor], folder: Path
) -> dict[str, str]:
    times, gain = arrays["correction.timesteps"], arrays["correction.gain"]
    path = correction_heat_map(names, times, gain, folder / "plots" / f"{recipe_name}-correction.svg")
    caption = "By how much the corrections multiply the output channels of each layer, to take back what rounding did."
    alt = (
        f"Heat map of {len(names)} layers and {len(times)} times: gains differ from one by "
        f"{100 * float(gain.mean()):.1f} % in the mean, {100 * float(gain.max()):.0f} % at most."
    )
    return _figure("details", path, folder, f"{rows[0]['label']}: corrections over time", caption, alt)


def _features(
    results: dict[str, Any],
    groups: dict[str, list[dict[str, Any]]],
    arrays: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
) -> dict[str, str]:
    prefix = "feature_error."
    lines = []
    for recipe_name, facts in results["features"].items():
        errors = {k.removeprefix(prefix): v for k, v in arrays[recipe_name].items() if k.startswith(prefix)}
        ours = next(row for row in groups[recipe_name] if row["variant"] == "tdq")
        label = "chosen" if "chosen" in errors else "naive"
        sqnr = {label: (results["timesteps"], [float(v) for v in ours["sqnr_db"]])}
        if facts["sqnr_exact_db"] is not None:
            sqnr = {"none": (results["timesteps"], [float(v) for v in facts["sqnr_exact_db"]]), **sqnr}
        times = arrays[recipe_name]["timesteps"].tolist()
        # the strategies of a file are in alphabetical order
        ordered: dict[str, Tensor] = {k: errors[k] for k in ("naive", "tib", "cache", "chosen") if k in errors}
        lines.append(FeatureErrorPanels(ours["label"], times, facts["names"], ordered, sqnr))
    path = draw_feature_errors(lines, folder / "plots" / "features.svg")
    caption = (
        "Error of each temporal feature at each time against full precision, by what could become of it; and the noise "
        "prediction of the model as quantized, where there is a table against the same with exact features."
    )
    means = [
        f"{line.title} {strategy} {float(error[error.isfinite()].mean()):.0f} dB"
        for line in lines
        for strategy, error in line.errors.items()
        if bool(error.isfinite().any())
    ]
    alt = (
        "Heat maps of the error of each feature at each time, a column for each strategy; in the mean "
        f"{', '.join(means)}."
    )
    return _figure("features", path, folder, "Temporal features", caption, alt)
