#!/usr/bin/env python3
"""Static against time-dependent scales, for every recipe and statistic, on held-out trajectories of a reference model.

Same weights, same calibration data, same statistic; SQNR of the prediction per step, in dB.
usage: python calibration_quality.py [--model unet] [--recipes int8,w4a4] [--statistics max,mse]
       [--samples 16] [--steps 20] [--set FIELD=VALUE]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import write

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import held_out_sqnr, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="unet", help="unet, dit or terrain")
    parser.add_argument("--recipes", default=",".join(tdq.RECIPES))
    parser.add_argument("--statistics", default="max,percentile,entropy,mse,output")
    parser.add_argument("--samples", type=int, help="calibration trajectories; by default what suits the model")
    parser.add_argument("--held-out", type=int, default=16, help="trajectories to judge on")
    parser.add_argument("--steps", type=int, help="by default what suits the model")
    parser.add_argument("--name", default="calibration_quality")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="further algorithm fields")
    arguments = parser.parse_args()
    fields: dict[str, Any] = dict(item.split("=", 1) for item in arguments.set)
    chosen = reference_model(arguments.model)
    model, scheduler = chosen.load_model(), chosen.load_scheduler()
    steps = arguments.steps or chosen.calibration_steps
    start = noise(arguments.samples or chosen.calibration_samples, sample_shape(model), 0)
    held_out = reference(model, scheduler, arguments.held_out, steps, 1, lambda: None)
    rows = []
    for recipe_name in arguments.recipes.split(","):
        for statistic in arguments.statistics.split(","):
            config = tdq.recipe(recipe_name)
            config["algorithm"] |= {"statistic": statistic, "correction": "none", "progress": False, **fields}
            static = {**config, "algorithm": {**config["algorithm"], "bins": 1}}
            sqnr = {}
            for kind, one in (("static", static), ("tdq", config)):
                copied = mtq.quantize(copy.deepcopy(model), one, lambda m: sample(m, scheduler, start, steps))
                sqnr[kind] = torch.tensor(held_out_sqnr(copied, held_out), dtype=torch.float64)
            gain = sqnr["tdq"] - sqnr["static"]
            rows.append(
                {
                    "recipe": recipe_name,
                    "statistic": statistic,
                    "static_db": sqnr["static"].tolist(),
                    "tdq_db": sqnr["tdq"].tolist(),
                    "gain_mean_db": float(gain.mean()),
                    "gain_min_db": float(gain.min()),
                }
            )
            print(f"{recipe_name} {statistic}: gain {gain.mean():+.2f}, least {gain.min():+.2f}", flush=True)
    lines = [
        "| recipe_name | statistic | static, mean / worst | TDQ, mean / worst | gain | least gain of a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        static, ours = torch.tensor(row["static_db"]), torch.tensor(row["tdq_db"])
        lines.append(
            f"| {row['recipe']} | {row['statistic']} | {static.mean():.2f} / {static.min():.2f} | {ours.mean():.2f} / "
            f"{ours.min():.2f} | {row['gain_mean_db']:+.2f} | {row['gain_min_db']:+.2f} |"
        )
    about = {"model": chosen.name, "rows": rows, "samples": len(start), "steps": steps}
    write(arguments.name, about, "\n".join(lines))


if __name__ == "__main__":
    main()
