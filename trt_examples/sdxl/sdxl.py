#!/usr/bin/env python3
"""Stable Diffusion XL: a U-Net whose time embedding also holds the text and the size of the image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import PROMPTS, Family
from trt_examples.stable_diffusion.stable_diffusion import tiny_denoiser
from trt_examples.steps import run_script


def tiny_pipeline() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = tiny.seeded(
        tiny_denoiser,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=tiny.WIDTH + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=tiny.autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


FAMILY = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    model="stabilityai/stable-diffusion-xl-base-1.0",
    denoiser="unet",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {
        **tiny.text(i),
        **tiny.negative_text(i),
        **tiny.pooled(i),
        **tiny.negative_pooled(i),
        **tiny.size(),
    },
    prompts=PROMPTS,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
