#!/usr/bin/env python3
"""The recipes as they are shipped: quality over the number of calibration trajectories, and how long they take.

SQNR of the prediction, mean and worst over the steps, and PSNR of the images, on trajectories of two other seeds; and
what the corrections change in the mean and in the step that gains least, against the same model without them. Beside it
the recipe calibrated without corrections, which rounds weights otherwise. Time: of the whole calibration, of that
without corrections, and of scales alone, relative to one run of the same data through the model in full precision.
usage: python recipe_quality.py [--models unet,dit] [--recipes int8,w4a8,w4a4] [--samples 8,16,64] [--append]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import RESULTS, timed, write
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

#: Of what is judged; the calibration has 0.
SEEDS = (1, 2)

#: Without all that takes more than one run of the data.
SCALES_ALONE = {
    "asymmetric": False,
    "channel_smoothing": "none",
    "rounding": "nearest",
    "correction": "none",
    "protect_steps": False,
}


@dataclass(frozen=True)
class Row:
    """One recipe, calibrated on some trajectories; SQNR of each step, for each seed."""

    model: str
    recipe: str
    trajectories: int
    sqnr_db: list[list[float]]
    psnr_db: list[float]
    run_s: float
    scales_s: float
    calibration_s: float
    off_sqnr_db: list[list[float]] | None = None  # None of a row of an earlier version, before `margin: auto`
    off_psnr_db: list[float] | None = None
    uncorrected_sqnr_db: list[list[float]] | None = None
    uncorrected_psnr_db: list[float] | None = None
    uncorrected_s: float | None = None

    def about_corrections(self) -> list[str]:
        """Cells: what they change in the same model; the recipe without them, and its time."""
        off, off_psnr, never, never_psnr = (
            self.off_sqnr_db,
            self.off_psnr_db,
            self.uncorrected_sqnr_db,
            self.uncorrected_psnr_db,
        )
        if off is None or off_psnr is None or never is None or never_psnr is None or self.uncorrected_s is None:
            return ["-"] * 5
        pairs = zip(self.sqnr_db, off, strict=True)
        gains = [new - old for one in pairs for new, old in zip(*one, strict=True)]
        images = statistics.fmean(self.psnr_db) - statistics.fmean(off_psnr)
        return [
            f"{statistics.fmean(gains):+.2f}, {min(gains):+.2f}",
            f"{images:+.2f}",
            f"{statistics.fmean(statistics.fmean(one) for one in never):.2f}",
            f"{statistics.fmean(never_psnr):.2f}",
            f"{self.uncorrected_s / self.run_s:.1f}",
        ]


def measured(name: str, recipe: str, samples: int, held_out: int) -> Row:
    """Quantize, judge, and time."""
    about = reference_model(name)
    model, scheduler = about.load_model(), about.load_scheduler()
    steps, shape = about.calibration_steps, sample_shape(model)
    start = noise(samples, shape, 0)

    def forward_loop(quantized: nn.Module) -> None:
        sample(quantized, scheduler, start, steps)

    config = tdq.recipe(recipe)
    config["algorithm"] |= {"progress": False}
    references = [reference(model, scheduler, held_out, steps, seed, lambda: None) for seed in SEEDS]

    def judged(quantized: nn.Module) -> tuple[list[list[float]], list[float]]:
        """SQNR in dB per seed and step; PSNR in dB per seed."""
        found = [judge(quantized, scheduler, each, lambda: None) for each in references]
        return [one.sqnr_db for one in found], [one.psnr_db for one in found]

    def calibrated(**fields: Any) -> tuple[nn.Module, float]:
        """The quantized model, and seconds."""
        quantized = copy.deepcopy(model)
        changed = {**config, "algorithm": {**config["algorithm"], **fields}}
        return quantized, timed(lambda: mtq.quantize(quantized, changed, forward_loop))

    run = timed(lambda: forward_loop(model))
    alone = {**config, "algorithm": {**config["algorithm"], **SCALES_ALONE}}
    scales = timed(lambda: mtq.quantize(copy.deepcopy(model), alone, forward_loop))
    quantized, whole = calibrated()
    corrected = judged(quantized)
    taken_off = corrected
    if tdq.layer_correction(quantized) is not None:
        tdq.set_layer_correction(quantized, None)
        taken_off = judged(quantized)
    plain, without = calibrated(correction="none")
    return Row(name, recipe, samples, *corrected, run, scales, whole, *taken_off, *judged(plain), without)


def _table(rows: list[Row]) -> str:
    lines = [
        "SQNR mean / worst step and PSNR in dB, on trajectories that were not calibrated on, of two seeds. Time: of "
        "the whole calibration, and of scales alone, relative to one run of the data through the model in full "
        "precision. Corrections: what they change in the same model, mean of all steps and the step that gains least, "
        "of both seeds, and PSNR. Never fitted: the recipe without corrections, mean of both seeds, and its time. "
        "Rows that lack these are of an earlier version, whose recipes had no margin.",
        "",
        "| model | recipe | trajectories | SQNR | PSNR | SQNR | PSNR | time | scales alone "
        "| corrections: mean, least | PSNR | never fitted: SQNR | PSNR | time |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (row.model != "unet", row.model, row.recipe, row.trajectories)):
        pairs = zip(row.sqnr_db, row.psnr_db, strict=True)
        judged = [f"{statistics.fmean(s):.2f} / {min(s):.2f} | {psnr:.2f}" for s, psnr in pairs]
        times = [f"{seconds / row.run_s:.1f}" for seconds in (row.calibration_s, row.scales_s)]
        cells = [row.model, row.recipe, str(row.trajectories), *judged, *times, *row.about_corrections()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit", help="of unet, dit, terrain")
    parser.add_argument("--recipes", default="int8,w4a8,w4a4")
    parser.add_argument("--samples", default="8,16,64", help="calibration trajectories")
    parser.add_argument("--held-out", type=int, default=8, help="trajectories to judge on, of each seed")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "recipe_quality.json"
    rows: dict[Any, Row] = {}
    if arguments.append and file.is_file():
        old = [Row(**fields) for fields in json.loads(file.read_text())["rows"]]
        rows = {(row.model, row.recipe, row.trajectories): row for row in old}
    cases = itertools.product(arguments.samples.split(","), arguments.models.split(","), arguments.recipes.split(","))
    for samples, name, recipe in cases:
        row = measured(name, recipe, int(samples), arguments.held_out)
        rows[name, recipe, row.trajectories] = row
        write("recipe_quality", {"rows": [asdict(each) for each in rows.values()]}, _table(list(rows.values())))


if __name__ == "__main__":
    main()
