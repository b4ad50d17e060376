#!/usr/bin/env python3
"""Sensitivity of layers by backward passes against layer by layer: the order that they give, and what they take.

For each reference model: rank correlation of the SQNRs that both find for each layer's inputs and weights, at each of
the probed times; layers kept by a proposal for the same target; CPU time in forwards of the model on the same samples.
usage: python sensitivity.py [--models unet,dit] [--target 45] [--samples 8]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from record import write

import modelopt_tdq as tdq
from modelopt_tdq.analysis import Analysis
from modelopt_tdq.analysis.probe import Probe
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

_analyze: Any = importlib.import_module("modelopt_tdq.analysis.analyze")  # the function hides its module


@dataclass(frozen=True)
class Row:
    """One model, at both variants of the scales."""

    model: str
    layers: int
    scales: str
    inputs_rank_correlation: list[float]
    weights_rank_correlation: list[float]
    kept_one_by_one: int
    kept: int
    sqnr_one_by_one_db: list[float]
    sqnr_db: list[float]
    forwards_one_by_one: float
    forwards: float


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def _correlations(ours: Analysis, theirs: Analysis, scales: str, what: str) -> list[float]:
    by_name = ({layer.name: getattr(layer, what) for layer in found.sensitivity[scales]} for found in (ours, theirs))
    mine, other = by_name
    a, b = (torch.tensor([found[name] for name in mine]) for found in (mine, other))
    known = a.isfinite().all(1)
    pairs = zip(a[known].T, b[known].T, strict=True)
    return [float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1]) for x, y in pairs]


def _counted(original: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
    """``original``, noting what it takes, in forwards of the quantized model at one probed time."""

    def sensitivities(probe: Probe, *args: Any) -> Any:
        begun = time.process_time()
        found = original(probe, *args)
        middle = time.process_time()
        probe.noise()
        taken.append((middle - begun) / (time.process_time() - middle) * len(probe.batches))
        return found

    return sensitivities


def rows(name: str, target: float, samples: int) -> list[Row]:
    """Both ways on one model."""
    chosen = reference_model(name)
    model, scheduler, steps = chosen.load_model(), chosen.load_scheduler(), chosen.calibration_steps
    start = noise(samples, sample_shape(model), 0)
    taken: list[float] = []
    original = _analyze.sensitivities
    _analyze.sensitivities = _counted(original, taken)
    try:
        slow, fast = (
            tdq.analyze(model, lambda m: sample(m, scheduler, start, steps), target=target, one_by_one=flag)
            for flag in (True, False)
        )
    finally:
        _analyze.sensitivities = original
    return [
        Row(
            name,
            len(fast.sensitivity[scales]),
            scales,
            _correlations(fast, slow, scales, "activation_db"),
            _correlations(fast, slow, scales, "weight_db"),
            len(slow.proposals[scales].layers),
            len(fast.proposals[scales].layers),
            list(slow.proposals[scales].sqnr_db),
            list(fast.proposals[scales].sqnr_db),
            *taken,
        )
        for scales in ("static", "temporal")
    ]


def _table(found: list[Row], target: float) -> str:
    lines = [
        "Rank correlation of the SQNRs of all layers, between estimates by backward passes and layer by layer, at each "
        f"probed time. Kept: layers in high precision that a proposal needs for {target:g} dB there, as measured, "
        "layer by layer and by backward passes. Cost: both variants of the scales together, in forwards of the model.",
        "",
        "| model | layers | scales | inputs | weights | kept | cost, layer by layer | by backward passes |",
        "|---|--:|---|---|---|---|--:|--:|",
    ]
    for row in found:
        inputs, weights = (
            ", ".join(f"{value:.3f}" for value in values)
            for values in (row.inputs_rank_correlation, row.weights_rank_correlation)
        )
        lines.append(
            f"| {row.model} | {row.layers} | {row.scales} | {inputs} | {weights} | {row.kept_one_by_one}, {row.kept} "
            f"| {row.forwards_one_by_one:.0f} | {row.forwards:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="unet,dit", help="of unet, dit, terrain")
    parser.add_argument("--target", type=float, default=45.0)
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    for name in arguments.models.split(","):
        found += rows(name, arguments.target, arguments.samples)
        write("sensitivity", {"rows": [asdict(row) for row in found]}, _table(found, arguments.target))


if __name__ == "__main__":
    main()
