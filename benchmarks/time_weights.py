#!/usr/bin/env python3
"""Weighing times by what their errors do to the image, against weighing them equally.

Each config is calibrated with equal weights, with those of the sampler's coefficients alone, and with those that the
model's own answers give. SQNR of the prediction, mean and worst over the steps, and PSNR of the images, on trajectories
of two other seeds than that of the calibration.
usage: python time_weights.py [--models unet,dit] [--configs ...] [--samples 8] [--held-out 8] [--append]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import RESULTS, write
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.denoising import predict, sample_labels
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

#: Of what is judged; the calibration has 0, the trajectories of the weights 3.
SEEDS, WEIGHTS_SEED, WEIGHTS_SAMPLES = (1, 2), 3, 2

CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "W8A8 static": lambda: tdq.make_config(8, 8, bins=1),
    "W8A8, 4 bins": lambda: tdq.make_config(8, 8, bins="optimal", max_bins=4),
    "W4A4 static": lambda: tdq.make_config(4, 4, bins=1, asymmetric="auto"),
    "W4A4 recipe": lambda: tdq.recipe("w4a4"),
}

#: Of the weights.
OBJECTIVES = ("equal", "sampler", "sampler and model")


@dataclass(frozen=True)
class Row:
    """One config, calibrated for one objective; SQNR of each step, for each seed."""

    model: str
    config: str
    objective: str
    trajectories: int
    sqnr_db: list[list[float]]
    psnr_db: list[float]


def weights(model: nn.Module, scheduler: Any, steps: int) -> dict[str, dict[float, float] | None]:
    """The weights of each of :data:`OBJECTIVES`."""

    def answered(x: Tensor, time: Tensor) -> Tensor:
        return predict(model, x, time, sample_labels(model, len(x)))

    start = noise(WEIGHTS_SAMPLES, sample_shape(model), WEIGHTS_SEED)
    alone = tdq.image_weights(scheduler, steps)
    return dict(zip(OBJECTIVES, (None, alone, tdq.image_weights(scheduler, steps, answered, start)), strict=True))


def _table(rows: list[Row], known: dict[str, dict[str, dict[float, float] | None]]) -> str:
    lines = [
        "SQNR mean / worst step and PSNR in dB, on trajectories that were not calibrated on, of two seeds. Weights of "
        "times: equal; by the sampler's coefficients alone; by these and by what the model makes of an error.",
        "",
        "| model | config | trajectories | weights | SQNR | PSNR | SQNR | PSNR | PSNR against equal |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    equal = {(row.model, row.config): statistics.fmean(row.psnr_db) for row in rows if row.objective == "equal"}
    for row in rows:
        pairs = zip(row.sqnr_db, row.psnr_db, strict=True)
        cells = [f"{statistics.fmean(s):.2f} / {min(s):.2f} | {psnr:.2f}" for s, psnr in pairs]
        gain = statistics.fmean(row.psnr_db) - equal[row.model, row.config]
        cells += ["" if row.objective == "equal" else f"{gain:+.2f}"]
        lines.append(f"| {row.model} | {row.config} | {row.trajectories} | {row.objective} | {' | '.join(cells)} |")
    for model, found in known.items():
        for objective, values in found.items():
            if values is not None:
                listed = ", ".join(f"{time:g}: {weight:.3f}" for time, weight in values.items())
                lines += ["", f"Weights of {model}, {objective}: {listed}."]
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit")
    parser.add_argument("--configs", default=";".join(CONFIGS), help="names, between semicolons")
    parser.add_argument("--samples", type=int, default=8, help="calibration trajectories")
    parser.add_argument("--held-out", type=int, default=8, help="trajectories to judge on, of each seed")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "time_weights.json"
    rows: dict[Any, Row] = {}
    known: dict[str, dict[str, dict[float, float] | None]] = {}
    if arguments.append and file.is_file():
        old = json.loads(file.read_text())
        rows = {(r["model"], r["config"], r["objective"]): Row(**r) for r in old["rows"]}
        known = {
            model: {
                objective: None if values is None else {float(time): weight for time, weight in values.items()}
                for objective, values in found.items()
            }
            for model, found in old["weights"].items()
        }
    for name in arguments.models.split(","):
        about = reference_model(name)
        model, scheduler, steps = about.load_model(), about.load_scheduler(), about.calibration_steps
        start = noise(arguments.samples, sample_shape(model), 0)
        forward_loop = partial(sample, scheduler=scheduler, start=start, steps=steps)
        if name not in known:
            known[name] = weights(model, scheduler, steps)
        references = [reference(model, scheduler, arguments.held_out, steps, seed, lambda: None) for seed in SEEDS]
        for chosen in arguments.configs.split(";"):
            for objective, of_times in known[name].items():
                config = CONFIGS[chosen]()
                config["algorithm"] |= {"progress": False, "time_weights": of_times}
                quantized = mtq.quantize(copy.deepcopy(model), config, forward_loop)
                found = [judge(quantized, scheduler, each, lambda: None) for each in references]
                sqnr, psnr = [one.sqnr_db for one in found], [one.psnr_db for one in found]
                rows[name, chosen, objective] = Row(name, chosen, objective, arguments.samples, sqnr, psnr)
                result = {"weights": known, "rows": [asdict(row) for row in rows.values()]}
                write("time_weights", result, _table(list(rows.values()), known))


if __name__ == "__main__":
    main()
