"""The arguments of a model, as inputs of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["Inputs", "flatten_inputs"]


@dataclass(frozen=True)
class Inputs:
    """The model's arguments, as graph inputs.

    Attributes:
        names: Of the graph inputs: the arguments' names; ``outer.inner`` for tensors in a nested mapping.
        tensors: Likewise.
        rest: Arguments that are no tensors, by name; they become part of the graph.
    """

    names: list[str]
    tensors: list[Tensor]
    rest: dict[str, Any]

    def arguments(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """Keyword arguments of one call of the model."""
        arguments = {name: dict(v) if isinstance(v, Mapping) else v for name, v in self.rest.items()}
        for name, tensor in zip(self.names, tensors, strict=True):
            outer, _, inner = name.partition(".")
            if inner:
                arguments[outer][inner] = tensor
            else:
                arguments[name] = tensor
        return arguments


def flatten_inputs(sample_inputs: Mapping[str, Any], timestep: str | None) -> Inputs:
    """Tell tensors from constants. A time that is a Python number counts as a tensor [].

    Raises:
        TdqError: ``sample_inputs`` is no mapping, holds no tensor, or lacks the time.
    """
    if not isinstance(sample_inputs, Mapping):
        raise TdqError(
            "sample_inputs",
            type(sample_inputs).__name__,
            "not a mapping from the arguments of the model's forward to values",
            "Pass for example {'sample': x, 'timestep': t}",
        )
    if timestep is not None and sample_inputs.get(timestep) is None:
        raise TdqError(
            "sample_inputs",
            sorted(sample_inputs),
            f"it lacks the time, `{timestep}`, on which the scales depend",
            f"Add '{timestep}'",
        )
    names, tensors, rest = [], [], {}
    for name, value in sample_inputs.items():
        if isinstance(value, (Tensor, np.ndarray)) or (name == timestep and isinstance(value, (int, float))):
            names.append(name)
            tensors.append(torch.as_tensor(value))
        elif isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            rest[name] = {k: v for k, v in value.items() if not isinstance(v, Tensor)}
            for inner, tensor in value.items():
                if isinstance(tensor, Tensor):
                    names.append(f"{name}.{inner}")
                    tensors.append(tensor)
        else:
            rest[name] = value
    if not tensors:
        raise TdqError("sample_inputs", sorted(sample_inputs), "it holds no tensor", "Pass the inputs of one call")
    return Inputs(names, tensors, rest)
