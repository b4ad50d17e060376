#!/usr/bin/env python3
"""Quantize the denoiser to INT8 with scales that follow the diffusion time; save it the way diffusers does."""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from diffusers import DDIMScheduler, UNet2DModel

import modelopt_tdq as tdq

HERE = Path(__file__).resolve().parent
OUTPUT = Path("int8")


@torch.no_grad()
def forward_loop(model: UNet2DModel) -> None:
    """16 whole sampling trajectories of 20 steps: every time that matters is visited."""
    scheduler = DDIMScheduler.from_pretrained(HERE / "model" / "scheduler")
    scheduler.set_timesteps(20)
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample


def main() -> None:
    mto.enable_huggingface_checkpointing()  # save_pretrained and from_pretrained keep the quantizers
    model = UNet2DModel.from_pretrained(HERE / "model").eval()
    mtq.quantize(model, tdq.TDQ_CONFIG, forward_loop)  # for ModelOpt's own static scales: another config, same call
    model.save_pretrained(OUTPUT)
    table = tdq.scale_table(model)
    table.save(OUTPUT / "scale_table")
    print(f"{OUTPUT}: {len(table.names)} quantizers, {int((~table.is_static).sum())} follow {len(table)} times")


if __name__ == "__main__":
    main()
