"""Transformers of sound."""

from __future__ import annotations

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import TOKENS, noise, ones, rotations, share

__all__ = ["ENTRIES"]

ENTRIES = (
    Entry(
        "AceStepTransformer1DModel",
        "transformer",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 16,
            "sliding_window": 4,
        },
        {"timestep_r": share(0.5), "context_latents": noise(16, 8)},
        latent=(16, 4),
        times=("timestep", "timestep_r"),
        largest=1.0,
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        "transformer",
        {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4, "ff_mult": 2.0},
        {"latent_cond": noise(16, 4)},
        latent=(16, 4),
        largest=1.0,
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        "transformer",
        {
            "in_channels": 4,
            "condition_dim": 12,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        {"encoder_hidden_states": noise(16, 12)},
        latent=(4, 16),
        largest=1.0,
    ),
    Entry(
        "StableAudioDiTModel",
        "transformer",
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
        {"global_hidden_states": noise(1, 10), "rotary_embedding": rotations(17, 4)},
        latent=(4, 16),
        largest=1.0,
    ),
    Entry(
        "StableAudio3DiTModel",
        "transformer",
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 12,
            "global_cond_dim": 10,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        {"global_hidden_states": noise(10), "local_add_cond": noise(5, 16)},
        latent=(4, 16),
        largest=1.0,
    ),
    Entry(
        "T5FilmDecoder",
        "decoder",
        {
            "input_dims": 8,
            "targets_length": 8,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 32,
        },
        {
            "encodings_and_masks": lambda call: [(noise(TOKENS, 16)(call), ones(TOKENS)(call))],
            "decoder_input_tokens": noise(8, 8),
        },
        times=("decoder_noise_time",),
        largest=1.0,
    ),
)
