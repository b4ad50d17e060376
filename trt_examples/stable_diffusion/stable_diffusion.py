#!/usr/bin/env python3
"""Stable Diffusion 1.x and 2.x: a U-Net with cross-attention on text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import PROMPTS, Family
from trt_examples.steps import run_script


def tiny_denoiser(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    small = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": tiny.WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    return UNet2DConditionModel(**{**small, **config})


def tiny_pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=tiny.autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=tiny.seeded(tiny_denoiser),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


FAMILY = Family(
    name="stable_diffusion",
    pipeline="StableDiffusionPipeline",
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    denoiser="unet",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {**tiny.text(i), **tiny.negative_text(i), **tiny.size()},
    prompts=PROMPTS,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
