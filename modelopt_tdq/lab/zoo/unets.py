"""UNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import every_frame, fixed, integers, noise

__all__ = ["ENTRIES", "TWO_LEVELS"]

#: Two levels, the second with attention to a text.
TWO_LEVELS: Mapping[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
_SAMPLE = {"sample_size": 8}
_CONDITION = {
    **TWO_LEVELS,
    **_SAMPLE,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
#: Groups of 32 channels are written into the blocks over frames.
_FRAMES = {**TWO_LEVELS, "block_out_channels": (32, 64), "norm_num_groups": 32}
_THREE_D = {
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
}

ENTRIES = (
    Entry(
        "UNet1DModel",
        "unet",
        {
            "sample_size": 32,
            "extra_in_channels": 16,
            "block_out_channels": (8, 32, 32),
            "layers_per_block": 1,
        },
        latent=(2, 32),
    ),
    Entry(
        "UNet2DModel",
        "unet",
        {
            **_SAMPLE,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        latent=(3, 8, 8),
    ),
    Entry(
        "UNet2DConditionModel",
        "unet",
        {
            **_CONDITION,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 + 6 * 8,
            "use_linear_projection": True,
        },
        {
            "added_cond_kwargs": lambda call: {
                "text_embeds": noise(8)(call),
                "time_ids": fixed(64, 64, 0, 0, 64, 64)(call),
            }
        },
    ),
    Entry("UNet3DConditionModel", "unet", {**_FRAMES, **_SAMPLE, **_THREE_D}, latent=(4, 2, 8, 8)),
    Entry(
        "DreamLiteUNetModel",
        "unet",
        {
            **TWO_LEVELS,
            **_SAMPLE,
            "attention_head_dim": 2,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "ff_mult": 2,
        },
    ),
    Entry(
        "I2VGenXLUNet",
        "unet",
        {**_FRAMES, **_SAMPLE, **_THREE_D},
        {"image_latents": noise(4, 2, 8, 8), "image_embeddings": noise(16), "fps": integers(16)},
        latent=(4, 2, 8, 8),
    ),
    Entry(
        "Kandinsky3UNet",
        "unet",
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 32, 64),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
    ),
    Entry(
        "UNetMotionModel",
        "unet",
        {
            **{key: value for key, value in TWO_LEVELS.items() if key != "attention_head_dim"},
            **_SAMPLE,
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        {"encoder_hidden_states": every_frame(noise(5, 16), 2)},
        latent=(4, 2, 8, 8),
    ),
    Entry(
        "UNetSpatioTemporalConditionModel",
        "unet",
        {
            **_SAMPLE,
            "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
            "block_out_channels": (32, 64),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "num_attention_heads": (2, 2),
            "num_frames": 2,
        },
        {"encoder_hidden_states": noise(1, 16), "added_time_ids": fixed(6, 127, 0.02)},
        latent=(2, 8, 8, 8),
    ),
    Entry(
        "StableCascadeUNet",
        "unet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 16,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 16,
            "switch_level": (False,),
        },
        {"clip_text_pooled": noise(1, 16), "clip_text": noise(5, 16), "clip_img": noise(1, 16)},
        times=("timestep_ratio",),
        largest=1.0,
    ),
    Entry(
        "AudioLDM2UNet2DConditionModel",
        "unet",
        {**_CONDITION, "cross_attention_dim": [[None, 16, 12], [None, 16, 12]]},
        {
            "encoder_hidden_states": noise(5, 16),
            "encoder_hidden_states_1": noise(4, 12),
        },
    ),
    Entry(
        "UniDiffuserModel",
        "unet",
        {
            "text_dim": 16,
            "clip_img_dim": 12,
            "num_text_tokens": 5,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "norm_num_groups": 4,
            "activation_fn": "gelu",
            "use_data_type_embedding": True,
        },
        {
            "latent_image_embeds": noise(4, 8, 8),
            "image_embeds": noise(1, 12),
            "prompt_embeds": noise(5, 16),
            "encoder_hidden_states": None,
        },
        times=("timestep_img", "timestep_text"),
    ),
)
