#!/usr/bin/env python3
"""Wan 2.1: text to video, a transformer over space and time, sampled by flow matching."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import Family
from trt_examples.steps import run_script


def tiny_denoiser() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=tiny.WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def tiny_pipeline(**parts: Any) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    transformer = tiny.seeded(tiny_denoiser)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(None, None, vae.eval(), FlowMatchEulerDiscreteScheduler(shift=7.0), transformer, **parts)


FAMILY = Family(
    name="wan",
    pipeline="WanPipeline",
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    denoiser="transformer",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {**tiny.text(i), **tiny.negative_text(i), "height": 16, "width": 16, "num_frames": 5},
    prompts=(
        "a cat walks over a wooden table",
        "a drone flies along a coast at sunset, cinematic",
        "a red bicycle rolls down a hill",
        "rain falls on a window, close-up, shallow depth of field",
    ),
    settings={"num_frames": 33},
    steps=50,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
