"""Sizes that an export leaves open: the batch, and axes of inputs that the caller names, such as height and width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.inputs import Inputs

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BATCH", "OpenSizes", "open_sizes"]

#: Name of the open batch.
BATCH = "batch"


@dataclass(frozen=True)
class OpenSizes:
    """What is open.

    Attributes:
        names: By input: axis to the name of its size.
        asked: The argument that asked for it, and its value, for error messages.
    """

    names: Mapping[str, Mapping[int, str]]
    asked: tuple[str, Any]

    def for_torch(self, inputs: Inputs) -> tuple[Any, ...] | None:
        """``dynamic_shapes`` of ``torch.export.export``, for a list of inputs as the only argument."""
        if not self.names:
            return None
        # DYNAMIC finds the range by itself; diffusers' upsamplers, for one, branch on a batch of 64
        return (tuple(dict.fromkeys(self.names.get(n, ()), torch.export.Dim.DYNAMIC) or None for n in inputs.names),)

    def rename(self, model: ir.Model) -> None:
        """Call each open size by its name everywhere, instead of torch's "s12"."""
        ir = require("onnx_ir", "onnx")
        known: dict[str, str] = {}
        for value in model.graph.inputs:
            for axis, name in self.names.get(str(value.name), {}).items():
                size = None if value.shape is None else value.shape[axis]
                if isinstance(size, ir.SymbolicDim) and size.value:
                    known.setdefault(size.value, name)
        if not known:
            return
        pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in known))
        for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
            if value.shape is not None:
                sizes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
                renamed = [pattern.sub(lambda m: known[m[0]], s) if isinstance(s, str) else s for s in sizes]
                value.shape = ir.Shape(renamed)


def open_sizes(
    inputs: Inputs, timestep: str | None, dynamic_batch: bool, dynamic_axes: Mapping[str, Mapping[int, str]] | None
) -> OpenSizes:
    """Check and join the two arguments of an export.

    Raises:
        TdqError: There is no such input or axis, a name is no identifier, or a size in the sample inputs is 1, which
            cannot be told from 'any'.
    """
    names: dict[str, dict[int, str]] = {}
    if dynamic_batch:
        batch = _batch(inputs, timestep)
        for name, tensor in zip(inputs.names, inputs.tensors, strict=True):
            if tensor.dim() and tensor.shape[0] == batch:
                names[name] = {0: BATCH}
    for name, axes in (dynamic_axes or {}).items():
        if name not in inputs.names:
            raise TdqError("dynamic_axes", name, "no such input", f"Use some of {', '.join(inputs.names)}")
        tensor = inputs.tensors[inputs.names.index(name)]
        for axis, size in axes.items():
            _check_axis(name, tensor, axis, size)
            names.setdefault(name, {}).setdefault(axis % tensor.dim(), size)
    asked = ("dynamic_axes", {n: dict(a) for n, a in dynamic_axes.items()}) if dynamic_axes else ("dynamic_batch", True)
    return OpenSizes(names, asked)


def _check_axis(name: str, tensor: torch.Tensor, axis: Any, size: Any) -> None:
    if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
        raise TdqError("dynamic_axes", {name: axis}, f"an input of shape {tuple(tensor.shape)}", "Name one of its axes")
    if not isinstance(size, str) or not size.isidentifier():
        raise TdqError("dynamic_axes", size, "not a name", "Use one such as 'height'")
    if tensor.shape[axis] < 2:
        raise TdqError(
            "sample_inputs",
            {name: tuple(tensor.shape)},
            f"the size of axis {axis} is {tensor.shape[axis]}, and an export cannot tell that from 'any'",
            "Pass a sample input with a size of 2 or more there",
        )


def _batch(inputs: Inputs, timestep: str | None) -> int:
    data = [t for n, t in zip(inputs.names, inputs.tensors, strict=True) if n != timestep and t.dim() > 0]
    batch = data[0].shape[0] if data else 1
    if batch < 2:
        raise TdqError(
            "sample_inputs",
            inputs.names,
            f"the batch of `{inputs.names[0]}` is {batch}, and an export with dynamic_batch cannot tell 1 from 'any'",
            "Pass sample inputs with a batch of 2 or more",
        )
    return batch
