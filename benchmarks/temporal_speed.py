#!/usr/bin/env python3
"""OpenVINO on the CPU, in one run: the temporal layers in the graph, against the lookup in their place.

W8A8, the bundled model; the graphs take turns, medians and their ratios are reported.
usage: python temporal_speed.py [--threads 1] [--batches 1,8] [--repetitions 60] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from openvino_speed import measure
from record import write
from trajectories import load_model, sample

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

FORMS: dict[str, dict[str, Any]] = {
    "layers in full precision": {"method": "tdq"},
    "layers in INT8": {"method": "tdq_temporal", "maintenance": "naive"},
    "cache, nearest": {"method": "tdq_temporal", "maintenance": "cache", "outside": "nearest"},
    "cache, linear": {"method": "tdq_temporal", "maintenance": "cache", "outside": "linear"},
}


def export_all(folder: Path, batch: int) -> dict[str, Path]:
    """One graph per form, for one batch size."""
    inputs = {"sample": torch.randn(batch, 3, 32, 32), "timestep": torch.tensor([500])}
    paths = {}
    for number, (name, options) in enumerate(FORMS.items()):
        config = tdq.make_config(8, 8, protect_steps=False, progress=False, **options)
        quantized = mtq.quantize(copy.deepcopy(load_model()), config, lambda m: sample(m, 4, 0, 20))
        paths[name] = tdq.export_onnx(quantized, folder / f"{number}-{batch}.onnx", inputs).path
    return paths


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="whole measurements, each with sessions of its own")
    arguments = parser.parse_args()
    first, *others = FORMS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in (int(b) for b in arguments.batches.split(",")):
            paths = export_all(Path(folder), batch)
            for number in range(arguments.rounds):
                sessions = {n: OpenVinoSession(p, num_threads=arguments.threads) for n, p in paths.items()}
                times = measure(sessions, batch, arguments.repetitions)
                rows.append(
                    {"batch": batch, "round": number, "median_ms": {n: statistics.median(v) for n, v in times.items()}}
                )
    lines = [
        f"Threads: {arguments.threads}; medians of {arguments.repetitions} calls, the graphs in turn.",
        "",
        f"| batch | round | {first}, ms | " + " | ".join(f"{name}, ratio" for name in others) + " |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for row in rows:
        ms = row["median_ms"]
        ratios = " | ".join(f"{ms[name] / ms[first]:.3f}" for name in others)
        lines.append(f"| {row['batch']} | {row['round']} | {ms[first]:.2f} | {ratios} |")
    write("temporal_speed", {"rows": rows, "threads": arguments.threads}, "\n".join(lines))


if __name__ == "__main__":
    main()
