"""Transformers of several kinds of data at once: videos with sounds, with cameras, with actions."""

from __future__ import annotations

import torch

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import TOKENS, Call, grid, noise, ones, rotations, share
from modelopt_tdq.lab.zoo.video_transformers import KANDINSKY, LTX, PATCH_GRID, PATCHES

__all__ = ["ENTRIES"]

_LTX2 = {
    **LTX,
    "audio_in_channels": 3,
    "audio_out_channels": 3,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "pos_embed_max_pos": 4,
    "base_height": 32,
    "base_width": 32,
    "audio_pos_embed_max_pos": 4,
}


def _cameras(call: Call) -> torch.Tensor:
    """Places of a camera [batch, 2, 4 * 4], which moves, and what it sees of the image [batch, 2, 4]."""
    places = torch.eye(4).repeat(call.batch, 2, 1, 1)
    places[:, :, :3, 3] = call.noise(call.batch, 2, 3) / 10
    return torch.cat([places.flatten(2), torch.tensor([8.0, 8.0, 4.0, 4.0]).repeat(call.batch, 2, 1)], 2)


ENTRIES = (
    Entry(
        "Kandinsky6Transformer3DModel",
        "transformer",
        {
            **KANDINSKY,
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_audio_dim": 3,
            "out_audio_dim": 3,
            "model_dim_a": 24,
            "time_dim_a": 16,
            "ff_dim_a": 32,
            "axes_dims_a": (12,),
        },
        {"audio_hidden_states": noise(6, 3), "encoder_attention_mask": None},
        latent=(2, 8, 8, 9),
    ),
    Entry(
        "LTX2VideoTransformer3DModel",
        "transformer",
        {**_LTX2, "cross_attn_mod": True, "audio_cross_attn_mod": True},
        {
            **PATCH_GRID,
            "audio_hidden_states": noise(4, 3),
            "audio_encoder_hidden_states": noise(TOKENS, 12),
            "audio_encoder_attention_mask": ones(TOKENS),
            "audio_num_frames": 4,
            "audio_timestep": share(0.5),
            "audio_sigma": share(0.5),
        },
        latent=PATCHES,
        times=("timestep", "audio_timestep", "sigma", "audio_sigma"),
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        "transformer",
        _LTX2,
        {"video_rotary_emb": lambda call: tuple(t.repeat(call.batch, 1, 1) for t in rotations(32, 16))},
        latent=PATCHES,
    ),
    Entry(
        "SanaWMTransformer3DModel",
        "transformer",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": 16,
            "mlp_ratio": 2.0,
        },
        {
            "timestep": share(1.0, 1, 2),
            "encoder_hidden_states": noise(1, TOKENS, 16),
            "camera_conditions": _cameras,
            "chunk_plucker": noise(6, 2, 8, 8),
        },
        latent=(4, 2, 8, 8),
    ),
    Entry(
        "MiniMaxH3Transformer3DModel",
        "transformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 3,
            "text_dim": 16,
            "freq_dim": 8,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        {
            "hidden_states": noise(8, 16),
            "audio_hidden_states": noise(4, 3),
            # the distinct times of a call
            "timestep": lambda call: call.time[:1],
            "timestep_indices": torch.zeros(TOKENS + 12, dtype=torch.long),
            "token_tags": torch.tensor([1] * TOKENS + [0] * 8 + [2] * 4),
            "position_ids": torch.cat([torch.zeros(TOKENS, 3), grid(2, 2, 2), torch.zeros(4, 3)]),
            "text_indices": torch.arange(TOKENS),
            "video_indices": torch.arange(TOKENS, TOKENS + 8),
            "audio_indices": torch.arange(TOKENS + 8, TOKENS + 12),
        },
        largest=1.0,
    ),
    Entry(
        "Cosmos3OmniTransformer",
        "transformer",
        {
            "dtype": "float32",
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "rope_axes_dim": [2, 2, 2],
            "vocab_size": 32,
            "sound_gen": True,
            "sound_dim": 3,
            "action_gen": True,
            "action_dim": 2,
            "num_embodiment_domains": 2,
        },
        {
            # one sequence, whatever the batch: a text, 8 patches of a video, 4 places of a sound, 3 of an action
            "input_ids": lambda call: torch.randint(32, (TOKENS,), generator=call.generator),
            "text_indexes": torch.arange(TOKENS),
            "position_ids": torch.arange(TOKENS + 15).repeat(3, 1),
            "und_len": TOKENS,
            "sequence_length": TOKENS + 15,
            "vision_tokens": lambda call: [call.noise(1, 4, 2, 4, 4)],
            "vision_token_shapes": [(2, 2, 2)],
            "vision_sequence_indexes": torch.arange(TOKENS, TOKENS + 8),
            "vision_mse_loss_indexes": torch.arange(TOKENS, TOKENS + 8),
            "vision_timesteps": lambda call: call.time[0].repeat(8),
            "vision_noisy_frame_indexes": [torch.arange(2)],
            "sound_tokens": lambda call: [call.noise(3, 4)],
            "sound_token_shapes": [(4, 1, 1)],
            "sound_sequence_indexes": torch.arange(TOKENS + 8, TOKENS + 12),
            "sound_mse_loss_indexes": torch.arange(TOKENS + 8, TOKENS + 12),
            "sound_timesteps": lambda call: call.time[0].repeat(4),
            "sound_noisy_frame_indexes": [torch.arange(4)],
            "action_tokens": lambda call: [call.noise(3, 2)],
            "action_token_shapes": [(3, 1, 1)],
            "action_sequence_indexes": torch.arange(TOKENS + 12, TOKENS + 15),
            "action_mse_loss_indexes": torch.arange(TOKENS + 12, TOKENS + 15),
            "action_timesteps": lambda call: call.time[0].repeat(3),
            "action_noisy_frame_indexes": [torch.arange(3)],
            "action_domain_ids": [torch.tensor([1])],
        },
        times=("vision_timesteps", "sound_timesteps", "action_timesteps"),
    ),
)
