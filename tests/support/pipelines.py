"""Tiny random pipelines of every family, and how to call them without a network or a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from support.models import FAMILIES, noise


@dataclass(frozen=True)
class PipelineFamily:
    """One kind of pipeline: how to make it, and the arguments of a call."""

    make: Callable[[], Any]
    call: dict[str, Any]
    schedulers: dict[str, Callable[[], Any]] = field(default_factory=dict)


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Without layers of zeros, behind which nothing shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _family(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return _randomized(FAMILIES[name].make())


def _vae(latent_channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=latent_channels, shift_factor=0.0
    ).eval()


def _ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(_family("unet"), DDIMScheduler())


def _dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline calls "no class" 1000
        norm_num_groups=4,
    )
    return DiTPipeline(_randomized(transformer), _vae(), DDIMScheduler())


def _stable_diffusion() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_family("unet_condition"),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_randomized(unet),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    none = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=_family("sd3"), scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), **none
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(1), transformer=_family("flux_guidance"), **none
    )


def _pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        attention_bias=True,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(None, None, _vae(), _randomized(transformer), DPMSolverMultistepScheduler())


def _wan() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(None, None, vae.eval(), FlowMatchEulerDiscreteScheduler(shift=7.0), _randomized(transformer))


_TEXT = {"prompt_embeds": noise(1, 5, 16, seed=1)}
_NEGATIVE = {"negative_prompt_embeds": noise(1, 5, 16, seed=2)}
_POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=3)}
_NEGATIVE_POOLED = {"negative_pooled_prompt_embeds": noise(1, 16, seed=4)}
_MASKS = {
    "prompt_attention_mask": torch.ones(1, 5),
    "negative_prompt_attention_mask": torch.ones(1, 5),
}
_SIZE = {"height": 8, "width": 8}


PIPELINES = {
    "ddim": PipelineFamily(_ddim, {"batch_size": 1}),
    "dit": PipelineFamily(_dit, {"class_labels": [1]}),
    "stable_diffusion": PipelineFamily(_stable_diffusion, {**_TEXT, **_NEGATIVE, **_SIZE}),
    "sdxl": PipelineFamily(_sdxl, {**_TEXT, **_NEGATIVE, **_POOLED, **_NEGATIVE_POOLED, **_SIZE}),
    "sd3": PipelineFamily(_sd3, {**_TEXT, **_NEGATIVE, **_POOLED, **_NEGATIVE_POOLED, "height": 8, "width": 8}),
    "flux": PipelineFamily(_flux, {**_TEXT, **_POOLED, **_SIZE}),
    "pixart": PipelineFamily(
        _pixart,
        {
            "prompt": None,
            "negative_prompt": None,
            **_TEXT,
            **_NEGATIVE,
            **_MASKS,
            **_SIZE,
            "use_resolution_binning": False,
        },
    ),
    "wan": PipelineFamily(_wan, {**_TEXT, **_NEGATIVE, "height": 16, "width": 16, "num_frames": 5}),
}
