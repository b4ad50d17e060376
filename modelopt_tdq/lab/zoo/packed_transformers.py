"""Transformers of images whose latents come as a sequence of patches [batch, patches, channels]."""

from __future__ import annotations

import torch

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import TOKENS, Call, grid, noise, share

__all__ = ["ENTRIES", "FLUX", "QWEN"]

#: 4 x 4 patches.
_PATCHES = (16, 4)
_ROTARY = {"attention_head_dim": 12, "num_attention_heads": 2}

#: One layer of two streams and one of one stream, positions on three axes.
FLUX = {
    **_ROTARY,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 4),
}
_FOUR_AXES = {**FLUX, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
QWEN = {
    **_ROTARY,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 4),
}


def _shapes(call: Call) -> list[list[tuple[int, int, int]]]:
    """Of the one image of every sample."""
    return [[(1, 4, 4)]] * call.batch


def _text_then_image(text: int, image: int) -> torch.Tensor:
    return torch.tensor([text] * TOKENS + [image] * 16)


_JOINT_POSITIONS = torch.cat([torch.zeros(TOKENS, 3), grid(4, 4, axes=3)])


ENTRIES = (
    Entry("BriaTransformer2DModel", "transformer", {**FLUX, "axes_dims_rope": [4, 4, 4]}, latent=_PATCHES),
    Entry(
        "BriaFiboTransformer2DModel",
        "transformer",
        {**FLUX, "axes_dims_rope": [4, 4, 4], "text_encoder_dim": 10},
        {"text_encoder_layers": lambda call: [noise(TOKENS, 10)(call) for _ in range(2)]},
        latent=_PATCHES,
    ),
    Entry(
        "ChromaTransformer2DModel",
        "transformer",
        {**FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        latent=_PATCHES,
        largest=1.0,
    ),
    Entry(
        "FluxTransformer2DModel",
        "transformer",
        {**FLUX, "pooled_projection_dim": 8, "guidance_embeds": True},
        latent=_PATCHES,
        largest=1.0,
    ),
    Entry(
        "Flux2Transformer2DModel",
        "transformer",
        {**_FOUR_AXES, "timestep_guidance_channels": 8},
        latent=_PATCHES,
        largest=1.0,
    ),
    Entry(
        "Flux3Transformer2DModel",
        "transformer",
        {**_FOUR_AXES, "num_layers": 2, "cond_in_channels": 4, "timestep_channels": 8, "flow_map": True},
        {
            "target_timestep": share(0.5),
            "image_cond_hidden_states": noise(4, 4),
            "image_cond_ids": grid(2, 2, axes=4),
        },
        latent=_PATCHES,
        times=("timestep", "target_timestep"),
        largest=1.0,
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        "transformer",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 8,
            "llm_features_dim": 16,
            "mrope_section": (2, 2, 2),
        },
        {
            "hidden_states": noise(TOKENS + 16, 4),
            "encoder_hidden_states": noise(TOKENS + 16, 16),
            "position_ids": lambda call: _JOINT_POSITIONS.long().repeat(call.batch, 1, 1),
            "segment_ids": lambda call: torch.zeros(call.batch, TOKENS + 16, dtype=torch.long),
            # a text token has number 3, a token of the image number 2
            "indicator": lambda call: _text_then_image(3, 2).repeat(call.batch, 1),
        },
        largest=1.0,
    ),
    Entry(
        "Krea2Transformer2DModel",
        "transformer",
        {
            **_ROTARY,
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 4),
        },
        {"encoder_hidden_states": noise(TOKENS, 2, 16), "position_ids": _JOINT_POSITIONS},
        latent=_PATCHES,
        largest=1.0,
    ),
    Entry(
        "LongCatImageTransformer2DModel",
        "transformer",
        {**FLUX, "axes_dims_rope": [4, 4, 4], "pooled_projection_dim": 16},
        latent=_PATCHES,
        largest=1.0,
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        "transformer",
        {
            **QWEN,
            "num_layers": 5,
            "num_key_value_heads": 1,
            # widths are rounded down to 128
            "mlp_ratio": 8.0,
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        {"img_shapes": lambda call: [(1, 4, 4)] * call.batch},
        latent=(16, 16),
        largest=1.0,
    ),
    Entry("OvisImageTransformer2DModel", "transformer", {**FLUX, "out_channels": 4}, latent=_PATCHES, largest=1.0),
    Entry("QwenImageTransformer2DModel", "transformer", QWEN, {"img_shapes": _shapes}, latent=(16, 16), largest=1.0),
    Entry(
        "QwenImage21Transformer2DModel",
        "transformer",
        {
            **_ROTARY,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "context_in_dim": 16,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 4, 4),
        },
        {
            "img_shapes": _shapes,
            # a place of the language model stands for four patches
            "img_mask": lambda call: torch.tensor([False] * TOKENS + [True] * 4).repeat(call.batch, 1),
        },
        latent=_PATCHES,
        largest=1.0,
    ),
)
