"""The layers that every preset leaves in high precision."""

from __future__ import annotations

__all__ = ["HIGH_PRECISION", "MODULATION", "ROLES"]

#: The name of the layers that steer adaptive norms and residual blocks.
MODULATION = "modulation"

#: Kept in high precision by every preset (TDQ, section 4.1: time embedding, first and last layer; and the
#: modulation of adaptive norms, which is a temporal feature). By the role of the layers, globs over quantizer names,
#: which begin with the name of the layer. A ``*`` matches dots as well, so a glob that ends in one takes whatever is
#: inside: an embedder may hold whole transformer blocks (the text refiner of HunyuanVideo), which are to be quantized.
ROLES: dict[str, tuple[str, ...]] = {
    # what is computed from the time, the class and pooled conditions
    "time and condition embedding": (
        "*time_emb*",
        "*timestep_embedder*",
        "*time_text_embed*",
        "*time_*embed.*",
        "*time_*emb.*",
        "*time_proj*",
        "*time_step*",
        "*time_in.*",
        "*time_token.*",
        "time_mlp.*",
        "*time_mod_proj.*",
        "*timestep_proj.*",
        "*timestep_embed.*",
        "t_block.*",
        "*global_proj.*",
        "add_time_condition.*",
        "distilled_guidance_layer.*",
        "conditioning_emb.*",
        "fps_projection.*",
        "*cond_factory.linear_out.*",
        "transition_c_[0-9].*",
    ),
    # embedders: a layer itself, or a small perceptron
    "embedder": (
        "*_embedder.input_quantizer",
        "*_embedder.weight_quantizer",
        "*_embedder.base_layer.*",
        "*_embedder.lora_*",
        "*_embedder.[0-9]*",
        "*_embedder.linear*",
        "*_embedder.mlp.*",
        "*_embedder.proj*",
        "*_embedder.*_proj.*",
        "*_embedder.image_embedder.*",
        "*_embedder_[0-9].linear*",
        "*_embedders.*",
        "*_embedding.*",
        "*_embeddings.in_layer.*",
        "to_*_embed.*",
        "img_emb.*",
    ),
    # conditions on their way in
    "condition input": (
        "*caption_projection*",
        "*cross_attention_proj.*",
        "encoder_hid_proj.*",
        "encoder_hidden_states_proj.*",
        "llm_cond_proj.*",
        "text_proj*",
        "txt_in.*",
        "clip_*mapper.*",
        "image_projector.*",
        "glyph_projector.*",
        "image_projection.*",
        "image_latents_proj_in.*",
        "*_embed.proj.[0-9]*",
        "local_facial_extractor.*mapping*.0.*",
    ),
    # modulation of adaptive norms and of residual blocks
    MODULATION: (
        "*adaln*",
        "*norm*.linear.*",
        "*norm[0-9]*.linear_*",
        "*norm_out*",
        "*modulation*",
        "*_mod.*",
        "*context_mlp*",
        "*.mapper*",
        "*_scale_shift.linear.*",
        "av_cross_attn_*_gate.linear.*",
        "*.FiLMLayer.scale_bias.*",
        "*.film.scale_bias.*",
        "*.scale_output.[0-9]*",
    ),
    "first layer": (
        "*pos_embed*",
        "*patch_embed*",
        "patch_*",
        "conv_in.*",
        "*_conv_in.*",
        "img_in.*",
        "input_proj.*",
        "proj.*",
        "proj_in.*",
        "proj_in_conv.*",
        "audio_proj_in.*",
        "embedding_proj.*",
        "embedding.[0-9]*",
        "preprocess_conv.*",
        "continuous_inputs_projection.*",
        "vae_img_in.*",
        "clip_img_in.*",
        "text_in.*",
        "nets.[0-9].conv_in.*",
        "nets.[0-9].img_in.*",
    ),
    "last layer": (
        "conv_out.*",
        "*_conv_out.*",
        "proj_out.*",
        "proj_out_*",
        "audio_proj_out.*",
        "proj_to_clip_embeddings.*",
        "*final_layer.*",
        "final_linear.*",
        "out_block.*",
        "out_layer.*",
        "*_out_layer.out_layer.*",
        "head.head.*",
        "clf.*",
        "postprocess_conv.*",
        "spec_out.*",
        "vae_img_out.*",
        "clip_img_out.*",
        "text_out.*",
        "ca_linear.*",
        "local_latents_linear.*",
        "sequence_readout.*",
    ),
}

#: The globs of all roles.
HIGH_PRECISION = tuple(pattern for patterns in ROLES.values() for pattern in patterns)
