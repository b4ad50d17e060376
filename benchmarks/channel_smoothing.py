#!/usr/bin/env python3
"""Smoothing over channels: none, a fixed strength, and a strength for each tensor, on held-out trajectories.

The bundled UNet and DiT with the defaults; where its package is there, the converged model of the PyPI package
adaptive-terrain-diffusion 0.4.2, every layer quantized, statistic max. SQNR of the prediction, mean and worst over the
steps, and PSNR of the images against those of full precision.
usage: python channel_smoothing.py [--models unet,dit] [--formats 8/8,4/8,4/4] [--smoothing none,0.5,auto]
       [--terrain FOLDER --terrain-script FILE.py]   the unpacked package; and a file whose load(FOLDER) makes a model
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import RESULTS, write
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import psnr_db, sqnr_db
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = {"unet": "model", "dit": "dit"}

#: Of the terrain model, from almost nothing but noise to almost none.
SIGMAS = torch.logspace(0, 1, 11, base=0.08 / 80.0) * 80.0


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


def bundled(name: str, bits: list[tuple[int, int]], settings: list[str], arguments: Any) -> Iterator[Row]:
    """Of one of the models of the project."""
    source = ROOT / "trt_examples" / "ddim_cifar10" / BUNDLED[name]
    model, scheduler = load_model(source), load_scheduler(source)
    start = noise(arguments.samples, sample_shape(model), 0)
    held_out = reference(model, scheduler, arguments.held_out, arguments.steps, 1, lambda: None)
    for weights, activations in bits:
        for text in settings:
            smoothing = {"channel_smoothing": _setting(text), "correction": "none"}
            config = tdq.make_config(weights, activations, progress=False, **smoothing)
            copied = mtq.quantize(copy.deepcopy(model), config, lambda m: sample(m, scheduler, start, arguments.steps))
            found = judge(copied, scheduler, held_out, lambda: None)
            yield Row(name, weights, activations, text, _smoothed(copied), found.sqnr_db, found.psnr_db)


@torch.no_grad()
def _trajectory(model: nn.Module, start: Tensor, visit: Callable[[Tensor, Tensor, Tensor], None] | None) -> Tensor:
    """x = x0 + sigma_next * noise, from [N, 1, 128, 128] standard normal ``start``."""
    generator = torch.Generator().manual_seed(len(start))
    x, difficulty, clean = start * SIGMAS[0], torch.linspace(0.1, 0.9, len(start)), start
    for number, sigma in enumerate(SIGMAS):
        clean = model(noisy=x, sigma=sigma.expand(len(x)), difficulty=difficulty)
        if visit is not None:
            visit(x, sigma, clean)
        if number + 1 < len(SIGMAS):
            x = clean + SIGMAS[number + 1] * torch.randn(clean.shape, generator=generator)
    return clean


def terrain(folder: str, script: str, settings: list[str]) -> Iterator[Row]:
    """Of the converged model."""
    spec = importlib.util.spec_from_file_location("terrain", script)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{script} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.load(folder)
    start, other = (noise(count, (1, 128, 128), seed) for count, seed in ((4, 0), (2, 1)))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    image = _trajectory(model, other, lambda *call: calls.append(call))
    for text in settings:
        fields = {
            "statistic": "max",
            "correction": "none",
            "replay_samples": 2,
            "protect_steps": False,
            "timestep_argument": "sigma",
        }
        config = tdq.make_config(
            high_precision=(), channel_smoothing=_setting(text), progress=False, expected_calls=len(SIGMAS), **fields
        )
        copied = mtq.quantize(copy.deepcopy(model), config, lambda m: _trajectory(m, start, None))
        difficulty = torch.linspace(0.1, 0.9, len(other))
        mtq.fold_weight(copied)
        with torch.no_grad():
            decibels = [
                sqnr_db(clean, copied(noisy=x, sigma=sigma.expand(len(x)), difficulty=difficulty))
                for x, sigma, clean in calls
            ]
        image_db = psnr_db(image, _trajectory(copied, other, None))
        yield Row("terrain", 8, 8, text, _smoothed(copied), decibels, image_db)


def _cells(row: Row) -> str:
    decibels = torch.tensor(row.sqnr_db)
    return (
        f"| {row.model} | W{row.weights}A{row.activations} | {row.smoothing} | {row.smoothed} "
        f"| {decibels.mean():.2f} / {decibels.min():.2f} | {row.psnr_db:.2f} |"
    )


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit")
    parser.add_argument("--formats", default="8/8,4/8,4/4", help="bits of weights/activations")
    parser.add_argument("--smoothing", default="none,0.5,auto")
    parser.add_argument("--samples", type=int, default=16, help="calibration trajectories")
    parser.add_argument("--held-out", type=int, default=4, help="trajectories to judge on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--terrain", default=None)
    parser.add_argument("--terrain-script", default=None)
    parser.add_argument("--name", default="channel_smoothing")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = arguments.smoothing.split(",")
    bits = [(int(pair.split("/")[0]), int(pair.split("/")[1])) for pair in arguments.formats.split(",")]
    made: Iterator[Row] = chain.from_iterable(
        bundled(name, bits, settings, arguments) for name in filter(None, arguments.models.split(","))
    )
    if arguments.terrain is not None:
        made = chain(made, terrain(arguments.terrain, arguments.terrain_script, settings))
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
