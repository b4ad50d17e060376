"""What an operator does besides computing: hand values to Python, draw random numbers, write in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["ReadingMethods", "is_random", "reads_values", "written_operands"]

#: Operators, and methods that are none, that hand values of a tensor to Python.
_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
_READING_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def reads_values(func: Any) -> bool:
    """Whether an operator hands values of its operands to Python, be it as the shape of its result."""
    return func._schema.name in _READS or torch.Tag.dynamic_output_shape in func.tags


class ReadingMethods(TorchFunctionMode):
    """Tells of tensors whose values are handed to Python by methods that are no operators."""

    def __init__(self, tell: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._tell(args[0])
        return func(*args, **(kwargs or {}))


def is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator draws random numbers: an attention draws none without dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


def written_operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The operands that an operator changes in place."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
