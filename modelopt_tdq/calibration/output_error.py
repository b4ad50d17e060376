"""Error of a layer's output for candidate input scales, over its real inputs and its quantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.candidates import ErrorCurves, affine_offset, symmetric_scale
from modelopt_tdq.calibration.choose import Evidence
from modelopt_tdq.calibration.pooling import smoothing_pooling
from modelopt_tdq.core.distributed import all_reduce, processes
from modelopt_tdq.core.fake_quant import code_range, fake_quantize
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay

__all__ = ["output_curves"]

#: Candidate scales per quantizer; between 0.7 of the smallest and twice the largest per-row optimum.
_CANDIDATES = 16

#: Largest number of elements in one probe of a layer.
_PROBE_ELEMENTS = 1 << 23


def _refined(evidence: Evidence, smoothing: float) -> tuple[Tensor, Tensor]:
    """Candidates [C] around the optima of the activation's own error."""
    curves, statistics = evidence.curves, evidence.statistics
    best = curves.best(smoothing_pooling(curves.error.shape[0], smoothing))
    base = curves.scale[best]
    low = 0.7 * float(base.min())
    smallest, _ = code_range(evidence.num_bits)
    if not evidence.asymmetric:
        unclipped = float(symmetric_scale(statistics.amax, evidence.num_bits).max())
        high = max(min(2.0 * float(base.max()), unclipped), 1.01 * low)
        scale = torch.logspace(0, 1, _CANDIDATES, base=high / low) * low
        return scale, torch.zeros_like(scale)
    scale = torch.logspace(0, 1, _CANDIDATES, base=2.0 * float(base.max()) / low) * low
    represented = (base * smallest + curves.offset[best]).median()
    pairs = {
        (s, o): None
        for coverage in (1.0, 0.6)
        for s, o in zip(
            scale.tolist(), affine_offset(scale, represented * coverage, evidence.num_bits).tolist(), strict=True
        )
    }
    table = torch.tensor(list(pairs))
    return table[:, 0].contiguous(), table[:, 1].contiguous()


class _Probe:
    """Forward hook on one layer: compares its output with that for every candidate."""

    def __init__(self, layer: QuantModule, evidence: Evidence, smoothing: float, rows: int) -> None:
        self.layer, self.num_bits = layer, evidence.num_bits
        self.scale, self.offset = _refined(evidence, smoothing)
        self.error = torch.zeros(rows, len(self.scale), dtype=torch.float64)
        self.energy = torch.zeros(rows, dtype=torch.float64)
        self.row = 0
        self.counts = True
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._busy or not args:
            return
        self._busy = True
        try:
            x, y = self.layer.input_quantizer(args[0]), first_output(output)
            if self.counts:
                self.energy[self.row] += float(y.double().square().sum())
            scale, offset = self.scale.to(x.device), self.offset.to(x.device)
            chunk = max(1, _PROBE_ELEMENTS // max(x.numel(), y.numel()))
            if processes() > 1:
                chunk = 1  # as many calls of the layer in all, whatever the batch: they may communicate
            shape = (-1,) + (1,) * x.dim()
            with self._quantized_weights_only():
                for start in range(0, len(scale), chunk):
                    part = slice(start, start + chunk)
                    candidates = fake_quantize(
                        x.unsqueeze(0), scale[part].reshape(shape), offset[part].reshape(shape), self.num_bits
                    )
                    result = first_output(self.layer(candidates.flatten(0, 1), *args[1:]))
                    error = (result.reshape(-1, *y.shape) - y).float().square().flatten(1).sum(1)
                    if self.counts:
                        self.error[self.row, part] += error.double().cpu()
        finally:
            self._busy = False


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
            (operands of attention products) are left out of the result.
        replay: Recorded calls.
        times: [K], the rows.
        smoothing: As in the config; candidates lie around the optima of the smoothed rows.
        progress: Show a progress bar.
    """
    probes: dict[str, _Probe] = {}
    handles = []
    for name, known in evidence.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        weight_quantizer = getattr(parent, "weight_quantizer", None)
        quantizer = getattr(parent, "input_quantizer", None)
        if isinstance(weight_quantizer, TensorQuantizer) and isinstance(quantizer, TemporalQuantizer):
            probes[name] = _Probe(parent, known, smoothing, len(times))
            handles.append(parent.register_forward_hook(probes[name]))
    try:
        with full_precision(model), torch.no_grad():
            bar = tqdm(replay.batches(times), "output error", len(times), disable=not progress, unit="step")
            for batch in bar:
                for probe in probes.values():
                    probe.row, probe.counts = batch.row, batch.own
                model(**batch.call)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: ErrorCurves(p.scale, p.offset, all_reduce(p.error, "sum"), all_reduce(p.energy, "sum"))
        for name, p in probes.items()
    }
