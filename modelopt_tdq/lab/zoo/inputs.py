"""Recipes for the arguments of a call, and those that follow from an argument's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "DERIVED",
    "TOKENS",
    "Call",
    "Recipe",
    "every_frame",
    "fixed",
    "grid",
    "integers",
    "latent",
    "noise",
    "ones",
    "rotations",
    "share",
]

#: Of a text.
TOKENS = 5

#: Where configs say how wide the embedding of a text is: those of what is projected first come first.
_TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "text_embed_dim",
    "joint_attention_dim",
    "text_dim",
    "in_text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "encoder_hidden_size",
    "text_hidden_dim",
    "dit_text_dim",
    "cross_attention_input_dim",
    "cond_token_dim",
    "cross_attention_dim",
)

_POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2")


@dataclass(frozen=True)
class Call:
    """What the arguments of one call are made from."""

    config: Mapping[str, Any]
    latent: tuple[int, ...]
    batch: int
    #: [batch], float32.
    time: Tensor
    generator: torch.Generator

    def noise(self, *shape: int) -> Tensor:
        """Standard normal [*shape]."""
        return torch.randn(*shape, generator=self.generator)

    def first(self, names: tuple[str, ...]) -> int | None:
        """The first of these numbers that the config has."""
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


Recipe: TypeAlias = Callable[[Call], Any]


def noise(*shape: int) -> Recipe:
    """Standard normal [batch, *shape]."""
    return lambda call: call.noise(call.batch, *shape)


def latent(call: Call) -> Tensor:
    """Standard normal, as many samples of the model's as the batch has."""
    return call.noise(call.batch, *call.latent)


def ones(*shape: int, dtype: torch.dtype = torch.bool) -> Recipe:
    """[batch, *shape]: a mask that hides nothing."""
    return lambda call: torch.ones(call.batch, *shape, dtype=dtype)


def integers(end: int, *shape: int) -> Recipe:
    """Random [batch, *shape] below ``end``."""
    return lambda call: torch.randint(end, (call.batch, *shape), generator=call.generator)


def every_frame(recipe: Recipe, frames: int) -> Recipe:
    """The same for every frame: [batch * frames, ...]."""
    return lambda call: recipe(call).repeat_interleave(frames, 0)


def fixed(*values: float) -> Recipe:
    """[batch, len(values)]: the same row for every sample."""
    return lambda call: torch.tensor([values] * call.batch)


def share(part: float, *shape: int) -> Recipe:
    """This part of the time: [batch], or the same at all places of [batch, *shape]."""
    return lambda call: part * call.time.reshape(-1, *(1,) * len(shape)).expand(call.batch, *shape)


def grid(*sizes: int, axes: int | None = None) -> Tensor:
    """Positions [places, axes] of a grid, its axes at the end, zeros before."""
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes)).reshape(-1, len(sizes))
    axes = len(sizes) if axes is None else axes
    return torch.cat([torch.zeros(len(places), axes - len(sizes)), places], 1)


def _text(call: Call) -> Tensor | None:
    width = call.first(_TEXT_WIDTHS)
    return None if width is None else call.noise(call.batch, TOKENS, width)


def _pooled(call: Call) -> Tensor | None:
    width = call.first(_POOLED_WIDTHS)
    return None if width is None else call.noise(call.batch, width)


def _guidance(call: Call) -> Tensor | None:
    return torch.full((call.batch,), 3.5) if call.config.get("guidance_embeds") else None


def _axes(call: Call) -> int:
    return len(call.config.get("axes_dims_rope", (0, 0, 0)))


def _image_positions(call: Call) -> Tensor:
    side = round(call.latent[0] ** 0.5)
    return grid(side, side, axes=_axes(call))


def _text_positions(call: Call) -> Tensor:
    return torch.zeros(TOKENS, _axes(call))


#: Arguments that every class means the same by, as far as an entry does not say otherwise. None: not for this config.
DERIVED: Mapping[str, Recipe] = {
    "hidden_states": latent,
    "sample": latent,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": ones(TOKENS),
    "encoder_hidden_states_mask": ones(TOKENS),
    "pooled_projections": _pooled,
    "guidance": _guidance,
    "img_ids": _image_positions,
    "txt_ids": _text_positions,
}


def rotations(places: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [places, width] of rotary positions."""
    frequencies = 100.0 ** (-torch.arange(width // 2) / (width // 2)).repeat_interleave(2)
    angles = torch.arange(float(places))[:, None] * frequencies
    return angles.cos(), angles.sin()
