"""The parts of a comparison, in which one session is open at a time: a large model fits in memory once, not twice.

What a part finds is kept when a later one fails.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from tqdm import tqdm

from modelopt_tdq.compare.backends import ComparedBackend, DeployedGraph
from modelopt_tdq.compare.graph_files import graph_of
from modelopt_tdq.compare.layers import codes_by_quantizer, given_codes, returning_codes, with_given_codes
from modelopt_tdq.compare.metrics import codes_difference, output_difference
from modelopt_tdq.compare.results import LayerResult, PartFailure, StepResult
from modelopt_tdq.compare.runners import call_model, opened_runner, torch_runner
from modelopt_tdq.compare.steps import StepComparator
from modelopt_tdq.errors import require
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.runtime.sessions.forward_names import by_forward_names
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

__all__ = ["REFERENCE", "Arrays", "Compared", "Layers", "compare_layers", "compare_outputs"]

#: Name of the reference: the reference graph in ONNX Runtime, run node by node.
REFERENCE = "reference"

#: An array by the name of an input or output, of one call.
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """What is compared: the model, its calls, and the graphs; and a folder for more of them.

    Attributes:
        model: The quantized model.
        fixed: A call, whose arguments that are no tensors all have.
        feeds: The tensors of each call.
        times: Of each call.
        reference: The reference graph.
        lowered: The graph that backends run, if there are any.
        backends: How each of them is run; None: the model itself.
        files: What a backend runs in place of the graph.
        folder: For files that are of use meanwhile.
        failures: Of what has been compared.
    """

    model: nn.Module
    fixed: Mapping[str, Any]
    feeds: list[Arrays]
    times: list[float]
    reference: Path
    lowered: DeployedGraph | None
    backends: Mapping[str, ComparedBackend | None]
    files: Mapping[str, Any]
    folder: Path
    failures: list[PartFailure] = field(default_factory=list)

    @contextmanager
    def kept(self, backend: str, part: Literal["outputs", "layers"]) -> Iterator[None]:
        """What fails in the body is one of the ``failures``."""
        try:
            yield
        except Exception as error:  # whatever it is: the results of the other parts are worth hours
            traceback.clear_frames(error.__traceback__)  # which would keep their sessions open
            self.failures.append(PartFailure(backend, part, error))
        gc.collect()  # a session that is closed gives its memory back before the next is opened

    def runner(self, backend: str) -> Any:
        """Of Polygraphy."""
        kind, lowered = self.backends[backend], self.lowered
        if kind is None or lowered is None:
            return torch_runner(self.model, self.feeds[0], fixed=self.fixed)
        file = Path(self.files.get(backend, lowered.path))
        if kind.engine:  # it holds its table
            return opened_runner(backend, self.feeds[0], lambda: by_forward_names(kind.open(file, lowered.table)))
        return opened_runner(backend, self.feeds[0], lambda: by_forward_names(kind.open(file)), lowered.table)


def compare_outputs(compared: Compared) -> list[StepResult]:
    """All steps in all backends, by Polygraphy's own Comparator."""
    with full_precision(compared.model):
        exact = [call_model(compared.model, feed, compared.fixed) for feed in compared.feeds]
    output = next(iter(exact[0]))
    comparator = StepComparator([found[output] for found in exact], output)
    reference = opened_runner(REFERENCE, compared.feeds[0], lambda: OnnxRuntimeSession(compared.reference))
    expected = _run(reference, compared.feeds)
    gc.collect()
    found = []
    for backend in compared.backends:
        with compared.kept(backend, "outputs"):
            pairs = enumerate(zip(expected, _run(compared.runner(backend), compared.feeds), strict=True))
            differences = [(step, comparator.output_at(step, *pair)) for step, pair in pairs]
            found += [StepResult(backend, step, compared.times[step], differing) for step, differing in differences]
    return sorted(found, key=lambda result: result.step)


def _run(runner: Any, feeds: list[Arrays]) -> list[Any]:
    """The outputs of each call."""
    logger = require("polygraphy.logger", "compare").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        results = require("polygraphy.comparator", "compare").Comparator.run([runner], data_loader=feeds)
    return list(next(iter(dict(results).values())))


@dataclass
class Layers:
    """What a comparison of layers found.

    Attributes:
        found: Layers whose codes differ, in the order in which they run in each step.
        counts: Codes compared per backend.
        names: Of the quantizers, in the order in which they run.
        missing: Quantizers that a backend does not have.
    """

    found: list[LayerResult]
    counts: dict[str, int]
    names: dict[str, None] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)


def compare_layers(compared: Compared, backends: Sequence[str], progress: bool) -> Layers:
    """Codes of the reference, which are kept in files; then one backend after another is given them."""
    layers = Layers([], dict.fromkeys(backends, 0))
    stored: list[_Stored] = []
    total = len(compared.feeds) * (1 + len(backends)) if backends else 0
    with tqdm(total=total, desc="comparing layers", disable=not progress or not backends) as progress_bar:
        if backends:
            with compared.kept(REFERENCE, "layers"):
                stored = _reference_codes(compared, progress_bar)
        for backend in backends if stored else ():
            with compared.kept(backend, "layers"):
                _compare_backend(compared, layers, backend, stored, progress_bar)
    order = {backend: position for position, backend in enumerate(backends)}
    layers.found.sort(key=lambda layer: (layer.step, order[layer.backend]))
    return layers


@dataclass(frozen=True)
class _Stored:
    """What the reference returned for one call, in a file."""

    file: Path
    names: list[str]

    @classmethod
    def of(cls, results: Arrays, file: Path) -> _Stored:
        """Codes take a byte there, those of FP8 two."""
        kinds = {"int8": np.int8, "fp8": np.float16}
        arrays = [np.asarray(v).astype(kinds.get(n.rpartition(":")[2], v.dtype)) for n, v in results.items()]
        np.savez(file, *arrays)
        return cls(file, list(results))

    def read(self) -> Arrays:
        """As it was returned."""
        with np.load(self.file) as stored:
            arrays = {name: stored[f"arr_{index}"] for index, name in enumerate(self.names)}
        return {n: v.astype(np.float32) if n.endswith((":int8", ":fp8")) else v for n, v in arrays.items()}


def _reference_codes(compared: Compared, progress_bar: Any) -> list[_Stored]:
    graph = returning_codes(graph_of(compared.reference, compared.folder))
    session, stored = OnnxRuntimeSession(_saved(graph, compared.folder / "codes.onnx")), []
    for step, feed in enumerate(compared.feeds):
        stored.append(_Stored.of(session(feed), compared.folder / f"codes_{step}.npz"))
        progress_bar.update()
    return stored


def _compare_backend(
    compared: Compared, layers: Layers, backend: str, stored: list[_Stored], progress_bar: Any
) -> None:
    answer = _layer_by_layer(compared, backend)
    for step, results in enumerate(stored):
        _compare_step(compared, layers, backend, step, results.read(), answer)
        progress_bar.update()


def _compare_step(
    compared: Compared,
    layers: Layers,
    backend: str,
    step: int,
    results: Arrays,
    answer: Callable[[Arrays, Arrays], Arrays],
) -> None:
    time, output, expected = compared.times[step], next(iter(results)), codes_by_quantizer(results.items())
    layers.names.update(dict.fromkeys(expected))
    answered = answer(compared.feeds[step], given_codes(results))
    own = codes_by_quantizer(answered.items())
    if absent := [name for name in expected if name not in own]:
        layers.missing[backend] = absent
    for name, codes in expected.items():
        if name not in own:
            continue
        difference = codes_difference(name, codes.values, own[name].values, fp8=codes.fp8)
        layers.counts[backend] += difference.count
        if difference.differing:
            layers.found.append(LayerResult(backend, step, time, name, difference))
    behind = output_difference(results[output], answered[output], None)
    if not behind:
        layers.found.append(LayerResult(backend, step, time, output, behind))


def _layer_by_layer(compared: Compared, backend: str) -> Callable[[Arrays, Arrays], Arrays]:
    """From feeds, and codes to compute with, to the codes of every layer."""
    kind, lowered = compared.backends[backend], compared.lowered
    if kind is None or lowered is None:
        return lambda feed, given: call_model(compared.model, feed, compared.fixed, codes=True, given=given)
    reference = graph_of(compared.reference, compared.folder)
    cut = _saved(with_given_codes(lowered.graph, reference), compared.folder / "layers.onnx")
    session, table = by_forward_names(kind.open(cut)), lowered.table
    return lambda feed, given: session({**feed, **table, **{n: given[n] for n in session.inputs if n in given}})


def _saved(graph: Any, file: Path) -> Path:
    require("onnx", "onnx").save(graph, str(file))
    return file
