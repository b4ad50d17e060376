#!/usr/bin/env python3
"""Stable Diffusion 3: a transformer over image and text tokens, sampled by flow matching."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import PROMPTS, Family
from trt_examples.steps import run_script


def tiny_denoiser() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=tiny.WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=tiny.WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )


def tiny_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer=tiny.seeded(tiny_denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.autoencoder(),
        **dict.fromkeys(text_parts),
    )


FAMILY = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    model="stabilityai/stable-diffusion-3-medium-diffusers",
    denoiser="transformer",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {
        **tiny.text(i),
        **tiny.negative_text(i),
        **tiny.pooled(i),
        **tiny.negative_pooled(i),
        **tiny.size(),
    },
    prompts=PROMPTS,
    steps=28,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
