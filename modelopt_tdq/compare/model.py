"""``compare_model``: the quantized torch model against what it was exported to, per time step and per layer."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.compare.backends import COMPARED, TORCH, WITHOUT_ENGINE, DeployedGraph, deployed
from modelopt_tdq.compare.layers import codes_by_quantizer, given_codes, returning_codes, with_given_codes
from modelopt_tdq.compare.metrics import codes_difference, output_difference
from modelopt_tdq.compare.results import LayerResult, ModelComparison, StepResult
from modelopt_tdq.compare.runners import call_model, session_runner, torch_runner
from modelopt_tdq.compare.steps import StepComparator
from modelopt_tdq.errors import TdqError, TdqWarning, require
from modelopt_tdq.export.inputs import flatten_inputs
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.model.weight_fit import rounded_weights, warn_of_changed_weights
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.runtime.sessions.forward_names import by_forward_names
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

__all__ = ["REFERENCE", "compare_model"]

#: Name of the reference: the reference graph in ONNX Runtime, run node by node.
REFERENCE = "reference"

#: An array by the name of an input or output, of one call.
_Arrays = dict[str, Any]


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

    Raises:
        TdqError: A backend is not known or lacks its engine, there are no inputs, or export fails.
        MissingExtraError: Polygraphy or a backend is not installed.
    """
    known = (TORCH, *COMPARED)
    if unknown := [backend for backend in backends if backend not in known]:
        raise TdqError("backends", unknown, "not known", f"Use some of {', '.join(known)}")
    for backend in backends:
        if backend != TORCH and COMPARED[backend].engine and backend not in (files or {}):
            raise TdqError("files", files, f"{backend} runs an engine", f"Pass files={{{backend!r}: <its engine>}}")
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = Path(reference_path or folder / "reference.onnx")
        ratio = None
        if any(backend != TORCH for backend in backends):
            ratio = Path(lowered_path or folder / "ratio.onnx")
        _export(model, calls[0], None if reference_path else reference, None if lowered_path else ratio)
        lowered = None if ratio is None else deployed(ratio, model, folder)
        run = _Run(model, flat[0].sample, reference, lowered, files or {}, folder)
        found = _compare_outputs(run, feeds, backends, times)
        compared = [b for b in backends if b == TORCH or COMPARED[b].layers] if layers else []
        differing, counts, names, missing = _compare_layers(run, feeds, compared, times, progress)
    notes = [lowered.note] if lowered is not None and lowered.note else []
    if rounded := rounded_weights(model):
        notes.append(
            f"{len(rounded)} weights are the values of their codes, in full precision too: the quantization noise that "
            "outputs are compared with is that of the activations"
        )
    notes += [f"{backend}: the codes of {', '.join(absent)} were not compared" for backend, absent in missing.items()]
    return ModelComparison(tuple(found), tuple(differing), counts, tuple(names), tuple(notes))


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


@dataclass(frozen=True)
class _Run:
    """What is run: the model, one call of it, and the graphs; and a folder for more of them."""

    model: nn.Module
    fixed: Mapping[str, Any]
    reference: Path
    lowered: DeployedGraph | None
    files: Mapping[str, str | os.PathLike[str]]
    folder: Path

    def runner(self, backend: str, sample: _Arrays) -> Any:
        if backend == TORCH or self.lowered is None:
            return torch_runner(self.model, sample, fixed=self.fixed)
        kind, file, table = COMPARED[backend], Path(self.files.get(backend, self.lowered.path)), self.lowered.table
        if kind.engine:  # it holds its table
            return session_runner(backend, by_forward_names(kind.open(file, table)), sample)
        return session_runner(backend, by_forward_names(kind.open(file)), sample, table)


def _export(model: nn.Module, sample: Mapping[str, Any], reference: Path | None, ratio: Path | None) -> None:
    """Write those that are wanted; torch traces the model once for both."""
    from modelopt_tdq.export.onnx_export import export_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TdqWarning)  # compare_model has warned already
        if ratio is not None:
            export_onnx(model, ratio, sample, reference_path=reference)
        elif reference is not None:
            export_onnx(model, reference, sample, lowering="reference")


def _compare_outputs(run: _Run, feeds: list[_Arrays], backends: Sequence[str], times: list[float]) -> list[StepResult]:
    """All steps in all backends, by Polygraphy's own Comparator."""
    with full_precision(run.model):
        exact = [call_model(run.model, feed, run.fixed) for feed in feeds]
    output = next(iter(exact[0]))
    runners = [session_runner(REFERENCE, OnnxRuntimeSession(run.reference), feeds[0])]
    runners += [run.runner(backend, feeds[0]) for backend in backends]
    logger = require("polygraphy.logger", "compare").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        results = dict(require("polygraphy.comparator", "compare").Comparator.run(runners, data_loader=feeds))
    comparator = StepComparator([found[output] for found in exact], output)
    return [
        StepResult(backend, step, times[step], comparator.output_at(step, reference, results[backend][step]))
        for step, reference in enumerate(results[REFERENCE])
        for backend in backends
    ]


def _compare_layers(
    run: _Run, feeds: list[_Arrays], backends: Sequence[str], times: list[float], progress: bool
) -> tuple[list[LayerResult], dict[str, int], list[str], dict[str, list[str]]]:
    """Layers whose codes differ; codes compared per backend; quantizers; and those that a backend does not have."""
    if not backends:
        return [], {}, [], {}
    graph = require("onnx", "onnx").load(str(run.reference))
    reference = OnnxRuntimeSession(returning_codes(graph))
    output = reference.outputs[0]
    answers = {backend: _layer_by_layer(run, graph, backend) for backend in backends}
    found, counts, names, missing = [], dict.fromkeys(backends, 0), dict[str, None](), {}
    progress_bar = tqdm(feeds, desc="comparing layers", disable=not progress)
    for step, (feed, time) in enumerate(zip(progress_bar, times, strict=True)):
        results = reference(feed)
        expected, given = codes_by_quantizer(results.items()), given_codes(results)
        names.update(dict.fromkeys(expected))
        for backend in backends:
            answer = answers[backend](feed, given)
            own = codes_by_quantizer(answer.items())
            if absent := [name for name in expected if name not in own]:
                missing[backend] = absent
            for name, codes in expected.items():
                if name not in own:
                    continue
                difference = codes_difference(name, codes.values, own[name].values, fp8=codes.fp8)
                counts[backend] += difference.count
                if difference.differing:
                    found.append(LayerResult(backend, step, time, name, difference))
            behind = output_difference(results[output], answer[output], None)
            if not behind:
                found.append(LayerResult(backend, step, time, output, behind))
    return found, counts, list(names), missing


def _layer_by_layer(run: _Run, reference: Any, backend: str) -> Callable[[_Arrays, _Arrays], _Arrays]:
    """From feeds, and codes to compute with, to the codes of every layer."""
    if backend == TORCH or run.lowered is None:
        return lambda feed, given: call_model(run.model, feed, run.fixed, codes=True, given=given)
    onnx, table = require("onnx", "onnx"), run.lowered.table
    file = run.folder / "layers.onnx"
    onnx.save(with_given_codes(run.lowered.graph, reference), str(file))
    session = by_forward_names(COMPARED[backend].open(file))
    return lambda feed, given: session({**feed, **table, **{n: given[n] for n in session.inputs if n in given}})
