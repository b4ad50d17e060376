"""Priors: what makes embeddings, or structures, rather than images."""

from __future__ import annotations

from modelopt_tdq.lab.zoo.entry import Entry
from modelopt_tdq.lab.zoo.inputs import TOKENS, integers, noise, ones

__all__ = ["ENTRIES"]

ENTRIES = (
    Entry(
        "PriorTransformer",
        "prior",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "embedding_dim": 12,
            "num_embeddings": TOKENS,
        },
        {
            "proj_embedding": noise(12),
            "encoder_hidden_states": noise(TOKENS, 12),
            "attention_mask": ones(TOKENS),
        },
        latent=(12,),
    ),
    Entry(
        "RFD4ProteinaTransformer",
        "prior",
        {
            "nlayers": 2,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "token_type_emb_dim": 4,
            "t_emb_dim": 8,
            "xt_pair_dist_dim": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
            "num_sequence_classes": 12,
        },
        {
            "bb_ca": noise(6, 3),
            "local_latents": noise(6, 4),
            "padding_mask": ones(6),
            "token_type": integers(7, 6),
            "conditioning": lambda call: {
                "is_in_context_conditioning": ~ones(6)(call),
                "supports_local_latent": ones(6)(call),
            },
        },
        times=("bb_ca_time", "local_latents_time"),
        largest=1.0,
    ),
)
