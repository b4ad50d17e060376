#!/usr/bin/env python3
"""Flux: double- and single-stream transformer blocks, with distilled guidance as an input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import PROMPTS, Family
from trt_examples.steps import run_script


def tiny_denoiser(guidance: bool = True) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.WIDTH,
        pooled_projection_dim=tiny.WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )


def tiny_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.autoencoder(1),
        transformer=tiny.seeded(tiny_denoiser),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )


FAMILY = Family(
    name="flux",
    pipeline="FluxPipeline",
    model="black-forest-labs/FLUX.1-dev",
    denoiser="transformer",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {**tiny.text(i), **tiny.pooled(i), **tiny.size()},
    prompts=PROMPTS,
    steps=28,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
