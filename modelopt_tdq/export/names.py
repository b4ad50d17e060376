"""Names of a graph's inputs and outputs: those that the program around the engine addresses.

A graph has the names of the model's own arguments (``added_cond_kwargs.text_embeds``, ``output``). Programs that load
engines have names of their own; NVIDIA's demoDiffusion raises KeyError for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.conventions import PROGRAMS, Convention
from modelopt_tdq.export.open_sizes import BATCH
from modelopt_tdq.export.outputs import OUTPUT
from modelopt_tdq.model.call import tensor_leaves, walk

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "NAMES",
    "ZEROS",
    "Called",
    "Names",
    "as_passed",
    "convention_of",
    "names_of",
    "open_batch",
    "opens_batch",
    "rename",
]

#: Key, in the metadata of an ONNX file, of the mapping from the model's own names to the graph's: JSON.
NAMES = "modelopt_tdq.names"

#: Key of the inputs that a program passes as zeros where a pipeline passes nothing: JSON, their batch axes by name.
ZEROS = "modelopt_tdq.zeros"

#: How the inputs and outputs of a graph are called: "forward", as the model's own; as one of
#: :data:`~modelopt_tdq.export.conventions.PROGRAMS` calls them; or a mapping from the former to others.
Names = str | Mapping[str, str]


@dataclass(frozen=True)
class Called:
    """What the tensors of a graph are to be called.

    Attributes:
        names: New names by the model's own, of those that change.
        axes: Names of open sizes, by the new names.
        order: New names of inputs, of those that have to come first, in this order.
        zeros: Batch axes of the inputs that are zeros where a pipeline passes nothing, by the model's own names.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    zeros: Mapping[str, int] = field(default_factory=dict)


def as_passed(
    names: Names, sample_inputs: Mapping[str, Any], timestep: str | None, config: Any = None
) -> Mapping[str, Any]:
    """The sample inputs in the form in which the program of a preset passes them.

    The time gets its shape, all inputs the dtype of the first but for those that have one of their own, and what the
    program always passes is added, as zeros.

    Args:
        names: See :data:`Names`.
        sample_inputs: Of an export.
        timestep: The argument that holds the time.
        config: Of the model, which knows the shapes of what is added.

    Raises:
        TdqError: There is no such preset; it serves no model with these inputs; or it passes one time for the batch,
            and the samples have several.
    """
    if not isinstance(names, str) or names == "forward" or not isinstance(sample_inputs, Mapping):
        return sample_inputs
    tensors = tensor_leaves(dict(sample_inputs))
    timed = timestep is not None and sample_inputs.get(timestep) is not None
    convention = convention_of(names, {*tensors, str(timestep)} if timed else set(tensors))
    first = next(tensor for name, tensor in tensors.items() if name != timestep)

    def cast(name: str, value: Any) -> Any:
        floats = name != timestep and isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(convention.dtypes.get(name, first.dtype)) if floats else value

    passed = {name: walk(value, cast, name) for name, value in sample_inputs.items()}
    for name, shape in convention.zeros.items():
        if name not in tensors:
            passed[name] = first.new_zeros(shape(config, tensors))
    if timestep is None or not timed:
        return passed
    time = torch.as_tensor(sample_inputs[timestep]).reshape(-1)
    if convention.time == "[1]" and bool((time != time[0]).any()):
        raise TdqError(
            "sample_inputs", time.tolist(), f"{names} passes {convention.of} one time", "Pass one time for the batch"
        )
    time = time[:1] if convention.time == "[1]" else time.expand(len(first)) if len(time) == 1 else time
    return {**passed, timestep: time.contiguous().to(convention.dtypes.get(timestep, first.dtype))}


def opens_batch(names: Names, inputs: Iterable[str]) -> bool:
    """Whether the program of a preset builds engines of such a model for several batches.

    Args:
        names: See :data:`Names`.
        inputs: The model's own names of its inputs.

    Raises:
        TdqError: As :func:`convention_of`.
    """
    if not isinstance(names, str) or names == "forward":
        return False
    return convention_of(names, set(inputs)).batch is not None


def open_batch(
    names: Names, sample_inputs: Mapping[str, Any], dynamic_axes: Mapping[str, Mapping[int, str]] | None
) -> Mapping[str, Mapping[int, str]] | None:
    """``dynamic_axes`` of an export with an open batch, with the axes in which a program has its batch elsewhere.

    Args:
        names: See :data:`Names`.
        sample_inputs: What :func:`as_passed` made of them.
        dynamic_axes: Of the export.
    """
    if not isinstance(names, str) or names == "forward":
        return dynamic_axes
    convention = convention_of(names, set(tensor_leaves(dict(sample_inputs))))
    axes = {name: dict(found) for name, found in (dynamic_axes or {}).items()}
    for name, axis in convention.batch_axes.items():
        if axis and name in sample_inputs:
            axes.setdefault(name, {})[axis] = BATCH
    return axes or None


def names_of(names: Names, inputs: Iterable[str], outputs: Iterable[str]) -> Called:
    """What the tensors of a graph are to be called.

    Args:
        names: See :data:`Names`.
        inputs: The model's own names.
        outputs: Likewise.

    Raises:
        TdqError: The preset serves no model with these inputs or outputs; a mapping names a tensor that is not there,
            or gives two the same name.
    """
    inputs, outputs = list(inputs), list(outputs)
    known = [*inputs, *outputs]
    if names == "forward":
        return Called()
    if isinstance(names, str):
        convention = convention_of(names, set(inputs))
        if outputs != [OUTPUT]:
            raise TdqError("names", names, f"it has one output, the model {', '.join(outputs)}", "Use a mapping")
        found = {**convention.inputs, OUTPUT: convention.output}
        new_names = {own: new for own, new in found.items() if own != new and own in known}
        zeros = {name: axis for name, axis in convention.batch_axes.items() if name in convention.zeros}
        return Called(new_names, convention.axes, tuple(convention.inputs.values()), zeros)
    for own, new in names.items():
        if own not in known:
            raise TdqError("names", own, "no input or output of the graph", f"Use some of {', '.join(known)}")
        if not isinstance(new, str) or not new:
            raise TdqError("names", new, f"no name for `{own}`", "Use a text that is not empty")
    called = [names.get(own, own) for own in known]
    if twice := sorted({new for new in called if called.count(new) > 1}):
        raise TdqError("names", twice[0], "two tensors of the graph would be called so", "Give each another name")
    return Called({own: new for own, new in names.items() if own != new})


def convention_of(preset: str, given: Set[str]) -> Convention:
    """That of the model with these inputs, by their own names.

    Raises:
        TdqError: There is no such preset, or it serves no such model.
    """
    if preset not in PROGRAMS:
        raise TdqError("names", preset, "no such preset", f"Use 'forward', {list(PROGRAMS)} or a mapping")

    def distance(convention: Convention) -> tuple[Set[str], Set[str]]:
        needed = set(convention.inputs) - set(convention.optional) - set(convention.zeros)
        return needed - given, given - set(convention.inputs)

    nearest = min(PROGRAMS[preset], key=lambda each: (sum(map(len, distance(each))), -len(given & set(each.inputs))))
    missing, further = distance(nearest)
    if missing or further:
        lacks = [f"it lacks {', '.join(sorted(missing))}"] if missing else []
        has = [f"it has {', '.join(sorted(further))} besides"] if further else []
        raise TdqError(
            "names",
            preset,
            f"it serves no denoiser with these inputs. Nearest is {nearest.of}: {' and '.join([*lacks, *has])}",
            "Export with sample inputs of that program's calls; a mapping from the model's own names to others, "
            "{'output': 'latent'}, serves any program",
        )
    return nearest


def rename(model: ir.Model, called: Called) -> None:
    """Give inputs and outputs of a graph other names and order, and its open sizes those of a program, in place.

    Sizes that were one stay one.
    """
    ir = require("onnx_ir", "onnx")
    names, axes = called.names, called.axes
    ends = {str(value.name): value for value in [*model.graph.inputs, *model.graph.outputs]}
    taken = {new for new in names.values() if new not in ends}
    for value in _values(model):  # what happens to be called so inside makes room
        if value.name in taken:
            value.name = f"{value.name}_inside"
    for own, new in names.items():
        if own in ends:
            ends[own].name = new
    sizes: dict[str, str] = {}
    for name, dimensions in axes.items():
        value = next((v for own, v in ends.items() if names.get(own, own) == name), None)
        if value is not None and value.shape is not None:
            open_ones = {axis: size for axis, size in enumerate(value.shape) if not isinstance(size, int)}
            sizes.update({str(size): dimensions[axis] for axis, size in open_ones.items() if axis in dimensions})
    for value in _values(model) if sizes else ():
        if value.shape is not None:
            value.shape = ir.Shape(
                [ir.SymbolicDim(sizes[str(size)]) if str(size) in sizes else size for size in value.shape]
            )
    if called.order:
        inputs = {str(value.name): value for value in model.graph.inputs}
        first = [name for name in called.order if name in inputs]
        model.graph.inputs[:] = [inputs[name] for name in [*first, *(name for name in inputs if name not in first)]]
    if names:
        model.metadata_props[NAMES] = json.dumps(dict(names))
    if called.zeros:
        model.metadata_props[ZEROS] = json.dumps(dict(called.zeros))


def _values(model: ir.Model) -> list[Any]:
    graph = model.graph
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]
