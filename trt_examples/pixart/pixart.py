#!/usr/bin/env python3
"""PixArt-alpha: a transformer with cross-attention on text, and one modulation by time for all blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import PROMPTS, Family
from trt_examples.steps import run_script


def tiny_denoiser() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=tiny.WIDTH,
        attention_bias=True,
        use_additional_conditions=False,
    )


def tiny_pipeline() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    denoiser = tiny.seeded(tiny_denoiser)
    return PixArtAlphaPipeline(None, None, tiny.autoencoder(), denoiser, DPMSolverMultistepScheduler())


def tiny_call(number: int) -> dict[str, Any]:
    return {
        "prompt": None,
        "negative_prompt": None,
        **tiny.text(number),
        **tiny.negative_text(number),
        "prompt_attention_mask": torch.ones(1, tiny.TEXT),
        "negative_prompt_attention_mask": torch.ones(1, tiny.TEXT),
        **tiny.size(),
        "use_resolution_binning": False,
    }


FAMILY = Family(
    name="pixart",
    pipeline="PixArtAlphaPipeline",
    model="PixArt-alpha/PixArt-XL-2-1024-MS",
    denoiser="transformer",
    tiny=tiny_pipeline,
    tiny_call=tiny_call,
    prompts=PROMPTS,
    steps=20,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
