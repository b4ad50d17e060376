"""A time for each token or frame of a sample: where these are in what a layer reads, as far as its shape tells.

Rows of a matrix product do not mix: with times [B, N], a linear layer that reads [B, N, C] has a scale [B, N, 1], which
is constant along the channels that it adds over. The same holds for frames that are folded into the batch, and for
convolutions whose kernel holds one frame. Everything else adds over tokens or frames (products of attention, kernels of
several frames), or reads other tokens (of a text); it has one value for all of them, if that is the same at all their
times, and none otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.select import LAYERS, PRODUCTS, trailing_dimensions

__all__ = [
    "Layout",
    "Reader",
    "by_token",
    "cannot_be_matched",
    "find_layout",
    "one_of_tokens",
    "readers",
    "spread",
    "tokens_of_a_frame",
]

#: Sides of the square patches of a frame that become a token.
_PATCHES = (1, 2, 4)


class Reader(NamedTuple):
    """What matters of the layer that reads or gives an activation.

    Attributes:
        trailing: Dimensions of the activation behind that of the channels.
        axis: Dimension beside the batch whose places the layer does not mix: 1 of a linear layer, 2 of a convolution
            whose kernel holds one frame (3-D) or one token (1-D); 0 if there is none.
    """

    trailing: int
    axis: int


class Layout(NamedTuple):
    """Where the times [B, N] are in an activation.

    Attributes:
        axis: Dimension of the tokens; 0: they are folded into the batch, N for each sample.
        repeats: Tokens of each time, next to one another.
    """

    axis: int
    repeats: int = 1


def readers(model: nn.Module) -> dict[str, Reader]:
    """Of the input and the output of each linear layer and convolution, by the names of their quantizers."""
    found: dict[str, Reader] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        reader = Reader(trailing_dimensions(layer), _axis(layer))
        for key in ("input_quantizer", "output_quantizer"):
            if key in layer._modules:
                found[f"{name}.{key}" if name else key] = reader
    return found


def _axis(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return 1
    if not isinstance(layer, PRODUCTS) or isinstance(layer, nn.Conv2d):
        return 0
    kernel, stride, padding = (getattr(layer, name) for name in ("kernel_size", "stride", "padding"))
    alone = kernel[0] == 1 and stride[0] == 1 and (isinstance(padding, str) or padding[0] == 0)
    return 2 if alone else 0


def tokens_of_a_frame(tensors: Collection[Tensor], frames: int) -> frozenset[int]:
    """How many tokens a frame may have: the patches of the videos [B, C, F, H, W] or [B, F, C, H, W] of a call."""
    sizes = {tuple(x.shape[3:]) for x in tensors if x.dim() == 5 and frames in x.shape[1:3]}
    return frozenset(h * w // (p * p) for h, w in sizes for p in _PATCHES if not h % p and not w % p)


def find_layout(
    times: Sequence[int], shape: Sequence[int], reader: Reader | None, per_frame: Collection[int] = ()
) -> Layout | None:
    """Where the times are in an activation; None if the shape does not tell, or the layer mixes what has several.

    Args:
        times: [B, N], their shape.
        shape: Of the activation.
        reader: Its layer; None: no linear layer or convolution.
        per_frame: How many tokens a frame may have, if times are those of frames: [B, N * k, C] holds k of each.
    """
    if reader is None or len(shape) < 2 + reader.trailing:
        return None
    (samples, tokens), axis = times, reader.axis
    found = [Layout(0)] if shape[0] == samples * tokens else []
    if axis and axis != len(shape) - 1 - reader.trailing and (samples == 1 or shape[0] == samples):
        repeats = shape[axis] // tokens
        sequence = axis == 1 and len(shape) == 3 and repeats in per_frame
        if shape[axis] == repeats * tokens and (repeats == 1 or sequence):
            found.append(Layout(axis, repeats))
    return found[0] if len(found) == 1 else None


def spread(values: Tensor, layout: Layout, rank: int, channel: int | None = None) -> Tensor:
    """Values of each time, shaped to go with an activation.

    Args:
        values: [B, N], or [B, N, C] with one for each channel.
        layout: Of the activation.
        rank: Its dimensions.
        channel: That of its channels, for [B, N, C].
    """
    values = values.repeat_interleave(layout.repeats, 1)
    shape = [1] * rank
    if layout.axis == 0:
        values = values.flatten(0, 1)
    else:
        shape[layout.axis] = values.shape[1]
    shape[0] = values.shape[0]
    if channel is not None:
        shape[channel] = values.shape[-1]
        if 0 < channel < layout.axis:
            values = values.transpose(1, 2)
    return values.reshape(shape)


def by_token(x: Tensor, layout: Layout, times: Sequence[int]) -> Tensor:
    """[B * N, ...] the parts of an activation that have the times [B, N]."""
    samples, tokens = times
    if layout.axis:
        x = x.movedim(layout.axis, 0)  # with one row of times, the batch may be larger
        x = x.reshape(tokens, layout.repeats, samples, -1).movedim(2, 0)
    return x.reshape(samples * tokens, -1)


def one_of_tokens(which: Tensor, values: Tensor, shape: Sequence[int], reader: Reader | None, name: str) -> Tensor:
    """[B] of ``which`` [B, N], where the ``values`` [B, N, ...] are the same at all times of a sample.

    For an activation that cannot be matched with the times.

    Raises:
        TdqError: They are not. (Compiled graphs raise an error of torch.)
    """
    same = (values == values[:, :1]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(same, f"{name}: a sample has several times, which cannot be matched with its activation")
    elif not bool(same):
        raise cannot_be_matched(name, which.shape, shape, reader)
    return which[:, 0]


def cannot_be_matched(name: str, times: Sequence[int], shape: Sequence[int], reader: Reader | None) -> TdqError:
    """Of a quantizer or a correction whose values at the times of a sample differ."""
    if reader is None:
        why = "which no linear layer or convolution reads: products of attention add over tokens"
    elif reader.trailing and not reader.axis:
        why = "whose layer adds over its places, or has them in no order of tokens or frames"
    else:
        why = "whose shape does not tell which token or frame has which time"
    return TdqError(
        "timestep",
        tuple(times),
        f"a sample has several times, one for each of {times[1]} tokens or frames, and {name} takes an activation of "
        f"shape {tuple(shape)}, {why}",
        "Pass the same time for all tokens and frames of a sample; or calibrate so that this one does not depend on "
        'time: with "temporal" patterns that do not match it, "correction": "static", or without it by the quant_cfg '
        f"rule {{'quantizer_name': '{name}', 'enable': False}}",
    )
