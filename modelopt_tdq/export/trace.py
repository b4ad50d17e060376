"""From a prepared model to a marker graph, by torch's own exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.installed import outdated
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.complex_numbers import in_real_numbers
from modelopt_tdq.export.exact_constants import keep_constants
from modelopt_tdq.export.inputs import Inputs
from modelopt_tdq.export.markers import Marker, without_markers
from modelopt_tdq.export.open_sizes import OpenSizes
from modelopt_tdq.export.outputs import flatten_outputs

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "trace"]

#: The last opset that no ONNX Runtime refuses after its own optimizations, see :mod:`modelopt_tdq.export.portable`.
#: From 19 on there are FP8 tensors, and QuantizeLinear with a scale that is computed.
OPSET = 20

#: The first one whose convolutions take bfloat16.
OPSET_BFLOAT16 = 22


class _Positional(nn.Module):
    """The model with tensors in and tensors out, which is what a graph has."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(tensors).values())

    def outputs(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """By name."""
        return flatten_outputs(self.model(**self.inputs.arguments(tensors)), self.inputs.names)


def _opset(model: nn.Module, inputs: Inputs) -> int:
    tensors = [*model.parameters(), *model.buffers(), *inputs.tensors]
    return OPSET_BFLOAT16 if any(tensor.dtype == torch.bfloat16 for tensor in tensors) else OPSET


def _run(module: _Positional, inputs: Inputs) -> list[str]:
    """Names of the outputs."""
    try:
        outputs = list(module.outputs(tuple(inputs.tensors)))
    except TdqError:
        raise
    except Exception as error:
        raise TdqError(
            "sample_inputs", inputs.names, f"the model does not run on them ({error!r})", "Pass the inputs of one call"
        ) from error
    if not outputs:
        raise TdqError(
            "model",
            type(module.model).__name__,
            "its output holds no tensor",
            "Return tensors; if it does with return_dict=False only, as several ControlNets in one do, add that to "
            "the sample inputs",
        )
    return outputs


def trace(model: nn.Module, inputs: Inputs, sizes: OpenSizes) -> tuple[ir.Model, dict[str, list[tuple[int, ...]]]]:
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
        dynamic = sizes.for_torch(inputs)
        try:
            program = _program(module, inputs, dynamic)
        except Exception as error:
            if dynamic is not None:
                field, value = sizes.asked
                raise TdqError(
                    field,
                    value,
                    f"{type(model).__name__} cannot be exported with it: {_first_line(error)}",
                    f"Export without {field}, at the sizes that will be used",
                ) from error
            raise _cannot_export(model, error, None, lambda: _plain_fails(model, inputs)) from error
        try:
            with _quiet():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=_opset(model, inputs),
                    input_names=inputs.names,
                    output_names=outputs,
                    optimize=False,
                    verbose=False,
                )
                if exported is not None:
                    keep_constants(exported.model)
                    exported.optimize()
        except Exception as error:
            raise _cannot_export(model, error, program, lambda: _plain_fails(model, inputs)) from error
    if exported is None:
        raise TdqError("model", type(model).__name__, "torch.onnx.export returned nothing", "Report this")
    graph: ir.Model = exported.model
    _drop_idle_squeezes(graph)
    sizes.rename(graph)
    for value in list(graph.graph.initializers.values()):
        if value.name and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
    return graph, shapes


def _program(module: _Positional, inputs: Inputs, dynamic: Any = None) -> Any:
    """What torch.export makes of it, in real numbers."""
    tensors = tuple(inputs.tensors)
    program = torch.export.export(module, tensors, dynamic_shapes=dynamic, strict=False)
    return in_real_numbers(program, tensors, dynamic)


def _plain_fails(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model cannot be exported without markers either."""
    with without_markers(model):
        try:
            program = _program(_Positional(model, inputs).eval(), inputs)
            with _quiet():
                torch.onnx.export(program, dynamo=True, opset_version=_opset(model, inputs), verbose=False)
        except Exception:  # whatever it is: the question is whether it works
            return True
    return False


def _drop_idle_squeezes(model: ir.Model) -> None:
    """Remove every Squeeze of a dimension that is not 1: torch leaves such a one alone, ONNX refuses it."""
    convenience = require("onnx_ir", "onnx").convenience
    for node in [n for n in model.graph if n.op_type == "Squeeze" and len(n.inputs) == 2]:
        value, axes = node.inputs
        if value is None or value.shape is None or axes is None or axes.const_value is None:
            continue
        sizes = [value.shape[int(axis)] for axis in axes.const_value.numpy().reshape(-1)]
        if sizes and all(isinstance(size, int) and size != 1 for size in sizes):
            convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that torchvision is not installed and that torch uses old parts of torch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _failed_operator(text: str, program: Any) -> tuple[str, str]:
    """The operator that an error of the exporter is about, and the path of its layer; "" for what is not known."""
    found = re.search(r"OpOverload\(op='([\w.:]+)'(?:, overload='(\w+)')?\)", text)
    if found is None:
        return "", ""
    operator, overload = found.group(1).replace("::", "."), found.group(2)
    nodes = [] if program is None else [node for node in program.graph.nodes if node.op == "call_function"]
    targets = {node: str(node.target).split(".") for node in nodes}
    wanted = [*operator.split("."), *([overload] if overload else [])]
    exact = [node for node, target in targets.items() if target[: len(wanted)] == wanted]
    same = [node for node, target in targets.items() if target[:2] == wanted[:2]]
    # what torch reports may be the part of a decomposition: prims.zeta of aten.special_zeta
    whole = [node for node, target in targets.items() if len(target) > 1 and target[1].endswith(f"_{wanted[1]}")]
    for node in [*exact, *same, *whole][:1]:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]).replace("L['self'].", "").removeprefix("model.") for entry in stack.values()]
        return str(node.target), next((path for path in reversed(paths) if path), "")
    return operator, ""


def _cannot_export(model: nn.Module, error: BaseException, program: Any, plain_fails: Callable[[], bool]) -> TdqError:
    """Name the operator and where in the model it is, as far as torch tells; and whether quantization is to blame.

    Args:
        model: With markers.
        error: Of the exporter.
        program: What torch.export made; None if it failed.
        plain_fails: Whether the model cannot be exported without any quantizer either.
    """
    cause, text = error, str(error)
    while cause.__cause__ is not None:
        cause = cause.__cause__
        text += f"\n{cause}"
    operator, path = _failed_operator(text, program)
    what = f"operator {operator} in '{path or type(model).__name__}'" if operator else "the model"
    problem = f"{what} cannot be exported to ONNX: {_first_line(cause)}"
    old = outdated("onnx")
    if old:
        cure = f"Install versions that this package takes: {', '.join(old)}"
    elif plain_fails():
        problem += "; nor can the model in full precision, so quantization has nothing to do with it"
        cure = "Replace the operator in the model, or try another version of torch and onnxscript"
    else:
        rule = f"{{'quantizer_name': '{path or '<layer>'}*', 'enable': False}}"
        cure = f"In full precision the model can be exported: leave the layer out with the quant_cfg rule {rule}"
    return TdqError("model", type(model).__name__, problem, cure)
