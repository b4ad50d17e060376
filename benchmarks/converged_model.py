#!/usr/bin/env python3
"""The converged terrain model at W8A8: static scales and scales over time, every layer quantized or all but a few.

Its ranges move over time as those of real models do, and a few layers lose most. Offsets where they pay, smoothing over
channels and corrections as chosen by "auto" in both. SQNR of the prediction, mean and worst over the steps, and PSNR of
the height maps, on trajectories that were not calibrated on. Takes about ten minutes a row on one core.
usage: python converged_model.py [--rows static,time] [--keep GLOB --keep GLOB ...]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import RESULTS, write

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

#: Without what takes most of the time.
_PLAIN = {"correction": "none"}

#: Without time, one shift for all times.
_SHIFTED = {"channel_shift": "auto"}

#: The rows: what differs from the default.
ROWS: dict[str, dict[str, Any]] = {
    "static-max": {"bins": 1, "statistic": "max", "channel_smoothing": "none", "correction": "none"},
    "static-scales": {"bins": 1, "asymmetric": "auto", "channel_smoothing": "none", "correction": "none"},
    "static": {"bins": 1, "asymmetric": "auto", "channel_smoothing": "auto"},
    "time-scales": {"asymmetric": "auto", "channel_smoothing": "none", "correction": "none"},
    "time": {"asymmetric": "auto", "channel_smoothing": "auto"},
    "static-margin": {"bins": 1, "asymmetric": "auto", "channel_smoothing": "auto", "margin": "auto"},
    "time-margin": {"asymmetric": "auto", "channel_smoothing": "auto", "margin": "auto"},
    "static-shift": {"bins": 1, "asymmetric": "auto", "channel_smoothing": "auto", "margin": "auto", **_SHIFTED},
    "time-shift": {"asymmetric": "auto", "channel_smoothing": "auto", "margin": "auto", **_SHIFTED},
    "time-margin-plain": {"asymmetric": "auto", "channel_smoothing": "auto", "margin": "auto", **_PLAIN},
}


@dataclass(frozen=True)
class Row:
    """One quantized model."""

    scales: str
    kept: list[str]
    quantized: int
    smoothed: int
    shifted: int
    corrected: int
    sqnr_db: list[float]
    psnr_db: float
    calibration_s: float


def measured(scales: str, kept: list[str], held_out: int) -> Row:
    """Quantize, and judge."""
    about = reference_model("terrain")
    model, scheduler = about.load_model(), about.load_scheduler()
    start = noise(about.calibration_samples, sample_shape(model), 0)
    against = reference(model, scheduler, held_out, about.calibration_steps, 1, lambda: None)
    config = tdq.make_config(high_precision=kept, progress=False, **ROWS[scales])
    begun = time.perf_counter()
    mtq.quantize(model, config, lambda m: sample(m, scheduler, start, about.calibration_steps))
    seconds = time.perf_counter() - begun
    quantizers, correction = tdq.temporal_quantizers(model), tdq.layer_correction(model)
    found = judge(model, scheduler, against, lambda: None)
    return Row(
        scales,
        kept,
        len(quantizers),
        sum(quantizer.channel_divisor is not None for quantizer in quantizers.values()),
        sum(quantizer.channel_shift is not None for quantizer in quantizers.values()),
        0 if correction is None else len(correction.names),
        found.sqnr_db,
        found.psnr_db,
        round(seconds, 1),
    )


def _table(rows: list[Row]) -> str:
    lines = [
        "The terrain model, W8A8; SQNR mean / worst step and PSNR in dB, on trajectories that were not calibrated on. "
        "Static and time: with offsets where they pay, smoothing and corrections chosen by auto. "
        "Margin: scales larger by what the growth of their ranges with the samples tells; shift: the middles of "
        "channels' ranges subtracted as well; plain: without corrections.",
        "",
        "| scales | layers quantized | smoothed | shifted | corrected | SQNR | PSNR | calibration, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        decibels = torch.tensor(row.sqnr_db)
        lines.append(
            f"| {row.scales} | {row.quantized} | {row.smoothed} | {row.shifted} | {row.corrected} "
            f"| {decibels.mean():.2f} / {decibels.min():.2f} | {row.psnr_db:.2f} | {row.calibration_s:.0f} |"
        )
    kept = sorted({glob for row in rows for glob in row.kept})
    return "\n".join([*lines, "", f"Kept in high precision where not every layer is quantized: {', '.join(kept)}."])


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--keep", action="append", default=[], metavar="GLOB", help="quantizers in high precision")
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "converged_model.json"
    rows: dict[Any, Row] = {}
    if arguments.append and file.is_file():
        rows = {(row.scales, *row.kept): row for row in (Row(**one) for one in json.loads(file.read_text())["rows"])}
    for scales in arguments.rows.split(","):
        row = measured(scales, arguments.keep, arguments.held_out)
        rows[(row.scales, *row.kept)] = row
        write("converged_model", {"rows": [asdict(each) for each in rows.values()]}, _table(list(rows.values())))


if __name__ == "__main__":
    main()
