"""Names of a graph's inputs and outputs: those that the program around the engine addresses.

A graph has the names of the model's own arguments (``added_cond_kwargs.text_embeds``, ``output``). Programs that load
engines have names of their own; NVIDIA's demoDiffusion raises KeyError for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.outputs import OUTPUT
from modelopt_tdq.model.call import tensor_leaves

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DEMO_DIFFUSION", "NAMES", "Convention", "Names", "as_passed", "names_of", "rename"]

#: Key, in the metadata of an ONNX file, of the mapping from the model's own names to the graph's: JSON.
NAMES = "modelopt_tdq.names"

#: How the inputs and outputs of a graph are called: "forward", as the model's own; "demo-diffusion", as that program
#: calls them; or a mapping from the former to others.
Names = str | Mapping[str, str]


@dataclass(frozen=True)
class Convention:
    """How a program calls the tensors of one kind of denoiser.

    Attributes:
        of: Models that it serves, for messages.
        inputs: Their names, by the model's own.
        axes: Names of open sizes, by the program's name of an input or output and the number of the dimension.
        optional: Of ``inputs``, by the model's own name: those that some of these models do not take.
        output: Name of the only output.
        time: Shape of the time: one for the batch [1], or one of each sample [B].
        time_dtype: Of the time; None: that of the model's first input.
    """

    of: str
    inputs: Mapping[str, str]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    output: str = "latent"
    time: Literal["[1]", "[B]"] = "[1]"
    time_dtype: torch.dtype | None = None


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_IMAGE = {0: "2B", 2: "H", 3: "W"}
_UNET = {"sample": _IMAGE, "encoder_hidden_states": {0: "2B"}, "latent": _IMAGE}
_SDXL = {"added_cond_kwargs.text_embeds": "text_embeds", "added_cond_kwargs.time_ids": "time_ids"}
_POOLED = {"text_embeds": {0: "2B"}, "time_ids": {0: "2B"}}
_CONTROL = {"images": {1: "2B", 3: "8H", 4: "8W"}}
_TRANSFORMER = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")

#: NVIDIA/TensorRT, demo/Diffusion of 11.1.0.106: ``get_input_names``, ``get_output_names``, ``get_dynamic_axes`` and
#: the shapes of ``get_input_profile`` in demo_diffusion/model/unet.py and diffusion_transformer.py. "2B" is "B" there
#: for a pipeline without classifier-free guidance.
DEMO_DIFFUSION = (
    Convention("the U-Net of Stable Diffusion", _same("sample", "timestep", "encoder_hidden_states"), _UNET),
    Convention(
        "the U-Net of Stable Diffusion with ControlNets in one graph",
        _same("sample", "timestep", "encoder_hidden_states", "images", "controlnet_scales"),
        {**_UNET, **_CONTROL},
    ),
    Convention(
        "the U-Net of SDXL",
        {**_same("sample", "timestep", "encoder_hidden_states"), **_SDXL},
        {**_UNET, **_POOLED},
    ),
    Convention(
        "the U-Net of SDXL with ControlNets in one graph",
        {**_same("sample", "timestep", "encoder_hidden_states", "images", "controlnet_scales"), **_SDXL},
        {**_UNET, **_POOLED, **_CONTROL},
    ),
    Convention(
        "the U-Net of Stable Video Diffusion",
        _same("sample", "timestep", "encoder_hidden_states", "added_time_ids"),
        {
            "sample": {0: "2B", 1: "num_frames", 3: "H", 4: "W"},
            "encoder_hidden_states": {0: "2B"},
            "added_time_ids": {0: "2B"},
        },
        time_dtype=torch.float32,
    ),
    Convention(
        "the transformer of Stable Diffusion 3 and 3.5",
        _same(*_TRANSFORMER, "block_controlnet_hidden_states"),
        {
            "hidden_states": _IMAGE,
            "encoder_hidden_states": {0: "2B"},
            "pooled_projections": {0: "2B"},
            "timestep": {0: "2B"},
            "block_controlnet_hidden_states": {1: "2B", 2: "latent_dim"},
            "latent": _IMAGE,
        },
        optional=("block_controlnet_hidden_states",),
        time="[B]",
        time_dtype=torch.float32,
    ),
    Convention(
        "the transformer of Flux",
        _same(*_TRANSFORMER, "img_ids", "txt_ids", "guidance"),
        {
            "hidden_states": {0: "B", 1: "latent_dim"},
            "encoder_hidden_states": {0: "B"},
            "pooled_projections": {0: "B"},
            "timestep": {0: "B"},
            "img_ids": {0: "latent_dim"},
            "guidance": {0: "B"},
        },
        optional=("guidance",),
        time="[B]",
    ),
    Convention(
        "the transformer of Wan",
        _same("hidden_states", "timestep", "encoder_hidden_states"),
        output="denoised_latents",
        time_dtype=torch.int64,
    ),
    Convention(
        "the transformer of Cosmos",
        _same("hidden_states", "timestep", "encoder_hidden_states", "padding_mask", "fps", "condition_mask"),
        {
            "hidden_states": {0: "B", 2: "latent_frames", 3: "latent_H", 4: "latent_W"},
            "timestep": {0: "B"},
            "encoder_hidden_states": {0: "B"},
            "padding_mask": {0: "B", 2: "H", 3: "W"},
            "fps": {0: "B"},
            "condition_mask": {0: "B", 2: "latent_frames", 3: "latent_H", 4: "latent_W"},
        },
        optional=("fps", "condition_mask"),
        time="[B]",
    ),
)

_PRESETS: dict[str, tuple[Convention, ...]] = {"demo-diffusion": DEMO_DIFFUSION}


def as_passed(names: Names, sample_inputs: Mapping[str, Any], timestep: str | None) -> Mapping[str, Any]:
    """The sample inputs with the time in the shape and dtype in which the program of a preset passes it.

    Args:
        names: See :data:`Names`.
        sample_inputs: Of an export.
        timestep: The argument that holds the time.

    Raises:
        TdqError: There is no such preset; it serves no model with these inputs; or it passes one time for the batch,
            and the samples have several.
    """
    if not isinstance(names, str) or names == "forward":
        return sample_inputs
    tensors = tensor_leaves(dict(sample_inputs))
    timed = timestep is not None and sample_inputs.get(timestep) is not None
    convention = _convention(names, {*tensors, str(timestep)} if timed else set(tensors))
    if timestep is None or not timed:
        return sample_inputs
    first = next(tensor for name, tensor in tensors.items() if name != timestep)
    time = torch.as_tensor(sample_inputs[timestep]).reshape(-1)
    if convention.time == "[1]" and bool((time != time[0]).any()):
        raise TdqError(
            "sample_inputs", time.tolist(), f"{names} passes {convention.of} one time", "Pass one time for the batch"
        )
    time = time[:1] if convention.time == "[1]" else time.expand(len(first)) if len(time) == 1 else time
    return {**sample_inputs, timestep: time.contiguous().to(convention.time_dtype or first.dtype)}


def names_of(
    names: Names, inputs: Iterable[str], outputs: Iterable[str]
) -> tuple[dict[str, str], Mapping[str, Mapping[int, str]]]:
    """What the tensors of a graph are to be called.

    Args:
        names: See :data:`Names`.
        inputs: The model's own names.
        outputs: Likewise.

    Returns:
        New names by the model's own, of those that change; and names of open sizes, by the new names.

    Raises:
        TdqError: The preset serves no model with these inputs or outputs; a mapping names a tensor that is not there,
            or gives two the same name.
    """
    inputs, outputs = list(inputs), list(outputs)
    known = [*inputs, *outputs]
    if names == "forward":
        return {}, {}
    if isinstance(names, str):
        convention = _convention(names, set(inputs))
        if outputs != [OUTPUT]:
            raise TdqError("names", names, f"it has one output, the model {', '.join(outputs)}", "Use a mapping")
        found = {**convention.inputs, OUTPUT: convention.output}
        return {own: new for own, new in found.items() if own != new and own in known}, convention.axes
    for own, new in names.items():
        if own not in known:
            raise TdqError("names", own, "no input or output of the graph", f"Use some of {', '.join(known)}")
        if not isinstance(new, str) or not new:
            raise TdqError("names", new, f"no name for `{own}`", "Use a text that is not empty")
    called = [names.get(own, own) for own in known]
    if twice := sorted({new for new in called if called.count(new) > 1}):
        raise TdqError("names", twice[0], "two tensors of the graph would be called so", "Give each another name")
    return {own: new for own, new in names.items() if own != new}, {}


def _convention(preset: str, given: Set[str]) -> Convention:
    """That of the model with these inputs."""
    if preset not in _PRESETS:
        raise TdqError("names", preset, "no such preset", f"Use 'forward', {list(_PRESETS)} or a mapping")

    def distance(convention: Convention) -> tuple[Set[str], Set[str]]:
        return set(convention.inputs) - set(convention.optional) - given, given - set(convention.inputs)

    nearest = min(_PRESETS[preset], key=lambda each: (sum(map(len, distance(each))), -len(given & set(each.inputs))))
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


def rename(model: ir.Model, names: Mapping[str, str], axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give inputs and outputs of a graph other names, and its open sizes those of a program, in place.

    Args:
        model: The graph.
        names: New names by those that it has.
        axes: Names of open sizes, by the new names. Sizes that were one stay one.
    """
    ir = require("onnx_ir", "onnx")
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
    if names:
        model.metadata_props[NAMES] = json.dumps(dict(names))


def _values(model: ir.Model) -> list[Any]:
    graph = model.graph
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]
