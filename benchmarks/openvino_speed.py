#!/usr/bin/env python3
"""OpenVINO on the CPU, in one run: full precision, static INT8 and time-dependent INT8 of the bundled model.

The graphs take turns, so that a change of the machine's speed meets all of them; medians and the ratios
of the medians are reported.
usage: python openvino_speed.py [--threads 1] [--batches 1,8] [--repetitions 60]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from record import write
from trajectories import load_model, sample

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

NAMES = ("fp32", "static", "tdq")


def export_all(folder: Path, batch: int) -> dict[str, Path]:
    """The three graphs, for one batch size."""
    inputs = {"sample": torch.randn(batch, 3, 32, 32), "timestep": torch.tensor([500])}
    model = load_model()
    paths = {name: folder / f"{name}-{batch}.onnx" for name in NAMES}

    class Plain(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.inner(sample, timestep).sample

    names = {"input_names": ["sample", "timestep"], "output_names": ["output"]}
    program = torch.onnx.export(Plain(model), tuple(inputs.values()), dynamo=True, opset_version=21, **names)
    program.save(paths["fp32"])
    for name, bins in (("static", 1), ("tdq", "per_step")):
        config = tdq.make_config(8, 8, bins=bins, protect_steps=False, progress=False)
        quantized = mtq.quantize(copy.deepcopy(model), config, lambda m: sample(m, 4, 0, 20))
        report = tdq.export_onnx(quantized, paths[name], inputs)
        if report.skipped:
            raise RuntimeError(f"not in low precision: {report.skipped}")
    return paths


def measure(sessions: dict[str, OpenVinoSession], batch: int, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds per call, the graphs in turn."""
    x = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for repetition in range(repetitions + 5):
        values = (x, np.array([50 * (repetition % 20)]))
        for name, session in sessions.items():
            feed = dict(zip(session.inputs, values, strict=True))  # torch's exporter renames inputs at times
            start = time.perf_counter()
            session(feed)
            if repetition >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="whole measurements, each with sessions of its own")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in (int(b) for b in arguments.batches.split(",")):
            paths = export_all(Path(folder), batch)
            for number in range(arguments.rounds):
                sessions = {n: OpenVinoSession(p, num_threads=arguments.threads) for n, p in paths.items()}
                times = measure(sessions, batch, arguments.repetitions)
                medians = {name: statistics.median(values) for name, values in times.items()}
                rows.append(
                    {
                        "batch": batch,
                        "round": number,
                        "median_ms": medians,
                        "tdq_over_static": medians["tdq"] / medians["static"],
                        "fp32_over_tdq": medians["fp32"] / medians["tdq"],
                    }
                )
    lines = [
        f"Threads: {arguments.threads}; medians of {arguments.repetitions} calls, the graphs in turn.",
        "",
        "| batch | round | FP32 ms | static INT8 ms | TDQ INT8 ms | TDQ / static | FP32 / TDQ |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = row["median_ms"]
        lines.append(
            f"| {row['batch']} | {row['round']} | {ms['fp32']:.2f} | {ms['static']:.2f} | {ms['tdq']:.2f} | "
            f"{row['tdq_over_static']:.3f} | {row['fp32_over_tdq']:.2f} |"
        )
    write("openvino_speed", {"rows": rows, "threads": arguments.threads}, "\n".join(lines))


if __name__ == "__main__":
    main()
