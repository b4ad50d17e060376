#!/usr/bin/env python3
"""Corrections of layers' outputs on the reference models: quality on held-out trajectories, time to fit, deployed cost.

Quality: the recipes, with no corrections, static ones, those of each step, and what "auto" chooses; SQNR of the
prediction, mean and worst over the steps, the step that changed least for the better, and PSNR of the images, against
full precision. Cost: kernels of TensorRT-RTX engines (built, not run), and the time of OpenVINO with one thread, the
graphs in turn.
usage: python layer_correction.py [--models unet,dit] [--recipes w4a8,w4a4] [--samples 16] [--held-out 8]
       [--smoothing none,auto] [--no-deployment]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from deployment import deployed
from record import RESULTS, timed, write
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

KINDS = ("none", "static", "per_step", "auto")


@dataclass(frozen=True)
class Quality:
    """One quantized model."""

    model: str
    recipe: str
    smoothing: str
    trajectories: int
    correction: str
    sqnr_db: list[float]
    least_gain_db: float
    psnr_db: float
    over_time: int
    static: int
    nbytes: int
    calibration_s: float
    fit_s: float


@dataclass(frozen=True)
class Cost:
    """The engine and the OpenVINO graph of one model with corrections of each step, and without."""

    model: str
    recipe: str
    kernels: dict[str, int]
    milliseconds: dict[str, float]


def qualities(
    name: str, recipe: str, smoothing: str, samples: int | None, arguments: Any
) -> Iterator[tuple[Quality, nn.Module]]:
    """Of one model and recipe: each kind of correction, on one calibration."""
    chosen = reference_model(name)
    model, scheduler = chosen.load_model(), chosen.load_scheduler()
    steps, samples = arguments.steps or chosen.calibration_steps, samples or chosen.calibration_samples
    start = noise(samples, sample_shape(model), 0)
    held_out = reference(model, scheduler, arguments.held_out, steps, 1, lambda: None)
    config = tdq.recipe(recipe)
    config["algorithm"] |= {
        "progress": False,
        "correction": "none",
        "channel_smoothing": smoothing,
        "rounding": "nearest",
    }

    def forward_loop(quantized: nn.Module) -> None:
        sample(quantized, scheduler, start, steps)

    seconds = timed(lambda: mtq.quantize(model, config, forward_loop))
    plain: list[float] = []
    for kind in KINDS:
        corrected, fit = copy.deepcopy(model), 0.0
        if kind != "none":
            algorithm = {"method": "tdq_correct", "correction": kind, "progress": False}
            fit = timed(lambda c=corrected, a=algorithm: mtq.calibrate(c, a, forward_loop))  # type: ignore[misc]
        found = judge(corrected, scheduler, held_out, lambda: None)
        plain = plain or found.sqnr_db
        correction = tdq.layer_correction(corrected)
        rows = [] if correction is None else [len(gain) for gain in correction.gain.values()]
        yield (
            Quality(
                name,
                recipe,
                smoothing,
                samples,
                kind,
                found.sqnr_db,
                min(new - old for new, old in zip(found.sqnr_db, plain, strict=True)),
                found.psnr_db,
                sum(count > 1 for count in rows),
                sum(count == 1 for count in rows),
                0 if correction is None else correction.nbytes,
                seconds,
                fit,
            ),
            corrected,
        )


def _table(rows: list[Quality], costs: list[Cost]) -> str:
    lines = [
        "SQNR mean / worst step and PSNR in dB, on trajectories that were not calibrated on. Least: the change of the "
        "step that gained least by the corrections. Layers: corrected over time + by one gain and bias. Time: of the "
        "fit, its own run of the calibration data included, relative to the calibration without it.",
        "",
        "| model | recipe | smoothing | trajectories | correction | SQNR | least | PSNR | layers | KiB | time |",
        "|---|---|---|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        decibels = torch.tensor(row.sqnr_db)
        lines.append(
            f"| {row.model} | {row.recipe} | {row.smoothing} | {row.trajectories} | {row.correction} "
            f"| {decibels.mean():.2f} / {decibels.min():.2f} | {row.least_gain_db:+.2f} | {row.psnr_db:.2f} "
            f"| {row.over_time} + {row.static} | {row.nbytes / 1024:.0f} | {row.fit_s / row.calibration_s:.2f} |"
        )
    if costs:
        lines += ["", "| model | recipe | kernels: none | static | per step | OpenVINO: static | per step |"]
        lines.append("|---|---|--:|--:|--:|--:|--:|")
    for one in costs:
        ratios = {kind: value / one.milliseconds["none"] for kind, value in one.milliseconds.items()}
        lines.append(
            f"| {one.model} | {one.recipe} | {one.kernels['none']} | {one.kernels['static']} "
            f"| {one.kernels['per_step']} | {ratios['static']:.3f} | {ratios['per_step']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit", help="of unet, dit, terrain")
    parser.add_argument("--recipes", default="w4a8,w4a4")
    parser.add_argument("--smoothing", default="none")
    parser.add_argument("--samples", default="0", help="calibration trajectories; 0: as many as suit the model")
    parser.add_argument("--held-out", type=int, default=8, help="trajectories to judge on")
    parser.add_argument("--steps", type=int, help="by default what suits the model")
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--no-deployment", action="store_true")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[Any, Quality] = {}
    costs: dict[Any, Cost] = {}
    kept = RESULTS / "layer_correction.json"
    if arguments.append and kept.is_file():
        old = json.loads(kept.read_text())
        rows = {_key(row): row for row in (Quality(**fields) for fields in old["rows"])}
        costs = {(one.model, one.recipe): one for one in (Cost(**fields) for fields in old["costs"])}
    cases = [
        (name, recipe, smoothing, int(samples) or None)
        for name in arguments.models.split(",")
        for recipe in arguments.recipes.split(",")
        for smoothing in arguments.smoothing.split(",")
        for samples in arguments.samples.split(",")
    ]
    for name, recipe, smoothing, samples in cases:
        models: dict[str, nn.Module] = {}
        for row, model in qualities(name, recipe, smoothing, samples, arguments):
            rows[_key(row)] = row
            if row.correction != "auto":
                models[row.correction] = model
        if not arguments.no_deployment:
            costs[name, recipe] = Cost(name, recipe, *deployed(models, arguments.repetitions))
        found = list(rows.values()), list(costs.values())
        result = {"rows": [asdict(row) for row in found[0]], "costs": [asdict(one) for one in found[1]]}
        write("layer_correction", result, _table(*found))


def _key(row: Quality) -> tuple[Any, ...]:
    return row.model, row.recipe, row.smoothing, row.trajectories, row.correction


if __name__ == "__main__":
    main()
