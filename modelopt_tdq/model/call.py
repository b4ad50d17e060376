"""The arguments of a call of a model or layer, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError

__all__ = ["cloned", "first_output", "layer_input", "layout", "named_arguments", "stack", "take"]


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of ``model.forward``, by name."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def first_output(output: Any) -> Tensor:
    """The tensor of a model output: itself, the first of a tuple, the first field of a diffusers output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer: the first tensor among the arguments of its call.

    Raises:
        TdqError: There is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TdqError("model", None, "a layer that is looked up was called without a tensor", "Leave it out")


def take(value: Any, index: int, batch: int) -> Any:
    """Sample ``index`` of a tensor with ``batch`` samples, as a batch of one; anything else as it is."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: take(v, index, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take(v, index, batch) for v in value)
    return value


def cloned(value: Any) -> Any:
    """A copy of nested data whose tensors nobody else can change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: cloned(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cloned(v) for v in value)
    return value


def layout(value: Any) -> Hashable:
    """What samples of one batch have in common: the names, the shapes and dtypes, all that is no tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((k, layout(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(layout(v) for v in value)
    return repr(value)


def stack(values: list[Any]) -> Any:
    """One batch of samples of one layout."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.dim() and first.shape[0] == 1 else first
    if isinstance(first, dict):
        return {k: stack([v[k] for v in values]) for k in first}
    if isinstance(first, (list, tuple)):
        return type(first)(stack(list(items)) for items in zip(*values, strict=True))
    return first
