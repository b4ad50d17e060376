#!/usr/bin/env python3
"""Shifts of channels over time on the reference models: quality on held-out trajectories, and what they cost deployed.

Quality: a recipe with and without `channel_shift`, without corrections; SQNR of the prediction, mean and worst over the
steps, and PSNR of the images, against full precision. Cost: kernels of TensorRT-RTX engines (built, not run), and the
time of OpenVINO with one thread, the graphs in turn; the same again with a correction of each layer and step behind.
usage: python channel_shift.py [--models unet,dit] [--recipes int8,w4a8,w4a4] [--held-out 8] [--no-deployment]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
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

#: What is compared: fields of `tdq`.
KINDS: dict[str, dict[str, Any]] = {
    "none": {"channel_shift": "none", "correction": "none"},
    "shifts": {"channel_shift": "auto", "correction": "none"},
    "corrections": {"channel_shift": "none", "correction": "per_step"},
    "both": {"channel_shift": "auto", "correction": "per_step"},
}


@dataclass(frozen=True)
class Row:
    """One quantized model; kernels and milliseconds are None where nothing was deployed."""

    model: str
    recipe: str
    kind: str
    quantized: int
    shifted: int
    nbytes: int
    sqnr_db: list[float]
    psnr_db: float
    calibration_s: float
    kernels: int | None = None
    milliseconds: float | None = None


def quantized(name: str, recipe: str, kind: str, held_out: int) -> tuple[Row, nn.Module]:
    """Calibrate, and judge."""
    chosen = reference_model(name)
    model, scheduler = chosen.load_model(), chosen.load_scheduler()
    start = noise(chosen.calibration_samples, sample_shape(model), 0)
    against = reference(model, scheduler, held_out, chosen.calibration_steps, 1, lambda: None)
    config = tdq.recipe(recipe)
    config["algorithm"] |= {"progress": False, **KINDS[kind]}
    seconds = timed(
        lambda: mtq.quantize(model, config, lambda m: sample(m, scheduler, start, chosen.calibration_steps))
    )
    found = judge(model, scheduler, against, lambda: None)
    quantizers = tdq.temporal_quantizers(model).values()
    shifts = [quantizer.channel_shift for quantizer in quantizers if quantizer.channel_shift is not None]
    nbytes = sum(4 * shift.numel() for shift in shifts)
    row = Row(name, recipe, kind, len(quantizers), len(shifts), nbytes, found.sqnr_db, found.psnr_db, seconds)
    return row, model


def _table(rows: list[Row]) -> str:
    lines = [
        "SQNR mean / worst step and PSNR in dB, on trajectories that were not calibrated on. Both: shifts, and a "
        "correction of each layer and step. OpenVINO: one thread, relative to neither.",
        "",
        "| model | recipe | with | shifted | KiB | SQNR | PSNR | calibration, s | kernels | OpenVINO |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    plain = {(row.model, row.recipe): row.milliseconds for row in rows if row.kind == "none"}
    for row in rows:
        decibels, base = torch.tensor(row.sqnr_db), plain.get((row.model, row.recipe))
        ratio = "-" if row.milliseconds is None or base is None else f"{row.milliseconds / base:.3f}"
        lines.append(
            f"| {row.model} | {row.recipe} | {row.kind} | {row.shifted} of {row.quantized} | {row.nbytes / 1024:.0f} "
            f"| {decibels.mean():.2f} / {decibels.min():.2f} | {row.psnr_db:.2f} | {row.calibration_s:.0f} "
            f"| {row.kernels or '-'} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit", help="of unet, dit, terrain")
    parser.add_argument("--recipes", default="int8,w4a8,w4a4")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--held-out", type=int, default=8, help="trajectories to judge on")
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--no-deployment", action="store_true")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str, str], Row] = {}
    kept = RESULTS / "channel_shift.json"
    if arguments.append and kept.is_file():
        known = (Row(**fields) for fields in json.loads(kept.read_text())["rows"])
        rows = {(row.model, row.recipe, row.kind): row for row in known}
    for name in arguments.models.split(","):
        for recipe in arguments.recipes.split(","):
            models: dict[str, nn.Module] = {}
            found: dict[str, Row] = {}
            for kind in arguments.kinds.split(","):
                found[kind], models[kind] = quantized(name, recipe, kind, arguments.held_out)
            kernels, times = ({}, {}) if arguments.no_deployment else deployed(models, arguments.repetitions)
            for kind, row in found.items():
                rows[name, recipe, kind] = replace(row, kernels=kernels.get(kind), milliseconds=times.get(kind))
            write("channel_shift", {"rows": [asdict(row) for row in rows.values()]}, _table(list(rows.values())))


if __name__ == "__main__":
    main()
