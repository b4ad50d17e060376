"""What the presets leave in high precision: embedders, modulation, first and last layers; and nothing in the blocks.

Of many models of diffusers, without memory: only the names of the layers matter.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import fast_config, noise
from torch import nn

from modelopt_tdq.high_precision import HIGH_PRECISION
from modelopt_tdq.lab.zoo.catalogue import find_entry

diffusers = pytest.importorskip("diffusers")

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Few layers, by the names that models have for their number.
_FEW = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "n_layers": 2,
    "depth": 2,
    "num_visual_blocks": 2,
    "num_text_blocks": 2,
}

#: What must be given beside that.
_NEEDED: dict[str, dict[str, Any]] = {
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": [0, 1],
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 8,
    },
}

_MODELS = (
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "ChromaTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "CosmosTransformer3DModel",
    "DiTTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "Kandinsky3UNet",
    "Kandinsky5Transformer3DModel",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
    "PRXTransformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "SkyReelsV2Transformer3DModel",
    "StableAudioDiTModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetSpatioTemporalConditionModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)

#: A layer of a numbered block.
_BLOCK = re.compile(r"(^|[_.])(blocks?|layers|refiner|attentions|resnets\w*)\.\d+")

#: Of those, what is a function of the time or of the condition alone.
_MODULATION = re.compile(
    r"norm\w*\.(emb\.\w+\.)?linear|norm_out|modulation|_mod\.|time_emb_proj|time_pos_embed|adaln|context_mlp"
)

#: A perceptron that makes the modulation of all blocks.
_MODULATION_OF_ALL = re.compile(r"^distilled_guidance_layer\.")


def _matched(name: str) -> bool:
    both = {
        any(fnmatch.fnmatch(name + q, p) for p in HIGH_PRECISION) for q in (".input_quantizer", ".weight_quantizer")
    }
    assert len(both) == 1, name
    return both.pop()


def _layers(model: str) -> dict[str, bool]:
    """Whether each layer is left out, by name."""
    kind = getattr(diffusers, model, None)
    if kind is None:
        pytest.skip(f"this version of diffusers has no {model}")
    known = inspect.signature(kind.__init__).parameters
    fields = {**{name: value for name, value in _FEW.items() if name in known}, **_NEEDED.get(model, {})}
    with torch.device("meta"):
        made = kind(**fields)
    return {name: _matched(name) for name, module in made.named_modules() if isinstance(module, _LAYERS)}


@pytest.mark.parametrize("model", _MODELS)
def test_blocks_are_quantized_and_everything_else_is_left_out(model: str) -> None:
    layers = _layers(model)
    in_block = {name: bool(_BLOCK.search(name)) and not _MODULATION_OF_ALL.search(name) for name in layers}
    quantized = {name for name, left_out in layers.items() if not left_out}
    assert len(quantized) >= 10
    assert not [name for name in quantized if not in_block[name]]
    assert not [name for name in layers if in_block[name] and layers[name] and not _MODULATION.search(name)]
    assert not [name for name in quantized if _MODULATION.search(name)]


@pytest.mark.parametrize(
    ("model", "blocks", "left_out"),
    [
        (
            "HunyuanVideoTransformer3DModel",
            "context_embedder.token_refiner.refiner_blocks.",
            "context_embedder.proj_in",
        ),
        (
            "HunyuanImageTransformer2DModel",
            "context_embedder.token_refiner.refiner_blocks.",
            "context_embedder.proj_in",
        ),
        ("Lumina2Transformer2DModel", "context_refiner.", "time_caption_embed.caption_embedder.1"),
        ("ZImageTransformer2DModel", "noise_refiner.", "cap_embedder.1"),
    ],
)
def test_blocks_of_refiners_are_quantized_and_their_embedders_are_not(model: str, blocks: str, left_out: str) -> None:
    layers = _layers(model)
    refiner = {name: out for name, out in layers.items() if name.startswith(blocks)}
    assert sum(not out for out in refiner.values()) >= 6
    assert all(_MODULATION.search(name) for name, out in refiner.items() if out)
    assert layers[left_out]


def test_the_text_refiner_of_hunyuan_video_is_quantized_and_calibrated() -> None:
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()

    def forward_loop(model: nn.Module) -> None:
        for time in (900.0, 20.0):
            model(
                hidden_states=noise(1, 4, 1, 4, 4),
                timestep=torch.tensor([time]),
                encoder_hidden_states=noise(1, 6, 16, seed=1),
                encoder_attention_mask=torch.ones(1, 6),
                pooled_projections=noise(1, 8, seed=2),
            )

    quantized: Any = mtq.quantize(model, fast_config(), forward_loop)
    enabled = {name for name, m in quantized.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    refiner = [name for name in enabled if ".refiner_blocks.0." in name and name.endswith("input_quantizer")]
    assert len(refiner) == 6
    assert all(len(quantized.get_submodule(name)._scale) == 2 for name in refiner)
    assert not [name for name in enabled if "time_text_embed" in name or "proj_in" in name or "norm" in name]


#: Functions of the time alone, layers that take conditions in, first and last ones, of models with names of their own.
_APART = {
    "T5FilmDecoder": {
        "conditioning_emb.0",
        "conditioning_emb.2",
        "continuous_inputs_projection",
        "decoders.0.layer.0.FiLMLayer.scale_bias",
        "decoders.0.layer.2.film.scale_bias",
        "spec_out",
    },
    "RFD4ProteinaTransformer": {
        "cond_factory.linear_out",
        "transition_c_1.swish_linear.0",
        "transition_c_2.linear_out",
        "pair_repr_builder.cond_factory.linear_out",
        "transformer_layers.1.mhba.scale_output.0",
        "transformer_layers.1.transition.scale_output.0",
        "local_latents_linear.1",
        "ca_linear.1",
        "sequence_readout.1",
    },
    "UniDiffuserModel": {"vae_img_in.proj", "clip_img_in", "text_in", "vae_img_out", "clip_img_out", "text_out"},
    "MultiControlNetModel": {"nets.0.conv_in", "nets.1.conv_in"},
    "QwenImageMultiControlNetModel": {"nets.0.img_in"},
    "LongCatAudioDiTTransformer": {"input_embed.proj.0", "text_embed.proj.2", "latent_embed.proj.0"},
    "I2VGenXLUNet": {"image_latents_proj_in.0"},
    "HunyuanVideoFramepackTransformer3DModel": {"image_projection.up", "image_projection.down"},
    "ConsisIDTransformer3DModel": {"local_facial_extractor.mapping_0.0"},
    "SkyReelsV2Transformer3DModel": {"fps_projection.net.0.proj"},
}


@pytest.mark.parametrize("model", _APART)
def test_what_blocks_of_other_names_leave_out(model: str) -> None:
    layers = {n: _matched(n) for n, module in find_entry(model).build().named_modules() if isinstance(module, _LAYERS)}
    assert not [name for name in _APART[model] if not layers[name]]
    assert sum(not left_out for left_out in layers.values()) >= 7
