"""The arguments of a call of a model or layer, and what it returns.

What people pass to denoisers is nested in every way: a ControlNet's residuals are a tuple, other conditions come in
lists inside mappings, or in dataclasses. :func:`walk` is the one definition of that nesting and of the names in it;
recording, replay, export, the search for temporal features and a swapped denoiser all use it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError

__all__ = [
    "cloned",
    "first_output",
    "layer_input",
    "layout",
    "named_arguments",
    "plain_leaves",
    "tensor_leaves",
    "walk",
]


def walk(value: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """``function`` of every leaf of nested data, in the same nesting.

    Args:
        value: Mappings, lists, tuples (named ones too) and dataclasses, in one another; anything else is a leaf.
        function: Of the leaf's name and the leaf. A name joins keys, positions and fields with dots:
            ``added_cond_kwargs.text_embeds``, ``down_block_additional_residuals.0``.
        name: Of ``value`` itself.

    Returns:
        New containers of the same kinds; containers of kinds that cannot be made anew become a dict.
    """

    def inner(key: Any, item: Any) -> Any:
        return walk(item, function, f"{name}.{key}" if name else str(key))

    if isinstance(value, Mapping):
        made = {key: inner(key, item) for key, item in value.items()}
        return made if type(value) is dict else _of_the_same_kind(value, made)
    if isinstance(value, (list, tuple)):
        items = [inner(position, item) for position, item in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{key: inner(key, item) for key, item in fields.items()})
    return function(name, value)


def _of_the_same_kind(value: Mapping[Any, Any], made: dict[Any, Any]) -> Mapping[Any, Any]:
    """Outputs of diffusers take their items by name, other mappings as one; where neither works, a dict does."""
    make: Any = type(value)
    by_name = dataclasses.is_dataclass(value)
    try:
        found: Mapping[Any, Any] = make(**made) if by_name else make(made)
    except TypeError:
        return made
    return found


def tensor_leaves(value: Any) -> dict[str, Tensor]:
    """Every tensor in nested data, by its name; NumPy arrays as tensors that share their memory."""
    found: dict[str, Tensor] = {}

    def keep(name: str, leaf: Any) -> None:
        if isinstance(leaf, (Tensor, np.ndarray)):
            found[name] = torch.as_tensor(leaf)

    walk(value, keep)
    return found


def plain_leaves(value: Any) -> dict[str, Any]:
    """Everything in nested data that is neither a tensor nor None, by its name."""
    found: dict[str, Any] = {}

    def keep(name: str, leaf: Any) -> None:
        if leaf is not None and not isinstance(leaf, (Tensor, np.ndarray)):
            found[name] = leaf

    walk(value, keep)
    return found


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
    """The input of a layer: the first tensor among the arguments of its call, by position or by keyword.

    Raises:
        TdqError: There is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TdqError("model", None, "a layer was called without a tensor", "Leave it out with a quant_cfg rule")


def cloned(value: Any) -> Any:
    """A copy of nested data whose tensors nobody else can change."""
    return walk(value, lambda name, leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


def layout(value: Any) -> Hashable:
    """What samples of one batch have in common: the names, the shapes and dtypes, all that is no tensor."""
    found: list[tuple[str, Any]] = []

    def keep(name: str, leaf: Any) -> None:
        found.append((name, (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)))

    walk(value, keep)
    return tuple(found)
