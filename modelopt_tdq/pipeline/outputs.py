"""From the flat outputs of a graph to what the denoiser returned."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.outputs import path_of

__all__ = ["assembled", "output_class"]


def output_class(denoiser: type[nn.Module]) -> type[Any]:
    """The class of a denoiser's outputs, from the annotation of its forward."""
    from diffusers.utils.outputs import BaseOutput

    hints = typing.get_type_hints(denoiser.forward).get("return")
    for kind in typing.get_args(hints) or (hints,):
        if inspect.isclass(kind) and issubclass(kind, BaseOutput):
            return kind
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput


def assembled(kind: type[Any], tensors: Mapping[str, Tensor], return_dict: bool) -> Any:
    """What a denoiser returns, from the outputs of its graph.

    Args:
        kind: The class of its outputs.
        tensors: By name, in the graph's order; names are those of
            :func:`~modelopt_tdq.export.outputs.flatten_outputs`.
        return_dict: Whether it returns ``kind``, or the fields of that as a tuple.

    Returns:
        With tensors by field (or its number) and place, every field as it was, sequences as lists, None where the
        graph has nothing. With other names, the first fields in order.

    Raises:
        TdqError: ``kind`` has no such fields.
    """
    fields = [field.name for field in dataclasses.fields(kind)]
    tree = _tree(tensors)
    if tree.keys() <= set(fields):
        values = [tree.get(name) for name in fields]
    elif tree.keys() <= {str(number) for number in range(len(fields))}:
        values = [tree.get(str(number)) for number in range(len(fields))]
    elif len(tensors) <= len(fields):
        values = list(tensors.values())
    else:
        raise TdqError(
            "engine",
            list(tensors),
            f"these outputs cannot be told apart: {kind.__name__} has the fields {', '.join(fields)}",
            "Export the denoiser again: its outputs then have names",
        )
    return kind(*values) if return_dict else tuple(values)


def _tree(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """By field, then by place."""
    root: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = path_of(name)
        node = root
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = tensor
    return {name: _sequences(value) for name, value in root.items()}


def _sequences(value: Any) -> Any:
    """A mapping from 0, 1, ... as a list, with None where a number is missing."""
    if not isinstance(value, dict):
        return value
    inner = {name: _sequences(part) for name, part in value.items()}
    if not all(name.isdecimal() for name in inner):
        return inner
    return [inner.get(str(number)) for number in range(max(map(int, inner)) + 1)]
