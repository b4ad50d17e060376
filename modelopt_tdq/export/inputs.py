"""The arguments of a model, as inputs of a graph; and what of them is fixed in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.model.call import plain_leaves, tensor_leaves, walk

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FIXED", "Inputs", "as_real", "fixed_arguments", "fixed_value", "flatten_inputs", "make_constant"]

#: Key of the fixed arguments in the metadata of an ONNX file.
FIXED = "modelopt_tdq.arguments"


@dataclass(frozen=True)
class Inputs:
    """The model's arguments, as graph inputs.

    Attributes:
        names: Of the graph inputs: those of :func:`~modelopt_tdq.model.call.walk`, such as
            ``added_cond_kwargs.text_embeds`` or ``down_block_additional_residuals.0``.
        tensors: Those of the sample call. Complex ones [...] are real graph inputs [..., 2].
        sample: The whole sample call. What in it is no tensor becomes part of the graph.
        timestep: The argument that holds the time; None if no scale depends on it.
    """

    names: list[str]
    tensors: list[Tensor]
    sample: Mapping[str, Any]
    timestep: str | None = None

    def arguments(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """Keyword arguments of one call of the model, nested as the sample call is."""
        own = dict(zip(self.names, tensors, strict=True))
        return {argument: walk(v, own.get, argument) for argument, v in self.sample.items()}

    def fixed(self, constants: Collection[str] = ()) -> str:
        """JSON of what a graph made of this call has in it for good, by name: what is no tensor, and ``constants``."""
        values = {name: tensor for name, tensor in zip(self.names, self.tensors, strict=True) if name in constants}
        return json.dumps({**fixed_arguments(self.sample), **{n: fixed_value(v) for n, v in values.items()}})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def fixed_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What in the arguments of a call is no tensor, by name; without ``return_dict``, which no graph knows.

    Values that JSON does not have are described in words.
    """
    found = plain_leaves({name: value for name, value in arguments.items() if name != "return_dict"})
    return {name: _plain(value) for name, value in found.items()}


def as_real(tensor: Tensor) -> Tensor:
    """As it is in a graph, which has no complex numbers: those [...] are real and imaginary parts [..., 2]."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def fixed_value(tensor: Tensor) -> Any:
    """Of a tensor that is part of a graph: its numbers, as nested lists."""
    return as_real(tensor).tolist()


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
    sample = dict(sample_inputs)
    if timestep is not None and isinstance(sample[timestep], (int, float)):
        sample[timestep] = torch.as_tensor(sample[timestep])
    found = tensor_leaves(sample)
    if not found:
        raise TdqError("sample_inputs", sorted(sample), "it holds no tensor", "Pass the inputs of one call")
    return Inputs(list(found), list(found.values()), sample, timestep)


def make_constant(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Give inputs of a graph these values for good, in place: they are initializers then."""
    ir = require("onnx_ir", "onnx")
    for value in list(model.graph.inputs):
        name = str(value.name)
        if name in tensors:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(tensors[name].detach().cpu(), name=name)
            model.graph.register_initializer(value)
