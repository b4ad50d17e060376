#!/usr/bin/env python3
"""Reconstruct a W4A8 denoiser without training data: rounding and intervals are learned block by block. Resumable.

python ptq.py --out w4a8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch

import modelopt_tdq as tdq
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="full precision; `dit` is the other one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--intervals", default="thin", help="thin, mlp, table, static")
    parser.add_argument("--samples", type=int, default=256, help="from the model's own trajectories")
    parser.add_argument("--iterations", type=int, default=300, help="per block")
    a = parser.parse_args()

    mto.enable_huggingface_checkpointing()
    model, sampler = load_model(a.model), load_scheduler(a.model)

    def forward_loop(model: torch.nn.Module) -> None:
        sample(model, sampler, noise(max(1, a.samples // 20), sample_shape(model), 0), 20)

    config = tdq.make_config(
        a.weight_bits,
        a.activation_bits,
        method="tdq_reconstruct",
        intervals=a.intervals,
        samples=a.samples,
        iterations=a.iterations,
        cache_dir=str(a.out) + ".blocks",  # finished blocks: an interrupted run goes on with the next one
    )
    mtq.quantize(model, config, forward_loop)
    model.save_pretrained(a.out)
    tdq.scale_table(model).save(a.out / "scale_table")
    print(f"{a.out}: reconstructed on {a.samples} samples")


if __name__ == "__main__":
    main()
