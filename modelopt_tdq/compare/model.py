"""``compare_model``: the quantized torch model against what it was exported to, per time step and per layer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modelopt_tdq.calibration.output_error import full_precision
from modelopt_tdq.compare.layers import GIVEN, code_tensors, given_codes, with_given_codes
from modelopt_tdq.compare.metrics import CodesDifference, OutputDifference, codes_difference
from modelopt_tdq.compare.runners import OUTPUT, call_model, session_runner, torch_runner
from modelopt_tdq.compare.steps import CODES_SUFFIX, StepComparator
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.inputs import flatten_inputs
from modelopt_tdq.timestep import find_timestep

__all__ = ["BACKENDS", "REFERENCE", "LayerResult", "ModelComparison", "StepResult", "compare_model"]

#: What can be compared with the reference.
BACKENDS = ("torch", "onnxruntime", "openvino")

#: Name of the reference: the reference graph in ONNX Runtime, run node by node.
REFERENCE = "reference"


@dataclass(frozen=True)
class StepResult:
    """One backend at one time step.

    Attributes:
        backend: Its name.
        time: Of the step, in the model's own units; the smallest where every sample has its own.
        difference: Of the model's first output.
    """

    backend: str
    time: float
    difference: OutputDifference


@dataclass(frozen=True)
class LayerResult:
    """One layer of one backend at one time step, given the reference's codes.

    Attributes:
        backend: Its name.
        time: Of the step, in the model's own units.
        difference: Of the codes of the layer's input.
    """

    backend: str
    time: float
    difference: CodesDifference


@dataclass(frozen=True)
class ModelComparison:
    """What :func:`compare_model` found.

    Attributes:
        steps: The output, per backend and step.
        layers: The layers whose codes differ, be it by rounding only, in the order in which they run.
        compared_codes: Codes compared per backend, over all steps and layers.
    """

    steps: tuple[StepResult, ...]
    layers: tuple[LayerResult, ...]
    compared_codes: Mapping[str, int]

    @property
    def passed(self) -> bool:
        """Whether no output differs by more than the quantization noise, and no layer by more than rounding."""
        return all(step.difference for step in self.steps) and not self.faults

    @property
    def faults(self) -> tuple[LayerResult, ...]:
        """The layers that rounding does not explain: first those of the first step, in the order they run."""
        return tuple(layer for layer in self.layers if not layer.difference)


def compare_model(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    backends: Sequence[str] = BACKENDS,
    layers: bool = True,
    reference_path: str | os.PathLike[str] | None = None,
    ratio_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ModelComparison:
    """Run a quantized model in several backends over several time steps, and compare.

    The yardstick is the reference graph in ONNX Runtime; "torch" is the model itself, "onnxruntime" and
    "openvino" run the graph lowered by ratios. (OpenVINO converts to FP8 by way of float16, which moves about
    4 in 1000 codes by a step, so an FP8 model may well differ by more than its quantization noise there.)

    Args:
        model: The module that ``mtq.quantize`` was called with.
        inputs: Arguments of the model's ``forward`` by name, one mapping per time step; their shapes, and
            what is no tensor, are the same in all of them.
        backends: Which to compare.
        layers: Compare codes, layer by layer, too ("openvino" fuses differently then, and is left out).
        reference_path: The reference graph, if it has been exported already.
        ratio_path: The lowered graph, likewise.
        progress: Show a progress bar.

    Raises:
        TdqError: A backend is not known, there are no inputs, or export fails.
        MissingExtraError: Polygraphy or a backend is not installed.
    """
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise TdqError("backends", unknown, "not known", f"Use some of {', '.join(BACKENDS)}")
    calls = list(inputs)
    if not calls:
        raise TdqError("inputs", calls, "empty", "Pass the arguments of one call per time step")
    delivery = find_timestep(model)
    argument = None if delivery is None else delivery.argument
    flat = [flatten_inputs(call, argument) for call in calls]
    feeds = [{n: t.detach().cpu().numpy() for n, t in zip(f.names, f.tensors, strict=True)} for f in flat]
    fixed = flat[0].rest
    times = [float(np.min(feed[argument])) if argument in feed else float(k) for k, feed in enumerate(feeds)]
    with tempfile.TemporaryDirectory() as folder:
        graphs = _graphs(model, calls[0], Path(folder), reference_path, ratio_path, backends)
        with full_precision(model):
            exact = [call_model(model, feed, fixed)[OUTPUT] for feed in feeds]
        steps = _compare_outputs(model, graphs, feeds, fixed, backends, exact, times)
        compared = [backend for backend in backends if backend != "openvino"] if layers else []
        found, counts = _compare_layers(model, graphs, feeds, fixed, compared, times, progress)
    return ModelComparison(tuple(steps), tuple(found), counts)


def _graphs(
    model: nn.Module,
    sample: Mapping[str, Any],
    folder: Path,
    reference_path: str | os.PathLike[str] | None,
    ratio_path: str | os.PathLike[str] | None,
    backends: Sequence[str],
) -> dict[str, Path]:
    from modelopt_tdq.export.onnx_export import export_onnx

    graphs = {}
    if reference_path is None:
        reference_path = export_onnx(model, folder / "reference.onnx", sample, lowering="reference").path
    graphs["reference"] = Path(reference_path)
    if any(backend != "torch" for backend in backends):
        if ratio_path is None:
            ratio_path = export_onnx(model, folder / "ratio.onnx", sample, lowering="ratio").path
        graphs["ratio"] = Path(ratio_path)
    return graphs


def _compare_outputs(
    model: nn.Module,
    graphs: Mapping[str, Path],
    feeds: list[dict[str, Any]],
    fixed: Mapping[str, Any],
    backends: Sequence[str],
    exact: list[Any],
    times: list[float],
) -> list[StepResult]:
    """All steps in all backends, by Polygraphy's own Comparator."""
    from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession
    from modelopt_tdq.runtime.openvino import OpenVinoSession

    runners = [session_runner(REFERENCE, OnnxRuntimeSession(graphs["reference"]), feeds[0])]
    for backend in backends:
        if backend == "torch":
            runners.append(torch_runner(model, feeds[0], fixed=fixed))
        elif backend == "onnxruntime":
            runners.append(session_runner(backend, OnnxRuntimeSession(graphs["ratio"]), feeds[0]))
        else:
            runners.append(session_runner(backend, OpenVinoSession(graphs["ratio"]), feeds[0]))
    logger = require("polygraphy.logger", "compare").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        results = dict(require("polygraphy.comparator", "compare").Comparator.run(runners, data_loader=feeds))
    comparator = StepComparator(exact, OUTPUT)
    return [
        StepResult(backend, times[step], comparator.output_at(step, reference, results[backend][step]))
        for step, reference in enumerate(results[REFERENCE])
        for backend in backends
    ]


def _compare_layers(
    model: nn.Module,
    graphs: Mapping[str, Path],
    feeds: list[dict[str, Any]],
    fixed: Mapping[str, Any],
    backends: Sequence[str],
    times: list[float],
    progress: bool,
) -> tuple[list[LayerResult], dict[str, int]]:
    from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession

    found: list[LayerResult] = []
    counts = dict.fromkeys(backends, 0)
    if not backends:
        return found, counts
    onnx = require("onnx", "onnx")
    reference = OnnxRuntimeSession(graphs["reference"], codes=True)
    fp8 = code_tensors(onnx.load(str(graphs["reference"])))
    if "onnxruntime" in backends:
        lowered = onnx.load(str(graphs["ratio"]))
        plain = OnnxRuntimeSession(lowered, codes=True)
        cut = OnnxRuntimeSession(with_given_codes(lowered), codes=True)
    for feed, time in zip(tqdm(feeds, desc="comparing layers", disable=not progress), times, strict=True):
        expected = reference(feed)
        for backend in backends:
            if backend == "torch":
                codes = call_model(model, feed, fixed, codes=True, given=_only_codes(expected))
            else:
                given = given_codes(expected, _only_codes(plain(feed)))
                codes = cut({**feed, **{name + GIVEN: array for name, array in given.items()}})
            for name, is_fp8 in fp8.items():
                if name not in codes:
                    continue
                difference = codes_difference(name.removesuffix(CODES_SUFFIX), expected[name], codes[name], fp8=is_fp8)
                counts[backend] += difference.count
                if difference.differing:
                    found.append(LayerResult(backend, time, difference))
    return found, counts


def _only_codes(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in results.items() if CODES_SUFFIX in name}
