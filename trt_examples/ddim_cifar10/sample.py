#!/usr/bin/env python3
"""Sample with the exported graph in OpenVINO, and hold the images against full precision at the same seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from modelopt_tdq.metrics import psnr_db
from modelopt_tdq.report.plots import image_grid
from modelopt_tdq.runtime.openvino import OpenVinoSession

HERE = Path(__file__).resolve().parent
BATCH, STEPS = 8, 50  # the scales were calibrated with 20 steps: rows are found by time, not by step number


@torch.no_grad()
def sample(predict) -> torch.Tensor:
    scheduler = DDIMScheduler.from_pretrained(HERE / "model" / "scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x.clamp(-1, 1)


def main() -> None:
    model = UNet2DModel.from_pretrained(HERE / "model").eval()
    session = OpenVinoSession("ratio.onnx")
    output = session.outputs[0]

    def deployed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session({"sample": x.numpy(), "timestep": t.reshape(1).numpy()})[output])

    reference, images = sample(lambda x, t: model(x, t).sample), sample(deployed)
    print(f"{BATCH} images, {STEPS} steps: {psnr_db(reference, images):.1f} dB PSNR against full precision")
    print(image_grid({"FP32": reference, "INT8, OpenVINO": images}, Path("samples.png")))


if __name__ == "__main__":
    main()
