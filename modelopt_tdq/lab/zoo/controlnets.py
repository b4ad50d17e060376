"""ControlNets. Their outputs are the additions to a denoiser's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.image_transformers import Z_IMAGE as _Z_IMAGE
from modelopt_tdq.lab.zoo.inputs import every_frame, fixed, noise, ones, rotations
from modelopt_tdq.lab.zoo.unets import TWO_LEVELS

__all__ = ["ENTRIES"]

_IMAGE = {"controlnet_cond": noise(3, 16, 16)}
_CONVOLUTIONS = {
    **TWO_LEVELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "conditioning_embedding_out_channels": (4, 8),
}
_PLAIN = Entry("ControlNetModel", "controlnet", _CONVOLUTIONS, _IMAGE)
_UNION = Entry(
    "ControlNetUnionModel",
    "controlnet",
    {
        **_CONVOLUTIONS,
        "num_trans_channel": 8,
        "num_trans_head": 2,
        "num_proj_channel": 8,
        "addition_time_embed_dim": 8,
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": 8 + 6 * 8,
    },
    {
        "controlnet_cond": lambda call: [noise(3, 16, 16)(call)],
        "control_type": fixed(1, 0, 0, 0, 0, 0),
        "control_type_idx": [0],
        "added_cond_kwargs": lambda call: {
            "text_embeds": noise(8)(call),
            "time_ids": fixed(64, 64, 0, 0, 64, 64)(call),
        },
    },
)
_FLUX = Entry(
    "FluxControlNetModel",
    "controlnet",
    {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 4, 4],
        "num_mode": 2,
    },
    {"controlnet_cond": noise(16, 4), "controlnet_mode": ones(1, dtype=torch.long)},
    latent=(16, 4),
    largest=1.0,
)
_HUNYUAN = Entry(
    "HunyuanDiT2DControlNetModel",
    "controlnet",
    {
        "conditioning_channels": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "transformer_num_layers": 4,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 8,
        "text_len": 5,
        "text_len_t5": 6,
    },
    {
        "controlnet_cond": noise(4, 8, 8),
        "encoder_hidden_states": noise(5, 16),
        "text_embedding_mask": ones(5),
        "encoder_hidden_states_t5": noise(6, 24),
        "text_embedding_mask_t5": ones(6),
        "image_meta_size": fixed(64, 64, 64, 64, 0, 0),
        "style": lambda call: torch.zeros(call.batch, dtype=torch.long),
        "image_rotary_emb": rotations(16, 8),
    },
)
_QWEN = Entry(
    "QwenImageControlNetModel",
    "controlnet",
    {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 4, 4),
    },
    {"controlnet_cond": noise(16, 16), "img_shapes": lambda call: [(1, 4, 4)] * call.batch},
    latent=(16, 16),
    largest=1.0,
)
_SD3 = Entry(
    "SD3ControlNetModel",
    "controlnet",
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    {"controlnet_cond": noise(4, 8, 8)},
)


def _several(name: str, one: Entry, *lists: str, count: int = 2, **more: Any) -> Entry:
    """``count`` of ``one``, which take these arguments as lists, and ``more``."""
    given: dict[str, Any] = {**one.arguments, **{key: _times(one.arguments[key], count) for key in lists}}
    given |= {"conditioning_scale": [0.5, 1.0][:count], "return_dict": False, **more}
    return replace(one, name=name, config={"controlnets": [one] * count}, arguments=given)


def _times(value: Any, count: int) -> Any:
    return (lambda call: [value(call) for _ in range(count)]) if callable(value) else [value] * count


def _with_transformer(model: nn.Module) -> nn.Module:
    """Z-Image's takes half of its parts from the denoiser."""
    return type(model).from_transformer(model, _Z_IMAGE.build())  # type: ignore[attr-defined, no-any-return]


ENTRIES = (
    _PLAIN,
    _several("MultiControlNetModel", _PLAIN, "controlnet_cond"),
    _UNION,
    _several("MultiControlNetUnionModel", _UNION, "controlnet_cond", "control_type", "control_type_idx"),
    _FLUX,
    _several("FluxMultiControlNetModel", _FLUX, "controlnet_cond", controlnet_mode=_times(ones(dtype=torch.long), 2)),
    _HUNYUAN,
    _several("HunyuanDiT2DMultiControlNetModel", _HUNYUAN, "controlnet_cond"),
    _QWEN,
    # more than one is refused by the class
    _several("QwenImageMultiControlNetModel", _QWEN, "controlnet_cond", count=1),
    _SD3,
    _several("SD3MultiControlNetModel", _SD3, "controlnet_cond"),
    Entry(
        "SanaControlNetModel",
        "controlnet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "mlp_ratio": 2.0,
            "sample_size": 8,
        },
        {"controlnet_cond": noise(4, 8, 8)},
    ),
    Entry(
        "SparseControlNetModel",
        "controlnet",
        {
            **TWO_LEVELS,
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "motion_num_attention_heads": 2,
        },
        {
            "controlnet_cond": noise(4, 2, 8, 8),
            "conditioning_mask": ones(1, 2, 8, 8, dtype=torch.float32),
            "encoder_hidden_states": every_frame(noise(5, 16), 2),
        },
        latent=(4, 2, 8, 8),
    ),
    Entry(
        "UNetControlNetXSModel",
        "controlnet",
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "upcast_attention": False,
            "ctrl_conditioning_embedding_out_channels": (4, 8),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
            "ctrl_learn_time_embedding": True,
            "time_embedding_mix": 0.5,
        },
        _IMAGE,
        latent=(4, 8, 8),
    ),
    Entry(
        "ZImageControlNetModel",
        "controlnet",
        {
            "control_layers_places": [0, 1],
            "control_refiner_layers_places": [0],
            "control_in_dim": 4,
            "add_control_noise_refiner": "control_noise_refiner",
            "dim": 24,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
        },
        {**_Z_IMAGE.arguments, "control_context": lambda call: list(noise(4, 1, 8, 8)(call))},
        latent=(4, 1, 8, 8),
        times=("t",),
        largest=1.0,
        finish=_with_transformer,
    ),
)
