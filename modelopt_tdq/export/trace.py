"""From a prepared model to a marker graph, by torch's own exporter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.complex_numbers import in_real_numbers, real_inputs
from modelopt_tdq.export.constant_operators import without_constant_operator
from modelopt_tdq.export.exact_constants import keep_constants
from modelopt_tdq.export.failure import ExportError, cannot_export, failed_operator, first_line, quiet
from modelopt_tdq.export.inputs import Inputs, make_constant
from modelopt_tdq.export.known_values import KnownValues
from modelopt_tdq.export.markers import Marker, without_markers
from modelopt_tdq.export.open_sizes import OpenSizes
from modelopt_tdq.export.optimizer import optimize
from modelopt_tdq.export.outputs import flatten_outputs
from modelopt_tdq.export.plain_attention import in_plain_attention
from modelopt_tdq.export.portable import OPSET_BFLOAT16
from modelopt_tdq.export.program import traced
from modelopt_tdq.export.translations import cast_concatenated, translations

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "Traced", "trace"]

#: The last opset that no ONNX Runtime refuses after its own optimizations, see :mod:`modelopt_tdq.export.portable`.
#: From 19 on there are FP8 tensors, and QuantizeLinear with a scale that is computed.
OPSET = 20


#: Largest relative error of a traced model, in full precision: sums in another order.
_SAME = 1e-3


class _Positional(nn.Module):
    """The model with tensors in and tensors out, which is what a graph has."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.known: KnownValues | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.known is None:
            return tuple(self.outputs(tensors).values())
        with self.known.of(dict(zip(self.inputs.names, tensors, strict=True))):
            outputs = tuple(self.outputs(tensors).values())
        return outputs if not self.known.guards else _guarded(outputs, self.known.guards)

    def outputs(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """By name."""
        return flatten_outputs(self.model(**self.inputs.arguments(tensors)), self.inputs.names)


def _guarded(outputs: tuple[Tensor, ...], guards: list[Tensor]) -> tuple[Tensor, ...]:
    """NaN where the model would decide otherwise than it did when it was traced."""
    same = torch.stack(guards).all()
    return tuple(torch.where(same, t, torch.full_like(t, torch.nan)) if t.is_floating_point() else t for t in outputs)


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


@dataclass(frozen=True)
class Traced:
    """What a trace gives.

    Attributes:
        model: The marker graph.
        shapes: Those that each marker saw, by quantizer name.
        constants: Names of the inputs whose values of the sample call are part of the graph, and no inputs of it.
        decisions: Lines of the model's code that decide by the values of other inputs: as in the sample call, or the
            graph gives NaN.
    """

    model: ir.Model
    shapes: dict[str, list[tuple[int, ...]]]
    constants: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()


def trace(model: nn.Module, inputs: Inputs, sizes: OpenSizes, constants: Collection[str] = ()) -> Traced:
    """Export a model made by :func:`~modelopt_tdq.export.markers.with_markers`.

    Args:
        model: With markers.
        inputs: Of the sample call.
        sizes: That stay open.
        constants: Names of inputs whose values become part of the graph. Where torch cannot export the model without,
            so do those of inputs of integers and truth values that its code reads.

    Raises:
        TdqError: The model does not run on the inputs, or holds something that cannot be exported.
    """
    require("onnxscript", "onnx")
    module = _Positional(model, inputs).eval()
    with torch.no_grad():
        outputs = _run(module, inputs)
        shapes = {m.marker_name: list(m.shapes) for m in model.modules() if isinstance(m, Marker)}
        dynamic = sizes.for_torch(inputs)
        try:
            exported, found = _exported(module, inputs, outputs, dynamic, constants)
        except ExportError as failure:
            error = failure.cause
            if dynamic is not None and failure.program is None:
                field, value = sizes.asked
                raise TdqError(
                    field,
                    value,
                    f"{type(model).__name__} cannot be exported with it: {first_line(error)}",
                    f"Export without {field}, at the sizes that will be used",
                ) from error
            raise cannot_export(model, failure, lambda: _plain_fails(model, inputs, constants)) from error
    graph: ir.Model = exported.model
    _drop_idle_squeezes(graph)
    sizes.rename(graph)
    for value in list(graph.graph.initializers.values()):
        if value.name and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
    guarded = {} if module.known is None else module.known.guarded
    return Traced(graph, shapes, found, tuple(line for line, names in guarded.items() if names - set(found)))


def _exported(
    module: _Positional, inputs: Inputs, outputs: list[str] | None, dynamic: Any, constants: Collection[str]
) -> tuple[Any, tuple[str, ...]]:
    """The ONNX program, and the inputs that are constants in it.

    Raises:
        ExportError: There is none.
    """
    values = {name: tensor for name, tensor in zip(inputs.names, inputs.tensors, strict=True) if name in constants}
    module.known = KnownValues(values) if values else None
    try:
        return _once(module, inputs, outputs, dynamic, constants)
    except ExportError as failure:
        if failure.program is not None and not _has_unknown_sizes(failure.program):
            raise
    sizes = dynamic[0] if dynamic is not None else [None] * len(inputs.names)
    fixed = zip(inputs.names, inputs.tensors, sizes, strict=True)
    values |= {n: t for n, t, size in fixed if not size and n != inputs.timestep and not t.is_complex()}
    module.known = KnownValues(values, {n for n, t in values.items() if t.is_floating_point()} - set(constants))
    found = _once(module, inputs, outputs, dynamic, constants)
    _prove(module, inputs)
    return found


def _prove(module: _Positional, inputs: Inputs) -> None:
    """What was read beside a trace is in it as the model has it, in full precision: it computes the same.

    Raises:
        TdqError: It does not.
    """
    with without_markers(module.model):
        program = _program(module, inputs)
        found = program.module()(*real_inputs(inputs.tensors))
        known, module.known = module.known, None
        expected = module(*inputs.tensors)
        module.known = known
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).square().sum()
        if not bool(error <= _SAME**2 * other.double().square().sum()):
            raise TdqError(
                "model",
                type(module.model).__name__,
                "torch's exporter makes something else of it, though it reads only what is known",
                "Report this",
            )


def _once(
    module: _Positional, inputs: Inputs, outputs: list[str] | None, dynamic: Any, constants: Collection[str]
) -> tuple[Any, tuple[str, ...]]:
    try:
        program = _program(module, inputs, dynamic)
    except Exception as error:
        raise ExportError(error, None, _reads(module)) from error
    try:
        exported = _onnx(program, module, inputs, outputs)
    except Exception as error:
        operator, _ = failed_operator(error, program)
        computed = without_constant_operator(program, operator, real_inputs(inputs.tensors), dynamic)
        if computed is None:
            raise ExportError(error, program, _reads(module)) from error
        try:
            exported = _onnx(computed, module, inputs, outputs)
        except Exception as second:
            raise ExportError(second, computed, _reads(module)) from second
    decided = {*constants, *(module.known.decided if module.known is not None else ())}
    found = tuple(name for name in inputs.names if name in decided)
    values = dict(zip(inputs.names, real_inputs(inputs.tensors), strict=True))
    make_constant(exported.model, {name: values[name] for name in found})
    cast_concatenated(exported.model)
    keep_constants(exported.model)
    optimize(exported)
    return exported, found


def _reads(module: _Positional) -> list[str]:
    return [] if module.known is None else list(module.known.unknown)


def _onnx(program: Any, module: _Positional, inputs: Inputs, outputs: list[str] | None) -> Any:
    """The program in ONNX operators, as torch translates it."""
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_opset(module.model, inputs),
            input_names=inputs.names,
            output_names=outputs,
            custom_translation_table=translations(),
            optimize=False,
            verbose=False,
        )
    if exported is None:
        raise TdqError("model", type(module.model).__name__, "torch.onnx.export returned nothing", "Report this")
    return exported


def _program(module: _Positional, inputs: Inputs, dynamic: Any = None) -> Any:
    """What torch.export makes of it, in real numbers and plain attention."""
    tensors = tuple(inputs.tensors)
    program = traced(module, tensors, dynamic)
    return in_real_numbers(in_plain_attention(program, tensors, dynamic), tensors, dynamic)


def _plain_fails(model: nn.Module, inputs: Inputs, constants: Collection[str]) -> bool:
    """Whether the model cannot be exported without markers either."""
    with without_markers(model):
        try:
            _exported(_Positional(model, inputs).eval(), inputs, None, None, constants)
        except Exception:  # whatever it is: the question is whether it works
            return True
    return False


def _has_unknown_sizes(program: Any) -> bool:
    """Whether sizes in it, or what is computed from them, depend on numbers."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    leaves = (leaf for value in values for leaf in tree_leaves(value))
    return any(bool(free_unbacked_symbols(leaf)) for leaf in leaves if isinstance(leaf, (Tensor, torch.SymInt)))


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
