"""Transformers of videos but for Wan's family."""

from __future__ import annotations

import torch

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import TOKENS, noise, ones, share

__all__ = ["ENTRIES", "KANDINSKY", "LTX", "PATCHES", "PATCH_GRID"]

#: Channels and two frames, in the two orders.
_VIDEO = (4, 2, 8, 8)
_FRAMES = (2, 4, 8, 8)
_CHANNELS = {"in_channels": 4, "out_channels": 4}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_ROTARY = {"num_attention_heads": 2, "attention_head_dim": 12}
_COGVIDEO = {
    **_HEADS,
    **_CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": TOKENS,
}
_HUNYUAN = {
    **_ROTARY,
    **_CHANNELS,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}
_HUNYUAN_POOLED = {**_HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 8}
LTX = {**_HEADS, **_CHANNELS, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12}
#: Two frames of 4 x 4 patches.
PATCHES = (32, 4)
PATCH_GRID = {"num_frames": 2, "height": 4, "width": 4}
KANDINSKY = {
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
_JOY = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}


ENTRIES = (
    Entry(
        "AllegroTransformer3DModel",
        "transformer",
        {
            **_ROTARY,
            **_CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        latent=_VIDEO,
    ),
    Entry("CogVideoXTransformer3DModel", "transformer", _COGVIDEO, latent=_FRAMES),
    Entry(
        "ConsisIDTransformer3DModel",
        "transformer",
        {
            **_COGVIDEO,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12,
            "LFE_vit_dim": 10,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 2,
        },
        {"id_cond": noise(12), "id_vit_hidden": lambda call: [noise(4, 10)(call) for _ in range(2)]},
        latent=_FRAMES,
    ),
    Entry(
        "CosmosTransformer3DModel",
        "transformer",
        {
            **_ROTARY,
            **_CHANNELS,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            # with it, the class resizes a mask by torchvision
            "concat_padding_mask": False,
        },
        latent=_VIDEO,
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        "transformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            **_CHANNELS,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        latent=_VIDEO,
    ),
    Entry("HunyuanVideoTransformer3DModel", "transformer", _HUNYUAN_POOLED, latent=_VIDEO),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        "transformer",
        {**_HUNYUAN, "text_embed_2_dim": 14, "image_embed_dim": 10, "use_meanflow": True},
        {
            "timestep_r": share(0.5),
            "encoder_hidden_states_2": noise(3, 14),
            "encoder_attention_mask_2": ones(3),
            "image_embeds": noise(3, 10),
        },
        latent=_VIDEO,
        times=("timestep", "timestep_r"),
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        "transformer",
        {**_HUNYUAN_POOLED, "has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True},
        {
            "image_embeds": noise(3, 10),
            "indices_latents": torch.arange(7, 9),
            "latents_clean": noise(4, 1, 8, 8),
            "indices_latents_clean": torch.arange(6, 7),
            "latents_history_2x": noise(4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(4, 6),
            "latents_history_4x": noise(4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
        latent=_VIDEO,
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        "transformer",
        {
            **_HUNYUAN,
            "num_single_layers": 1,
            "text_embed_2_dim": 14,
            "rope_axes_dim": (6, 6),
            "guidance_embeds": True,
            "use_meanflow": True,
        },
        {"timestep_r": share(0.5), "encoder_hidden_states_2": noise(3, 14), "encoder_attention_mask_2": ones(3)},
        times=("timestep", "timestep_r"),
    ),
    Entry("JoyImageEditTransformer3DModel", "transformer", _JOY, latent=(4, 1, 8, 8)),
    Entry(
        "JoyImageEditPlusTransformer3DModel",
        "transformer",
        _JOY,
        {"shape_list": lambda call: [[(1, 4, 4)]] * call.batch},
        latent=(16, 4, 1, 2, 2),
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        "transformer",
        {**KANDINSKY, "in_visual_dim": 4, "out_visual_dim": 4},
        {
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(TOKENS),
        },
        latent=(2, 8, 8, 4),
    ),
    Entry(
        "Kandinsky6SRTransformer3DModel",
        "transformer",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        latent=(2, 8, 8, 9),
    ),
    Entry(
        "LatteTransformer3DModel",
        "transformer",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 12,
            "video_length": 2,
        },
        {"encoder_attention_mask": None},
        latent=_VIDEO,
    ),
    Entry("LTXVideoTransformer3DModel", "transformer", LTX, PATCH_GRID, latent=PATCHES),
    Entry(
        "MochiTransformer3DModel",
        "transformer",
        {
            **_ROTARY,
            "num_layers": 2,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": TOKENS,
        },
        latent=_VIDEO,
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        "transformer",
        {
            **_ROTARY,
            **_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "image_embed_dim": 10,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        {"image_embeds": noise(3, 10)},
        latent=_VIDEO,
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        "transformer",
        {
            **_ROTARY,
            **_CHANNELS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "mlp_ratio": 2.0,
            "sample_size": 8,
            "guidance_embeds": True,
            "rope_max_seq_len": 32,
        },
        latent=_VIDEO,
    ),
)
