#!/usr/bin/env python3
"""Smoothing over channels: none, a fixed strength, and a strength for each tensor, on held-out trajectories.

SQNR of the prediction, mean and worst over the steps, and PSNR of the images against those of full precision.
usage: python channel_smoothing.py [--models unet,dit] [--formats 8/8,4/8,4/4] [--smoothing none,0.5,auto]
       [--every-layer] [--set FIELD=VALUE]
For the converged model, whose delicate layers smoothing makes quantizable:
       python channel_smoothing.py --models terrain --formats 8/8 --held-out 2 --every-layer --set statistic=max
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import RESULTS, write
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape


@dataclass(frozen=True)
class Row:
    """One quantized model."""

    model: str
    weights: int
    activations: int
    smoothing: str
    smoothed: int
    sqnr_db: list[float]
    psnr_db: float


def _smoothed(model: nn.Module) -> int:
    return sum(q.channel_divisor is not None for q in tdq.temporal_quantizers(model).values())


def _setting(text: str) -> Any:
    return text if text in ("none", "auto") else float(text)


def measured(name: str, bits: list[tuple[int, int]], settings: list[str], arguments: Any) -> Iterator[Row]:
    """Of one of the reference models."""
    chosen = reference_model(name)
    model, scheduler = chosen.load_model(), chosen.load_scheduler()
    steps = arguments.steps or chosen.calibration_steps
    start = noise(arguments.samples or chosen.calibration_samples, sample_shape(model), 0)
    held_out = reference(model, scheduler, arguments.held_out, steps, 1, lambda: None)
    fields: dict[str, Any] = dict(item.split("=", 1) for item in arguments.set)
    if arguments.every_layer:
        fields["high_precision"] = ()
    for weights, activations in bits:
        for text in settings:
            smoothing = {"channel_smoothing": _setting(text), "correction": "none"}
            config = tdq.make_config(weights, activations, progress=False, **smoothing, **fields)
            copied = mtq.quantize(copy.deepcopy(model), config, lambda m: sample(m, scheduler, start, steps))
            found = judge(copied, scheduler, held_out, lambda: None)
            yield Row(name, weights, activations, text, _smoothed(copied), found.sqnr_db, found.psnr_db)


def _cells(row: Row) -> str:
    decibels = torch.tensor(row.sqnr_db)
    return (
        f"| {row.model} | W{row.weights}A{row.activations} | {row.smoothing} | {row.smoothed} "
        f"| {decibels.mean():.2f} / {decibels.min():.2f} | {row.psnr_db:.2f} |"
    )


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit", help="of unet, dit, terrain")
    parser.add_argument("--formats", default="8/8,4/8,4/4", help="bits of weights/activations")
    parser.add_argument("--smoothing", default="none,0.5,auto")
    parser.add_argument("--samples", type=int, help="calibration trajectories; by default what suits the model")
    parser.add_argument("--held-out", type=int, default=4, help="trajectories to judge on")
    parser.add_argument("--steps", type=int, help="by default what suits the model")
    parser.add_argument("--every-layer", action="store_true", help="none in high precision")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="further algorithm fields")
    parser.add_argument("--name", default="channel_smoothing")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = arguments.smoothing.split(",")
    bits = [(int(pair.split("/")[0]), int(pair.split("/")[1])) for pair in arguments.formats.split(",")]
    made: Iterator[Row] = chain.from_iterable(
        measured(name, bits, settings, arguments) for name in arguments.models.split(",")
    )
    kept = RESULTS / f"{arguments.name}.json"
    rows: dict[Any, Row] = {}
    if arguments.append and kept.is_file():
        rows = {_key(row): row for row in (Row(**fields) for fields in json.loads(kept.read_text())["rows"])}
    for row in made:
        rows[_key(row)] = row
        write(arguments.name, {"rows": [asdict(each) for each in rows.values()]}, _table(list(rows.values())))


def _key(row: Row) -> tuple[Any, ...]:
    return row.model, row.weights, row.activations, row.smoothing


def _table(rows: list[Row]) -> str:
    lines = [
        "Mean / worst step of the SQNR, and PSNR of the images, in dB; on trajectories that were not calibrated on.",
        "",
        "| model | format | `channel_smoothing` | quantizers smoothed | SQNR | PSNR |",
        "|---|---|---|--:|--:|--:|",
        *(_cells(row) for row in rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
