#!/usr/bin/env python3
"""``analyze`` of the converged terrain model with a target, and what its proposals are worth on other trajectories.

W8A8 with static scales and with scales over time. What the analysis keeps in high precision is measured at the probed
times of the calibration's own trajectories; here on trajectories from other noise, at all steps, against the same
model with every layer quantized. Takes about half an hour of a core.
usage: python terrain_analysis.py [--target 20] [--held-out 4]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from record import write

import modelopt_tdq as tdq
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

#: Scales alone, with room for other trajectories: what the proposals were made for.
SCALES: dict[str, Any] = {"margin": "auto", "channel_smoothing": "none", "correction": "none", "progress": False}


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        scales: static or temporal.
        kept: Layers in high precision.
        probed_db: Measured by the analysis, at its probed times; none where nothing was proposed.
        sqnr_db: On other trajectories, at each step.
        psnr_db: Of the height maps.
    """

    scales: str
    kept: list[str]
    probed_db: list[float]
    sqnr_db: list[float]
    psnr_db: float


def main() -> None:
    """Run, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=20.0)
    parser.add_argument("--held-out", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = reference_model("terrain")
    model, scheduler, steps = about.load_model(), about.load_scheduler(), about.calibration_steps
    start = noise(about.calibration_samples, sample_shape(model), 0)

    def forward_loop(model: torch.nn.Module) -> None:
        sample(model, scheduler, start, steps)

    begun = time.process_time()
    forward_loop(model)
    pass_s = time.process_time() - begun
    begun = time.process_time()
    analysis = tdq.analyze(
        model, forward_loop, tdq.make_config(**SCALES), target=arguments.target, probes=3, progress=False
    )
    seconds = time.process_time() - begun
    against = reference(model, scheduler, arguments.held_out, steps, 1, lambda: None)
    rows = []
    for scales, proposal in analysis.proposals.items():
        for kept in ([], list(proposal.layers)):
            config = tdq.make_config(**SCALES, **({"bins": 1} if scales == "static" else {}))
            config["quant_cfg"] += proposal.rules if kept else []
            quantized = mtq.quantize(about.load_model(), config, forward_loop)
            found = judge(quantized, scheduler, against, lambda: None)
            probed = list(proposal.sqnr_db) if kept else []
            rows.append(Row(scales, kept, probed, found.sqnr_db, found.psnr_db))
    calls = seconds / pass_s * steps
    lines = [
        f"The terrain model ({len(analysis.sensitivity['static'])} layers, W8A8, calibrated on "
        f"{about.calibration_samples} trajectories of {steps} steps); target {arguments.target:g} dB at three probed "
        f"times. The analysis took {seconds:.0f} s of CPU on one core, as {calls:.0f} calls of the model on the "
        f"calibration's batch. SQNR of the prediction, mean / worst step, and PSNR of the height maps in dB, on "
        f"{arguments.held_out} trajectories from other noise.",
        "",
        "| scales | layers kept | measured at the probed times | SQNR | PSNR |",
        "|---|--:|---|--:|--:|",
    ]
    for row in rows:
        db = torch.tensor(row.sqnr_db)
        probed = ", ".join(f"{value:.1f}" for value in row.probed_db) or "-"
        lines.append(
            f"| {row.scales} | {len(row.kept)} | {probed} | {db.mean():.2f} / {db.min():.2f} | {row.psnr_db:.2f} |"
        )
    for scales, proposal in analysis.proposals.items():
        lines += ["", f"Kept with {scales} scales: {', '.join(proposal.layers)}."]
    record = {"rows": [asdict(row) for row in rows], "seconds": seconds, "pass_s": pass_s, "verdict": analysis.verdict}
    write("terrain_analysis", record, "\n".join([*lines, "", analysis.verdict]))


if __name__ == "__main__":
    main()
