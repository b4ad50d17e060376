"""From a prepared model to a marker graph, by torch's own exporter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.markers import Marker

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "Inputs", "flatten_inputs", "trace"]

#: The first opset with FP8 and 4-bit tensors, and QuantizeLinear with a scale that is computed.
OPSET = 21


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


class _Positional(nn.Module):
    """The model with tensors in and tensors out, which is what a graph has."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = _tensors(self.model(**self.inputs.arguments(tensors)))
        return tuple(outputs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


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


def _run(module: _Positional, inputs: Inputs) -> list[Tensor]:
    try:
        outputs = list(module(*inputs.tensors))
    except TdqError:
        raise
    except Exception as error:
        raise TdqError(
            "sample_inputs", inputs.names, f"the model does not run on them ({error!r})", "Pass the inputs of one call"
        ) from error
    if not outputs:
        raise TdqError("model", type(module.model).__name__, "its output holds no tensor", "Return tensors")
    return outputs


def trace(
    model: nn.Module, inputs: Inputs, timestep: str | None, dynamic_batch: bool
) -> tuple[ir.Model, dict[str, list[tuple[int, ...]]]]:
    """Export a model made by :func:`~modelopt_tdq.export.markers.with_markers`.

    Returns:
        The marker graph; and the shapes that each marker saw, by quantizer name.

    Raises:
        TdqError: The model does not run on the inputs, or holds an operator that cannot be exported.
    """
    require("onnxscript", "onnx")
    module = _Positional(model, inputs).eval()
    with torch.no_grad():
        outputs = _run(module, inputs)
        shapes = {m.marker_name: list(m.shapes) for m in model.modules() if isinstance(m, Marker)}
        dynamic = None
        if dynamic_batch:
            batch = _batch(inputs, timestep)
            # DYNAMIC finds the range by itself; diffusers' upsamplers, for one, branch on a batch of 64
            batched = [bool(t.dim()) and t.shape[0] == batch for t in inputs.tensors]
            dynamic = (tuple({0: torch.export.Dim.DYNAMIC} if b else None for b in batched),)
        try:
            program = torch.export.export(module, tuple(inputs.tensors), dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            raise _cannot_export(model, error, None) from error
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs.names,
                output_names=["output"] + [f"output_{i}" for i in range(1, len(outputs))],
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            raise _cannot_export(model, error, program) from error
    if exported is None:
        raise TdqError("model", type(model).__name__, "torch.onnx.export returned nothing", "Report this")
    graph: ir.Model = exported.model
    if dynamic is not None:
        _name_batch(graph)
    for value in list(graph.graph.initializers.values()):
        if value.name and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
    return graph, shapes


def _name_batch(model: ir.Model) -> None:
    """Call the open dimension "batch" everywhere, instead of torch's "s12"."""
    ir = require("onnx_ir", "onnx")
    symbols = {d.value for v in model.graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    for value in values:
        if symbols and value.shape is not None:
            sizes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
            value.shape = ir.Shape([pattern.sub("batch", s) if isinstance(s, str) else s for s in sizes])


def _cannot_export(model: nn.Module, error: BaseException, program: Any) -> TdqError:
    """Name the operator and where in the model it is, as far as torch tells."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(messages)
    found = re.search(r"OpOverload\(op='([\w.:]+)'(?:, overload='(\w+)')?\)", text)
    operator = found.group(1).replace("::", ".") if found else ""
    path = ""
    if operator and program is not None:
        for node in program.graph.nodes:
            # the name that torch reports may be that of a decomposition, prims.x for aten.special_x
            if node.op == "call_function" and operator.rpartition(".")[2] in str(node.target):
                stack = node.meta.get("nn_module_stack") or {}
                paths = [str(entry[0]).replace("L['self'].", "").removeprefix("model.") for entry in stack.values()]
                path = next((p for p in reversed(paths) if p), "")
                operator = str(node.target)
                break
    what = f"operator {operator} in '{path or type(model).__name__}'" if operator else "the model"
    rule = f"{{'quantizer_name': '{path or '<layer>'}*', 'enable': False}}"
    return TdqError(
        "model",
        type(model).__name__,
        f"{what} cannot be exported to ONNX: {messages[-1].splitlines()[0] if messages[-1] else error!r}",
        f"If quantization brings it in, leave the layer out with the quant_cfg rule {rule}; "
        "otherwise replace the operator in the model",
    )
