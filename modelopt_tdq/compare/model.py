"""``compare_model``: the quantized torch model against what it was exported to, per time step and per layer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.compare.backends import COMPARED, TORCH, WITHOUT_ENGINE, deployed
from modelopt_tdq.compare.parts import REFERENCE, Compared, compare_layers, compare_outputs
from modelopt_tdq.compare.results import ModelComparison
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.inputs import flatten_inputs
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.model.weight_fit import rounded_weights, warn_of_changed_weights
from modelopt_tdq.model.wrapped import unwrapped

__all__ = ["REFERENCE", "compare_model"]


def compare_model(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    backends: Sequence[str] = WITHOUT_ENGINE,
    layers: bool = True,
    reference_path: str | os.PathLike[str] | None = None,
    lowered_path: str | os.PathLike[str] | None = None,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: bool = True,
) -> ModelComparison:
    """Run a quantized model in several backends over several time steps, and compare.

    The yardstick is the reference graph in ONNX Runtime; "torch" is the model itself, the others run the lowered
    graph: of lowering "plugin" its plugin-free twin; where the table is an input, with the model's own table.
    Weights that changed after calibration, and that their scales do not fit any more, are warned of.
    (OpenVINO converts to FP8 by way of float16, which moves about 4 in 1000 codes by a step, so an FP8 model may
    well differ by more than its quantization noise there.)

    Args:
        model: The module that ``mtq.quantize`` was called with.
        inputs: Arguments of the model's ``forward`` by name, one mapping per time step; their shapes, and
            what is no tensor, are the same in all of them.
        backends: Which to compare: "torch", and names of :data:`~modelopt_tdq.compare.backends.COMPARED`.
        layers: Compare codes, layer by layer, too (only in backends that compute the graph as it stands).
        reference_path: The reference graph, if it has been exported already.
        lowered_path: The lowered graph, likewise. Left out, it is exported by ratios.
        files: What a backend runs in place of the lowered graph, such as an engine built from it.
        progress: Show a progress bar.

    Returns:
        What was found. Where one backend fails, what was found in the others, and in ``failures`` what went wrong.

    Raises:
        TdqError: A backend is not known or lacks its engine, there are no inputs, export fails, or no backend runs.
        MissingExtraError: Polygraphy is not installed, or no backend is.
    """
    known = (TORCH, *COMPARED)
    if unknown := [backend for backend in backends if backend not in known]:
        raise TdqError("backends", unknown, "not known", f"Use some of {', '.join(known)}")
    for backend in backends:
        if backend != TORCH and COMPARED[backend].engine and backend not in (files or {}):
            raise TdqError("files", files, f"{backend} runs an engine", f"Pass files={{{backend!r}: <its engine>}}")
    for module in ("onnx", "onnxruntime", "polygraphy.comparator"):
        require(module, "compare")
    calls = list(inputs)
    if not calls:
        raise TdqError("inputs", calls, "empty", "Pass the arguments of one call per time step")
    model = unwrapped(model)
    warn_of_changed_weights(model)
    delivery = find_timestep(model)
    argument = None if delivery is None else delivery.argument
    flat = [flatten_inputs(call, argument) for call in calls]
    feeds = [{n: _array(n, t) for n, t in zip(f.names, f.tensors, strict=True)} for f in flat]
    times = [float(np.min(feed[argument])) if argument in feed else float(k) for k, feed in enumerate(feeds)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        reference = Path(reference_path or folder / "reference.onnx")
        ratio = None
        if any(backend != TORCH for backend in backends):
            ratio = Path(lowered_path or folder / "ratio.onnx")
        _export(model, calls[0], None if reference_path else reference, None if lowered_path else ratio)
        lowered = None if ratio is None else deployed(ratio, model, folder)
        kinds = {backend: None if backend == TORCH else COMPARED[backend] for backend in backends}
        compared = Compared(model, flat[0].sample, feeds, times, reference, lowered, kinds, files or {}, folder)
        found = compare_outputs(compared)
        if not found and compared.failures:
            raise compared.failures[0].error
        of_codes = [backend for backend, kind in kinds.items() if kind is None or kind.layers]
        differing = compare_layers(compared, of_codes if layers else [], progress)
    notes = [lowered.note] if lowered is not None and lowered.note else []
    if rounded := rounded_weights(model):
        notes.append(
            f"{len(rounded)} weights are the values of their codes, in full precision too: the quantization noise that "
            "outputs are compared with is that of the activations"
        )
    missing = differing.missing.items()
    notes += [f"{backend}: the codes of {', '.join(absent)} were not compared" for backend, absent in missing]
    return ModelComparison(
        tuple(found),
        tuple(differing.found),
        differing.counts,
        tuple(differing.names),
        tuple(notes),
        tuple(compared.failures),
    )


def _array(name: str, tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        raise TdqError(
            "inputs",
            name,
            "ONNX Runtime, the reference, computes nothing in bfloat16",
            "Compare the model in float16 or float32: model.float(), and inputs of that dtype",
        )
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return array


def _export(model: nn.Module, sample: Mapping[str, Any], reference: Path | None, ratio: Path | None) -> None:
    """Write those that are wanted, weights apart; torch traces the model once for both."""
    from modelopt_tdq.export.onnx_export import lower, marker_graph
    from modelopt_tdq.export.onnx_file import write_onnx

    if reference is None and ratio is None:
        return
    traced = marker_graph(model, sample, dynamic_batch=False)
    for lowering, file in (("reference", reference), ("ratio", ratio)):
        if file is not None:
            graph = replace(traced, model=traced.model.clone())
            lower(graph, lowering)
            write_onnx(graph.model, file, apart=True)
