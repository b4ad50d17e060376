"""Models whose layers depend on the time and on other inputs in many ways: tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.models import FAMILIES, noise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True)
class Case:
    """A model, the arguments of one call, and the layers that make its temporal features: names end so."""

    make: Callable[[], nn.Module]
    arguments: dict[str, Any]
    features: tuple[str, ...]
    number: int

    def model(self) -> nn.Module:
        """In eval mode, without parameters that are all zero: nothing shows behind those."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not bool(parameter.any()):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        return model

    def at(self, time: float) -> dict[str, Any]:
        """The same call at another time."""
        given = self.arguments["timestep"]
        made = torch.full_like(torch.as_tensor(given), time)
        return {**self.arguments, "timestep": made}


def others(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor but the time, by name."""
    leaves = pytree.tree_flatten_with_path(arguments)[0]
    named = {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor) and name != "timestep"}


def with_changed(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Other values in these tensors: random floats, other classes."""

    def changed(path: Any, leaf: Any) -> Any:
        name = ".".join(str(key.key) for key in path)
        if name not in names:
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=torch.Generator().manual_seed(len(name)))
        return (leaf + 3) % 10

    return pytree.tree_map_with_path(changed, arguments)


def _family(name: str, features: tuple[str, ...], number: int) -> Case:
    family = FAMILIES[name]
    arguments = {k: v for k, v in family.data(times=(600.0,))[0].items() if v is not None}
    return Case(family.make, arguments, features, number)


def _unet(**config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(**{**UNET, **config})

    return make


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = {
        **UNET,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    return UNet2DConditionModel(**config)


def _pixart(additional: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=48,
            sample_size=8,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=additional,
        )

    return make


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def _unet3d() -> nn.Module:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )


_LATENT, _TEXT = noise(2, 4, 8, 8), noise(2, 5, 16, seed=1)
_TIME = torch.tensor(600.0)
_PIXART = {"hidden_states": _LATENT, "timestep": _TIME.expand(2), "encoder_hidden_states": _TEXT}
_CLASSES = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([600]), "class_labels": torch.tensor([1, 4])}

CASES = {
    "unet": _family("unet", ("time_emb_proj",), 8),
    "unet scale and shift": Case(
        _unet(resnet_time_scale_shift="scale_shift"),
        {"sample": noise(2, 3, 8, 8), "timestep": 600},
        ("time_emb_proj",),
        8,
    ),
    "unet with classes": Case(_unet(num_class_embeds=10), _CLASSES, ("time_embedding.linear_2",), 1),
    "stable diffusion": _family("unet_condition", ("time_emb_proj",), 8),
    "sdxl": Case(
        _sdxl,
        {
            "sample": _LATENT,
            "timestep": _TIME,
            "encoder_hidden_states": _TEXT,
            "added_cond_kwargs": {"text_embeds": noise(2, 12), "time_ids": noise(2, 6, seed=1)},
        },
        ("time_embedding.linear_2",),
        1,
    ),
    "dit": _family("dit", ("timestep_embedder.linear_2",), 2),
    # the projected sinusoid of the time, and its six (embedded: one) modulations of all blocks
    "pixart": Case(_pixart(False), _PIXART, ("adaln_single.emb.timestep_embedder.linear_2", "adaln_single.linear"), 2),
    "pixart with sizes": Case(
        _pixart(True),
        {**_PIXART, "added_cond_kwargs": {"resolution": noise(2, 2), "aspect_ratio": noise(2, 1)}},
        ("adaln_single.emb.timestep_embedder.linear_2",),
        1,
    ),
    "sd3": _family("sd3", ("timestep_embedder.linear_2",), 1),
    "flux": _family("flux", ("timestep_embedder.linear_2",), 1),
    "flux with guidance": _family("flux_guidance", ("timestep_embedder.linear_2",), 1),
    "cogvideox": _family("cogvideox", ("norm1.linear", "norm2.linear", "norm_out.linear"), 5),
    "wan": Case(
        _wan,
        {"hidden_states": noise(2, 4, 2, 8, 8), "timestep": _TIME.expand(2), "encoder_hidden_states": _TEXT},
        ("time_embedder.linear_2", "time_proj"),
        2,
    ),
    # every feature is repeated for the frames before the heads
    "unet 3d": Case(
        _unet3d,
        {"sample": noise(2, 4, 3, 8, 8), "timestep": _TIME, "encoder_hidden_states": _TEXT},
        ("time_emb_proj",),
        8,
    ),
}
