"""What takes the place of a layer's class while its output is looked up.

The layer stays what it is otherwise: its name, its parameters, its quantizers, and its own class among its bases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.call import layer_input
from modelopt_tdq.model.timestep import one_of_all
from modelopt_tdq.temporal_features.lookup import is_row

if TYPE_CHECKING:
    from modelopt_tdq.temporal_features.module import TemporalFeatures

__all__ = ["LookedUp", "Superseded", "output_dtype", "own_output", "swap_in", "swap_out"]


def output_dtype(layer: nn.Module, inputs: Tensor) -> torch.dtype:
    """The type in which a layer would return its output for these inputs."""
    dtype = inputs.dtype
    if not dtype.is_floating_point:
        parameters = (p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point())
        return next(parameters, torch.get_default_dtype())
    products = isinstance(layer, (nn.Linear, _ConvNd))
    device = inputs.device.type
    if products and dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _matched(rows: Tensor, inputs: Tensor) -> Tensor:
    """[T, ...] for T times -> [B, ...] for the batch of ``inputs``: one time for all, or B / T samples per time."""
    times, batch = rows.shape[0], inputs.shape[0]
    if times > 1 and batch % times:
        one = one_of_all(rows)
        rows, times = (rows, times) if one is None else (one, 1)
    if times == 1:
        return rows.expand(batch, *rows.shape[1:]).contiguous()
    if batch % times:
        raise TdqError(
            "timestep",
            times,
            f"{times} times cannot be matched with an input of shape {tuple(inputs.shape)}",
            "Pass one time for the whole batch, or one per sample",
        )
    return rows if times == batch else rows.repeat_interleave(batch // times, 0)


class LookedUp:
    """The output comes from the table, in training too: what is trained is then what is deployed."""

    _tdq_features: TemporalFeatures
    _tdq_what: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[B, ...] in the dtype that the layer returns, B being the batch of its input."""
        features = self._tdq_features
        inputs = layer_input(args, kwargs)
        time = features.time(inputs.device)
        exact = features.outside == "exact"
        if exact and not torch.compiler.is_compiling() and features.covers(time):
            exact = False
        looked_up = _matched(features.look_up(self._tdq_what, time), inputs)
        looked_up = looked_up.to(output_dtype(self, inputs))  # type: ignore[arg-type]
        if not exact:
            return looked_up
        known = _matched(is_row(time, features.timesteps.to(time.device)), inputs)
        own = own_output(self, args, kwargs)
        return torch.where(known.reshape(-1, *(1,) * (own.dim() - 1)), looked_up.to(own.dtype), own)


class Superseded:
    """The output is zeros, which nobody looks at."""

    _tdq_features: TemporalFeatures
    _tdq_what: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[B, ...] in the dtype that the layer returns, B being the batch of its input."""
        inputs = layer_input(args, kwargs)
        dtype = output_dtype(self, inputs)  # type: ignore[arg-type]
        return inputs.new_zeros((inputs.shape[0], *self._tdq_what), dtype=dtype)


def own_output(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the layer computes itself.

    Raises:
        TdqError: Its parameters were dropped.
    """
    if layer._tdq_features.description["freed"]:
        raise TdqError(
            "model",
            type(layer).__name__,
            "the parameters of the layers that are looked up were dropped, so they cannot run",
            "Load the model as it was before free_modules",
        )
    behaviour: Any = LookedUp if isinstance(layer, LookedUp) else Superseded
    output: Tensor = super(behaviour, layer).forward(*args, **kwargs)
    return output


def swap_in(layer: nn.Module, behaviour: type, features: TemporalFeatures, what: Any) -> None:
    """Put ``behaviour`` in front of the layer's class.

    Args:
        layer: Changed in place.
        behaviour: :class:`LookedUp` or :class:`Superseded`.
        features: Of the model.
        what: Index of the feature, or shape of the output per sample.
    """
    kind = type(layer)
    layer.__class__ = type(f"{behaviour.__name__}{kind.__name__}", (behaviour, kind), {"__module__": kind.__module__})
    # past nn.Module, which would make the features a child of every layer, and ModelOpt's own attributes
    layer.__dict__.update(_tdq_features=features, _tdq_what=what)


def swap_out(layer: nn.Module) -> None:
    """Undo :func:`swap_in`; harmless where nothing was done."""
    if isinstance(layer, (LookedUp, Superseded)):
        layer.__class__ = type(layer).__bases__[1]
        for name in ("_tdq_features", "_tdq_what"):
            layer.__dict__.pop(name, None)
