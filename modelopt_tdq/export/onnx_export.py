"""``export_onnx``: from a quantized torch model to an ONNX file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from modelopt_tdq.errors import TdqError, TdqWarning, require
from modelopt_tdq.export.context import LoweringContext, TokenTimes
from modelopt_tdq.export.features import lower_features
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.inputs import FIXED, Inputs, flatten_inputs
from modelopt_tdq.export.layer_correction import fold_static
from modelopt_tdq.export.lookup import ColumnSource, Lookup, gathered
from modelopt_tdq.export.markers import DOMAIN, with_markers
from modelopt_tdq.export.names import Names, as_passed, names_of, open_batch, rename
from modelopt_tdq.export.one_time import nan_where_times_differ, needs_one_time
from modelopt_tdq.export.onnx_file import write_onnx
from modelopt_tdq.export.open_sizes import open_sizes
from modelopt_tdq.export.plugin import PLUGIN_DOMAIN, looked_up_by_plugin
from modelopt_tdq.export.portable import portable
from modelopt_tdq.export.ratio import lower_ratio
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.export.reference import lower_reference
from modelopt_tdq.export.report import ExportReport, report_of
from modelopt_tdq.export.spec import QuantizationSpec
from modelopt_tdq.export.table_input import all_rows, looked_up_in_input, require_table_input
from modelopt_tdq.export.trace import trace
from modelopt_tdq.export.weights import PACKINGS, PackWeights, lower_weights
from modelopt_tdq.model.caches import require_no_cache
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.timestep import find_timestep, times_of_samples
from modelopt_tdq.model.token_times import readers, tokens_of_a_frame
from modelopt_tdq.model.unquantized import unquantized_layers
from modelopt_tdq.model.weight_fit import warn_of_changed_weights
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.guard import require_proven

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ExportReport", "MarkerGraph", "export_onnx", "lower", "marker_graph"]

_LOWERINGS = {"ratio": lower_ratio, "reference": lower_reference, "plugin": lower_ratio}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    sample_inputs: Mapping[str, Any],
    *,
    lowering: Literal["ratio", "reference", "plugin"] = "ratio",
    dynamic_batch: bool = False,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    table_input: bool = False,
    pack_weights: PackWeights = "none",
    reference_path: str | os.PathLike[str] | None = None,
    constants: Collection[str] = (),
    names: Names = "forward",
) -> ExportReport:
    """Write a quantized model as an ONNX file: standard operators only, but for ``lowering="plugin"``.

    The opset is 20, or 21 with packed weights, or 22 for bfloat16. The model is not changed. The file appears when it
    is complete and has passed ONNX's checker. Weights that changed after calibration, and that their scales do not fit
    any more, are warned of.

    Args:
        model: The module that ``mtq.quantize`` was called with, or what ``torch.compile`` and the like made of it.
        path: Of the file to write.
        sample_inputs: Arguments of the model's ``forward`` by name. Tensors become graph inputs of the same
            name, those inside mappings, lists and dataclasses with their path (``added_cond_kwargs.text_embeds``,
            ``down_block_additional_residuals.0``). Everything else becomes part of the graph; a swapped denoiser
            refuses other values. The time may be
            of any dtype and of shape [], [1], [B] for a time per sample, or [B, N] for one per token or frame, and
            keeps that shape. Tokens or frames have scales of their own where their sample times differ in a sample.
            Where those are the same, or where the samples cannot be told apart in an activation, as of tokens in front
            of the batch, times that are the same have to be so in every call: the graph gives NaN otherwise.
        lowering: "ratio" divides by the scale in front of a quantizer with a constant scale, and multiplies
            behind the operator, so that backends keep their low-precision kernels. "reference" is
            QuantizeLinear with the scale looked up by time: for ONNX Runtime, as the numeric yardstick. "plugin" is
            "ratio" with the scales looked up by the TensorRT plugin TdqScaleLookup: see
            :mod:`modelopt_tdq.plugin`, and :func:`~modelopt_tdq.export.plugin.plugin_free` for other backends.
        dynamic_batch: Leave dimension 0 of all inputs that share the sample batch (2 or more) open.
        dynamic_axes: Further sizes to leave open, such as those of images: by input, axis to a name,
            ``{"sample": {2: "height", 3: "width"}}``; by these names ``build_engine(dynamic_sizes=...)`` takes their
            ranges.
        table_input: Make the scales inputs of the graph instead of constants, with lowering "ratio": one engine then
            serves any table of the model, with any number of rows. :func:`~modelopt_tdq.engine_table` makes
            the inputs from a :class:`~modelopt_tdq.ScaleTable`; all temporal quantizers are in it, also those whose
            scales do not depend on time now.
        pack_weights: How weights of at most 4 bits are stored. "none": in INT8 tensors, for every backend. "cast": two
            codes to a byte and a Cast to INT8, half the file; ONNX Runtime runs it, OpenVINO keeps its INT8 kernels,
            TensorRT does not build it. "direct": those of matrix products two to a byte, for TensorRT: half the
            engine, and a kernel more per layer, which unpacks; OpenVINO computes such layers in float. The numbers
            are the same.
        reference_path: Write the graph of ``lowering="reference"`` there, too. Torch traces the model once for both,
            which is what takes the time. :func:`modelopt_tdq.compare.model.compare_model` takes the file by this name.
        constants: Names of tensors among the sample inputs that are the same in every call, such as a mask that hides
            nothing: their values become part of the graph, which does not have them as inputs, and a swapped denoiser
            refuses other ones. So it is, with a warning, where it need not be asked for: where the code of the model
            takes lengths or places from the numbers of a mask (``.item()``, ``.tolist()``, an index of truth values),
            torch cannot export it otherwise. Never the time.
        names: What inputs and outputs are called in the file at ``path``. "forward": as the arguments of the model;
            "demo-diffusion": as NVIDIA's demoDiffusion calls them, "diffusion-trt": ModelOpt's diffusion_trt.py,
            "rtx-demo": the demo of TensorRT-RTX, see :data:`modelopt_tdq.export.conventions.PROGRAMS`; or a mapping
            from the former to others, ``{"output": "latent"}``. A swapped denoiser knows them all.

    Returns:
        What was written, and which quantizers are deployed in low precision.

    Raises:
        TdqError: An argument cannot be used, the model is not calibrated, or it holds something that cannot
            be exported. No file is written then.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    if lowering not in _LOWERINGS:
        raise TdqError("lowering", lowering, "no such lowering", f"Use one of {sorted(_LOWERINGS)}")
    if pack_weights not in PACKINGS:
        raise TdqError("pack_weights", pack_weights, "no such way to store weights", f"Use one of {list(PACKINGS)}")
    require("onnx", "onnx")
    target = _file("path", path)
    reference = None if reference_path is None else _file("reference_path", reference_path)
    if reference is not None and reference.resolve() == target.resolve():
        raise TdqError("reference_path", str(reference), "it is path as well", "Name another file for the reference")
    if restored_by := getattr(type(model), "restored_by", None):
        raise TdqError(
            "model",
            type(model).__name__,
            "an engine computes in place of this model, so there is nothing to trace",
            f"Put the torch model back with {restored_by}, or export it before it is swapped",
        )
    warn_of_changed_weights(model)
    timestep = find_timestep(unwrapped(model))
    argument = None if timestep is None else timestep.argument
    sample_inputs = as_passed(names, sample_inputs, argument, getattr(unwrapped(model), "config", None))
    if dynamic_batch:
        dynamic_axes = open_batch(names, sample_inputs, dynamic_axes)
    graph = marker_graph(
        model, sample_inputs, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes, constants=constants
    )
    if graph.decisions:
        warnings.warn(
            f"{type(unwrapped(model)).__name__} decides what runs by the values of its inputs, in "
            f"{', '.join(graph.decisions)}. The graph has what the sample inputs decide, and gives NaN for inputs that "
            "decide otherwise: export once for each kind of input",
            TdqWarning,
            stacklevel=2,
        )
    if found := sorted(set(graph.constants) - set(constants)):
        warnings.warn(
            f"{', '.join(found)}: the code of {type(unwrapped(model)).__name__} reads their values, which decide how "
            "large tensors are or what runs. Torch can export it with fixed ones only, so those of the sample inputs "
            "are part of the graph, and no inputs of it. Export once for each of the values that will be used; name "
            "these inputs in `constants` if this is what you mean",
            TdqWarning,
            stacklevel=2,
        )
    renamed = names_of(names, _names(graph.model.graph.inputs), _names(graph.model.graph.outputs))
    twin = None if reference is None else replace(graph, model=graph.model.clone())
    context = lower(graph, lowering, table_input=table_input, pack_weights=pack_weights)
    if twin is not None and reference is not None:
        lower(twin, "reference")
        write_onnx(twin.model, reference)
    rename(graph.model, renamed)
    write_onnx(graph.model, target)
    return report_of(context, target, lowering, unquantized_layers(model), graph.constants, graph.decisions)


def _names(values: Iterable[Any]) -> list[str]:
    return [str(value.name) for value in values]


def _file(field: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.is_dir() or not target.name:
        raise TdqError(field, str(target), "not the name of a file", "Name the file to write, e.g. 'model.onnx'")
    return target


@dataclass(frozen=True)
class MarkerGraph:
    """A model in standard operators, except for a marker node per quantizer.

    Attributes:
        model: The graph.
        spec: What the markers stand for.
        shapes: That each marker saw in the sample run, by quantizer name.
        samples: Times per call in the sample run.
        dynamic_batch: Whether dimension 0 is open.
        batch: Samples per call in the sample run.
        fixed: See :meth:`modelopt_tdq.export.inputs.Inputs.fixed`.
        constants: Names of the sample inputs that are part of the graph.
        decisions: Lines of code in the model, see :class:`~modelopt_tdq.export.trace.Traced`.
        one_time: Whether the times of a call have to be all the same.
        token_times: Where tokens or frames have times of their own.
    """

    model: ir.Model
    spec: QuantizationSpec
    shapes: dict[str, list[tuple[int, ...]]]
    samples: int
    dynamic_batch: bool
    batch: int = 1
    fixed: str = "{}"
    constants: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    one_time: bool = False
    token_times: TokenTimes | None = None


def marker_graph(
    model: nn.Module,
    sample_inputs: Mapping[str, Any],
    *,
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    constants: Collection[str] = (),
) -> MarkerGraph:
    """The first half of :func:`export_onnx`, with its arguments and errors."""
    model = unwrapped(model)
    require_no_cache(model, "be exported")
    require_weights(model, "be exported")
    spec = read_quantization(model)
    if not spec.activations and not spec.weights and not spec.folded and spec.features is None:
        raise TdqError(
            "model",
            type(model).__name__,
            "it has no enabled quantizer",
            "Quantize it first: mtq.quantize(model, modelopt_tdq.TDQ_CONFIG, forward_loop)",
        )
    inputs = flatten_inputs(sample_inputs, spec.timestep)
    require_proven(model, inputs.arguments(tuple(inputs.tensors)))
    others = (t for n, t in zip(inputs.names, inputs.tensors, strict=True) if n != spec.timestep and t.dim())
    batch = next((len(tensor) for tensor in others), 1)
    sizes = open_sizes(inputs, spec.timestep, dynamic_batch, dynamic_axes)
    _check_constants(constants, inputs)
    times = None
    if spec.timestep is not None:
        times = times_of_samples(inputs.tensors[inputs.names.index(spec.timestep)])
    traced = trace(with_markers(model), inputs, sizes, constants)
    token_times = None
    if times is not None and times.dim() > 1:
        shape = (times.shape[0], times.shape[1])
        token_times = TokenTimes(shape, readers(model), tokens_of_a_frame(inputs.tensors, times.shape[1]))
    one_time = times is not None and times.dim() == 1 and needs_one_time(spec, traced.shapes, times)
    samples = 1 if times is None or one_time else times.numel()
    return MarkerGraph(
        traced.model,
        spec,
        traced.shapes,
        samples,
        dynamic_batch,
        batch,
        inputs.fixed(traced.constants),
        traced.constants,
        traced.decisions,
        one_time,
        token_times,
    )


def _check_constants(names: Collection[str], inputs: Inputs) -> None:
    for name in names:
        if name not in inputs.names:
            raise TdqError("constants", name, "no such tensor", f"Use some of {', '.join(inputs.names)}")
        if name == inputs.timestep:
            raise TdqError("constants", name, "the scales depend on it", "Leave it out")


def lower(
    graph: MarkerGraph, lowering: str, *, table_input: bool = False, pack_weights: PackWeights = "none"
) -> LoweringContext:
    """The second half: replace the markers of ``graph.model``, in place."""
    if table_input:
        require_table_input(graph.spec, lowering)
        graph = replace(graph, spec=all_rows(graph.spec))
    editor = GraphEditor(graph.model.graph)
    graph = replace(graph, spec=fold_static(editor, graph.spec))
    time = next((v for v in graph.model.graph.inputs if v.name == graph.spec.timestep), None)
    times = None if graph.dynamic_batch and graph.samples > 1 else graph.samples
    source: ColumnSource = gathered
    if table_input:
        source = looked_up_in_input(graph.spec, graph.model)
    elif lowering == "plugin":
        source = looked_up_by_plugin(graph.spec)
    tokens = 1 if graph.token_times is None else graph.token_times.shape[1]
    lookup = Lookup(editor, graph.spec, time, times, ratios=lowering != "reference", source=source, tokens=tokens)
    weights = lower_weights(editor, graph.spec, pack_weights)
    context = LoweringContext(
        editor, graph.spec, lookup, weights, graph.shapes, graph.samples, graph.batch, table_input, graph.token_times
    )
    lower_features(context, gather_int8=lowering == "reference")
    _LOWERINGS[lowering](context)
    portable(graph.model, editor)
    several = time is not None and len(time.shape or ()) > 1 and graph.token_times is None
    if time is not None and (graph.one_time or several):
        nan_where_times_differ(editor, time, in_a_sample=not graph.one_time)
    _finish(graph.model, lowering)
    graph.model.metadata_props[FIXED] = graph.fixed
    return context


def _finish(model: ir.Model, lowering: str) -> None:
    passes = require("onnx_ir.passes.common", "onnx")
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    left = [node.name for node in model.graph if node.domain == DOMAIN]
    if left:
        raise TdqError("lowering", lowering, f"these markers were left in the graph: {left}", "Report this")
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == PLUGIN_DOMAIN for node in model.graph):
        model.opset_imports[PLUGIN_DOMAIN] = 1
    model.producer_name = "modelopt_tdq"
    model.metadata_props["modelopt_tdq.lowering"] = lowering
