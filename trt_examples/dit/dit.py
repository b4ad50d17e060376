#!/usr/bin/env python3
"""DiT: a transformer conditioned on a class of ImageNet. Prompts are class numbers: 207 is a golden retriever."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trt_examples import tiny
from trt_examples.family import Family
from trt_examples.steps import run_script


def tiny_denoiser(classes: int = 1000) -> Any:
    """The pipeline calls "no class" 1000."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    )


def tiny_pipeline() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(tiny.seeded(tiny_denoiser), tiny.autoencoder(), DDIMScheduler())


FAMILY = Family(
    name="dit",
    pipeline="DiTPipeline",
    model="facebook/DiT-XL-2-256",
    denoiser="transformer",
    tiny=tiny_pipeline,
    tiny_call=lambda i: {"class_labels": [100 * i + 1]},
    prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    call=lambda prompt: {"class_labels": [int(prompt)]},
    sized=False,
    steps=50,
)

if __name__ == "__main__":
    run_script(FAMILY, __doc__)
