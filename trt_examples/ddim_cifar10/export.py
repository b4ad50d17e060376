#!/usr/bin/env python3
"""Export the quantized denoiser to ONNX; build a TensorRT-RTX engine, ahead of time, on a machine without a GPU too."""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.opt as mto
import torch
from diffusers import UNet2DModel

import modelopt_tdq as tdq  # also needed to restore: it registers the quantizers with ModelOpt

BATCH = 8


def main() -> None:
    mto.enable_huggingface_checkpointing()
    model = UNet2DModel.from_pretrained("int8").eval()
    inputs = {"sample": torch.randn(BATCH, 3, 32, 32), "timestep": torch.tensor([500])}
    exported = tdq.export_onnx(model, Path("ratio.onnx"), inputs)
    print(f"{exported.path}: {len(exported.quantized)} quantizers in low precision, skipped: {exported.skipped}")
    engine = tdq.build_engine("ratio.onnx", "model.engine", compute_capabilities=("8.9", "12.0"))
    low = sum(engine.low_precision(name) for name in engine.quantized)
    print(f"{engine.engine}: {engine.kernels} kernels, {low} of {len(engine.quantized)} quantized layers in INT8")


if __name__ == "__main__":
    main()
