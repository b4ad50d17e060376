"""Wan's transformer of videos, and those built after it."""

from __future__ import annotations

import torch

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import Recipe, noise, share

__all__ = ["ENTRIES"]

_VIDEO = (4, 2, 8, 8)
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
}
_ROPE = {"rope_max_seq_len": 32}
_IMAGE = {"image_dim": 10, "added_kv_proj_dim": 24}
#: What stands before the last 512 tokens is taken for the image.
_LONG_TEXT = {"encoder_hidden_states": noise(512, 16), "encoder_hidden_states_image": noise(3, 10)}


def _frames(first: int, count: int) -> Recipe:
    """Numbers of frames [batch, count]."""
    return lambda call: torch.arange(first, first + count).repeat(call.batch, 1)


ENTRIES = (
    Entry(
        "AnyFlowTransformer3DModel",
        "transformer",
        {**_WAN, **_ROPE},
        {"timestep": share(1.0, 2), "r_timestep": share(0.5, 2)},
        latent=(2, 4, 8, 8),
        times=("timestep", "r_timestep"),
    ),
    Entry(
        "AnyFlowFARTransformer3DModel",
        "transformer",
        {**_WAN, **_ROPE, "chunk_partition": (1, 1)},
        {"chunk_partition": [1, 1], "timestep": share(1.0, 2), "r_timestep": share(0.5, 2)},
        latent=(2, 4, 8, 8),
        times=("timestep", "r_timestep"),
    ),
    Entry(
        "ChronoEditTransformer3DModel",
        "transformer",
        {**_WAN, **_ROPE, **_IMAGE, "rope_temporal_skip_len": 2},
        _LONG_TEXT,
        latent=_VIDEO,
    ),
    Entry(
        "HeliosTransformer3DModel",
        "transformer",
        {**_WAN, "rope_dim": (4, 4, 4)},
        {
            "indices_hidden_states": _frames(7, 2),
            "indices_latents_history_short": _frames(6, 1),
            "indices_latents_history_mid": _frames(4, 2),
            "indices_latents_history_long": _frames(0, 4),
            "latents_history_short": noise(4, 1, 8, 8),
            "latents_history_mid": noise(4, 2, 8, 8),
            "latents_history_long": noise(4, 4, 8, 8),
        },
        latent=_VIDEO,
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        "transformer",
        {**_WAN, **_ROPE, "inject_sample_info": True},
        {"fps": lambda call: [1] * call.batch},
        latent=_VIDEO,
    ),
    Entry("WanTransformer3DModel", "transformer", {**_WAN, **_ROPE}, latent=_VIDEO),
    Entry(
        "WanAnimateTransformer3DModel",
        "transformer",
        {
            **_WAN,
            **_ROPE,
            **_IMAGE,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        {
            **_LONG_TEXT,
            "pose_hidden_states": noise(4, 1, 8, 8),
            "face_pixel_values": noise(3, 4, 8, 8),
        },
        latent=(12, 2, 8, 8),
    ),
    Entry(
        "WanVACETransformer3DModel",
        "transformer",
        {**_WAN, **_ROPE, "vace_layers": [0], "vace_in_channels": 6},
        {"control_hidden_states": noise(6, 2, 8, 8), "control_hidden_states_scale": torch.ones(1)},
        latent=_VIDEO,
    ),
)
