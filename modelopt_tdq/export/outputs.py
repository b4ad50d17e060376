"""The outputs of a model, as outputs of a graph: tensors with names that say where they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["OUTPUT", "flatten_outputs", "path_of"]

#: The only output of a model, and the first of several that have no names of their own.
OUTPUT = "output"

_PREFIX = f"{OUTPUT}."


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(index)))


def flatten_outputs(value: Any, taken: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a model's output by name, in order.

    Args:
        value: What the model returned: a tensor, or sequences and mappings of them, in any nesting.
        taken: Names that the graph's outputs cannot have: those of its inputs.

    Returns:
        A single tensor is "output"; those of a plain sequence are "output", "output_1", "output_2", ... In a mapping,
        such as diffusers' output classes, a tensor has the name of its field, with the places inside of it:
        "mid_block_res_sample", "down_block_res_samples.0", ...; all with "output." in front if one is taken. So are
        the places in a sequence that holds further ones: "output.0.0", "output.0.1", "output.1".
    """
    leaves = list(_leaves(value))
    nested = any(len(path) > 1 for path, _ in leaves)
    if not nested and (len(leaves) <= 1 or not isinstance(value, Mapping)):
        return {f"{OUTPUT}_{i}" if i else OUTPUT: tensor for i, (_, tensor) in enumerate(leaves)}
    named = {".".join(path): tensor for path, tensor in leaves}
    if not isinstance(value, Mapping) or named.keys() & set(taken):
        return {f"{_PREFIX}{name}": tensor for name, tensor in named.items()}
    return named


def path_of(name: str) -> list[str]:
    """Where the tensor with a name from :func:`flatten_outputs` was: its field, and the places inside of that."""
    return name.removeprefix(_PREFIX).split(".")
