#!/usr/bin/env python3
"""Static against time-dependent scales, for every recipe and statistic, on held-out trajectories of the bundled UNet.

Same weights, same calibration data, same statistic; SQNR of the noise prediction per step, in dB.
usage: python calibration_quality.py [--recipes int8,w4a4] [--statistics max,mse] [--samples 16] [--steps 20]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import write
from trajectories import HeldOut, load_model, sample

import modelopt_tdq as tdq


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=",".join(tdq.RECIPES))
    parser.add_argument("--statistics", default="max,percentile,entropy,mse,output")
    parser.add_argument("--samples", type=int, default=16, help="calibration trajectories")
    parser.add_argument("--held-out", type=int, default=16, help="trajectories to judge on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--name", default="calibration_quality")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="further algorithm fields")
    arguments = parser.parse_args()
    fields: dict[str, Any] = dict(item.split("=", 1) for item in arguments.set)
    model = load_model()
    held_out = HeldOut(model, arguments.held_out, 1, arguments.steps)
    rows = []
    for recipe_name in arguments.recipes.split(","):
        for statistic in arguments.statistics.split(","):
            config = tdq.recipe(recipe_name)
            config["algorithm"] |= {"statistic": statistic, "correction": "none", "progress": False, **fields}
            static = {**config, "algorithm": {**config["algorithm"], "bins": 1}}
            sqnr = {}
            for kind, chosen in (("static", static), ("tdq", config)):
                copied = copy.deepcopy(model)
                mtq.quantize(copied, chosen, lambda m: sample(m, arguments.samples, 0, arguments.steps))
                sqnr[kind] = held_out.sqnr_db(copied)
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
    write(arguments.name, {"rows": rows, "samples": arguments.samples, "steps": arguments.steps}, "\n".join(lines))


if __name__ == "__main__":
    main()
