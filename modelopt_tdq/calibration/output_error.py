"""Error of a layer's output for candidate input scales, over its real inputs and its quantized weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.candidates import ErrorCurves, shifted_pairs
from modelopt_tdq.calibration.choose import Evidence
from modelopt_tdq.calibration.pooling import smoothing_pooling
from modelopt_tdq.core.distributed import all_reduce, processes
from modelopt_tdq.core.fake_quant import code_range, fake_quantize, symmetric_scale
from modelopt_tdq.core.schedule import nearest_known
from modelopt_tdq.model.call import first_output, layer_input
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import has_batch

__all__ = ["LayerProbe", "output_curves", "run_probes"]

#: Candidate scales per quantizer; between these fractions of the smallest and of the largest per-row optimum.
_CANDIDATES = 16
_BELOW, _ABOVE = 0.7, 2.0

#: Fractions of the shorter side of zero that the best offset of a row covers, tried beside it.
_COVERAGES = ((1.0, 0.6), (1.0,))

#: Largest number of elements in one probe of a layer.
_PROBE_ELEMENTS = 1 << 23


def _around(base: Tensor, unclipped: Tensor) -> Tensor:
    """[_CANDIDATES] scales around ``base``, up to the largest of those that clip nothing."""
    low = _BELOW * float(base.min())
    high = max(min(_ABOVE * float(base.max()), float(unclipped.max())), 1.01 * low)
    return torch.logspace(0, 1, _CANDIDATES, base=high / low) * low


def _refined(evidence: Evidence, smoothing: float) -> tuple[Tensor, Tensor]:
    """Candidates [C] around the optima of the activation's own error; the symmetric ones whether asymmetric or not."""
    curves, statistics, num_bits = evidence.curves, evidence.statistics, evidence.num_bits
    pooling = smoothing_pooling(curves.error.shape[0], smoothing)
    plain = curves.symmetric()
    scale = _around(plain.scale[plain.best(pooling)], symmetric_scale(statistics.amax, num_bits))
    zero = torch.zeros_like(scale)
    moved = curves.shifted()
    if not evidence.asymmetric or len(moved.scale) == 0:
        return scale, zero
    best = moved.best(pooling)
    base, offset = moved.scale[best], moved.offset[best]
    smallest, largest = code_range(num_bits)
    spread = statistics.high.clamp(min=0) - statistics.low.clamp(max=0)
    grid = _around(base, spread / (largest - smallest))
    useful = (grid.unsqueeze(1) >= _BELOW * base) & (grid.unsqueeze(1) <= _ABOVE * base)
    low, high = base * smallest + offset, base * largest + offset
    pairs = shifted_pairs(grid, low, high, useful, num_bits, _COVERAGES, 2 * _CANDIDATES)
    return torch.cat([scale, pairs[0]]), torch.cat([zero, pairs[1]])


class LayerProbe(Protocol):
    """A forward hook on one layer, for :func:`run_probes`.

    Attributes:
        row: Of the time of the call.
        places: Of this process's samples among all of the call; none if the call only stands in.
    """

    row: int
    places: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See the layer's inputs and output."""


def run_probes(
    model: nn.Module,
    probes: Sequence[tuple[nn.Module, LayerProbe]],
    replay: Replay,
    times: list[float],
    description: str,
    progress: bool,
) -> None:
    """Run the replayed calls in full precision, with each probe on its layer."""
    handles = [layer.register_forward_hook(probe, with_kwargs=True) for layer, probe in probes]
    try:
        with full_precision(model), torch.no_grad():
            for batch in tqdm(replay.batches(times), description, len(times), disable=not progress, unit="step"):
                places = replay.places(times[batch.row], batch.order)
                for _, probe in probes:
                    probe.row, probe.places = batch.row, places
                model(**batch.call)
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Forward hook on one layer: compares its output with that for every candidate."""

    def __init__(self, layer: QuantModule, evidence: Evidence, smoothing: float, rows: int) -> None:
        self.layer, self.num_bits = layer, evidence.num_bits
        self.scale, self.offset = _refined(evidence, smoothing)
        self.error = torch.zeros(rows, len(self.scale), dtype=torch.float64)
        self.energy = torch.zeros(rows, dtype=torch.float64)
        self.row = 0
        self.places: tuple[int, ...] = ()
        self._busy = False

    @contextmanager
    def _quantized_weights_only(self) -> Iterator[None]:
        quantizer = self.layer.input_quantizer
        with ExitStack() as stack:
            stack.enter_context(quantizer.disable_pre_quant_scale())
            disabled, quantizer._disabled = quantizer._disabled, True
            self.layer.weight_quantizer.enable_quant()
            try:
                yield
            finally:
                quantizer._disabled = disabled
                self.layer.weight_quantizer.disable_quant()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            given = layer_input(args, kwargs)
            x, y = self.layer.input_quantizer(given), first_output(output)
            if self.places:
                self.energy[self.row] += float(y.double().square().sum())
            scale, offset = self.scale.to(x.device), self.offset.to(x.device)
            shift = self.layer.input_quantizer.shift_at_call(x)
            batched = has_batch(self.layer, x)
            chunk = max(1, _PROBE_ELEMENTS // max(x.numel(), y.numel())) if batched else 1
            if processes() > 1:
                chunk = 1  # as many calls of the layer in all, whatever the batch: they may communicate
            shape = (-1,) + (1,) * x.dim()
            with self._quantized_weights_only():
                for start in range(0, len(scale), chunk):
                    part = slice(start, start + chunk)
                    offsets = offset[part].reshape(shape)
                    if shift is not None:
                        offsets = offsets + shift
                    tried = fake_quantize(x.unsqueeze(0), scale[part].reshape(shape), offsets, self.num_bits)
                    tried = tried.flatten(0, 1) if batched else tried.squeeze(0)
                    positional = [tried if value is given else value for value in args]
                    named = {name: tried if value is given else value for name, value in kwargs.items()}
                    result = first_output(self.layer(*positional, **named))
                    error = (result.reshape(-1, *y.shape) - y).float().square().flatten(1).sum(1)
                    if self.places:
                        self.error[self.row, part] += error.double().cpu()
        finally:
            self._busy = False

    def curves(self, times: Tensor) -> ErrorCurves | None:
        """Over all processes; a time at which the layer did not run has those of the nearest time.

        None if it never ran, or was given nothing but zeros.
        """
        error, energy = all_reduce(self.error, "sum"), all_reduce(self.energy, "sum")
        seen = error.sum(1) > 0
        if not bool(seen.any()):
            return None
        nearest = nearest_known(times, seen)
        return ErrorCurves(self.scale, self.offset, error[nearest], energy[nearest])


def output_curves(
    model: nn.Module,
    evidence: dict[str, Evidence],
    replay: Replay,
    times: list[float],
    smoothing: float,
    progress: bool,
) -> dict[str, ErrorCurves]:
    """Squared error of layer outputs for candidate scales, at each time, on replayed inputs.

    The layer's input is the full-precision one; its weights are quantized.

    Args:
        model: The model, its weight quantizers calibrated.
        evidence: By quantizer name; those that are not the input of a layer with quantized weights
            (operands of attention products), or whose layer does not run in ``replay``, are left out of the result.
        replay: Recorded calls.
        times: [K], the rows.
        smoothing: As in the config; candidates lie around the optima of the smoothed rows.
        progress: Show a progress bar.
    """
    probes: dict[str, _Probe] = {}
    for name, known in evidence.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        weight_quantizer = getattr(parent, "weight_quantizer", None)
        quantizer = getattr(parent, "input_quantizer", None)
        if isinstance(weight_quantizer, TensorQuantizer) and isinstance(quantizer, TemporalQuantizer):
            probes[name] = _Probe(parent, known, smoothing, len(times))
    run_probes(model, [(probe.layer, probe) for probe in probes.values()], replay, times, "output error", progress)
    rows = torch.tensor(times)
    found = {name: probe.curves(rows) for name, probe in probes.items()}
    return {name: curves for name, curves in found.items() if curves is not None}
