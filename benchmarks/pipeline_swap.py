#!/usr/bin/env python3
"""How far the images of an engine are from those of the quantized pipeline in torch, for each family of trt_examples.

Two correct implementations round a code the other way now and then, and each such flip moves the rest of its
trajectory. The measure is the quantization noise: MSE(engine, torch) / MSE(torch, full precision), of the final images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import write
from tqdm import tqdm

from trt_examples.dit import dit
from trt_examples.family import Family
from trt_examples.flux import flux
from trt_examples.pixart import pixart
from trt_examples.sd3 import sd3
from trt_examples.sdxl import sdxl
from trt_examples.stable_diffusion import stable_diffusion
from trt_examples.steps import main as steps
from trt_examples.wan import wan

FAMILIES = [module.FAMILY for module in (stable_diffusion, sdxl, sd3, flux, pixart, dit, wan)]
BACKENDS = ("onnxruntime", "openvino")


def measured(family: Family, seeds: int, sampling_steps: int, bar: Any) -> dict[str, list[float]]:
    """By backend, one ratio per seed; and the PSNR of the quantized images, in dB, as "quantized"."""
    found: dict[str, list[float]] = {name: [] for name in ("quantized", *BACKENDS)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        common = ["--tiny", "--output", folder, "--steps", str(sampling_steps)]
        steps(family, arguments=["quantize", "export", *common])
        for seed in range(seeds):
            for backend in BACKENDS:
                arguments = ["run", *common, "--backend", backend, "--seed", str(seed)]
                images = steps(family, arguments=arguments)["run"]
                noise = images.error("full precision", "quantized")
                found[backend].append(images.error("quantized", backend) / noise)
                bar.update()
            found["quantized"].append(images.psnr("full precision", "quantized"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="sampling steps; calibrated over 20")
    a = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| family, tiny | quantized against full precision, dB PSNR | ONNX Runtime: median / worst | OpenVINO |",
        "|---|--:|--:|--:|",
    ]
    results = {}
    with tqdm(total=len(FAMILIES) * a.seeds * len(BACKENDS), unit="run") as bar:
        for family in FAMILIES:
            results[family.name] = found = measured(family, a.seeds, a.steps, bar)
            cells = [f"{statistics.median(found[b]):.1e} / {max(found[b]):.1e}" for b in BACKENDS]
            lines.append(f"| {family.name} | {statistics.mean(found['quantized']):.1f} | {' | '.join(cells)} |")
    write("pipeline_swap", {"seeds": a.seeds, "steps": a.steps, "families": results}, "\n".join(lines))


if __name__ == "__main__":
    main()
