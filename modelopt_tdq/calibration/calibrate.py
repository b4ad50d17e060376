"""The ``tdq`` algorithm: one pass over the calibration data, then one column of the table per quantizer."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.model_calib import max_calibrate, mse_calibrate
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.candidates import candidate_grid, histogram_error
from modelopt_tdq.calibration.choose import Evidence, choose_rows
from modelopt_tdq.calibration.distributed import union
from modelopt_tdq.calibration.output_error import output_curves
from modelopt_tdq.calibration.pooling import bin_pooling, optimal_bins, smoothing_pooling, uniform_bins
from modelopt_tdq.calibration.protect import Columns, install, protected_rows
from modelopt_tdq.calibration.replay import Replay
from modelopt_tdq.calibration.snapshot import restored_on_error
from modelopt_tdq.calibration.statistics import StepStatistics
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.errors import TdqError
from modelopt_tdq.fake_quant import SUPPORTED_BITS
from modelopt_tdq.quantizer import TemporalQuantizer
from modelopt_tdq.timestep import CurrentTimestep, deliver_timestep

__all__ = ["Calibration", "collect", "tdq_calibrate"]

#: `asymmetric: auto` takes an offset where it lowers the squared error by this factor (1 dB).
_ASYMMETRIC_GAIN = 10 ** (-1.0 / 10)


@dataclass
class Calibration:
    """What one pass over the calibration data gives.

    Attributes:
        quantizers: The temporal quantizers that saw data, by name.
        times: [K] ascending.
        evidence: By quantizer name.
        replay: A sample of the calls.
    """

    quantizers: dict[str, TemporalQuantizer]
    times: list[float]
    evidence: dict[str, Evidence]
    replay: Replay


def _weight_quantizers(model: nn.Module) -> set[int]:
    return {
        id(quantizer)
        for module in model.modules()
        if isinstance(module, QuantModule)
        for _, quantizer in module.iter_weights_for_calibration()
    }


def _activation_quantizers(model: nn.Module) -> tuple[dict[str, TensorQuantizer], list[TensorQuantizer]]:
    """Enabled per-tensor activation quantizers, and those of other kinds that ModelOpt calibrates itself."""
    weights = _weight_quantizers(model)
    per_tensor, others = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled or id(module) in weights:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, SequentialQuantizer) and id(parent) in weights:
            continue
        plain = module.axis is None and module.block_sizes is None and not module._dynamic
        if not plain or isinstance(parent, SequentialQuantizer) or module._use_constant_amax:
            others.append(module)
            continue
        if module.num_bits not in SUPPORTED_BITS:
            raise TdqError(
                "num_bits", module.num_bits, f"not supported for activations ({name})", f"Use one of {SUPPORTED_BITS}"
            )
        if module.unsigned:
            raise TdqError(
                "unsigned", True, f"time-dependent scales have signed codes ({name})", 'Use `"asymmetric"` instead'
            )
        per_tensor[name] = module
    if not per_tensor:
        raise TdqError(
            "quant_cfg",
            type(model).__name__,
            "it enables no per-tensor activation quantizer of this model",
            "Enable some, e.g. {'quantizer_name': '*input_quantizer', 'cfg': {'num_bits': 8, 'axis': None}}",
        )
    return per_tensor, others


def _temporal_names(patterns: list[str], names: list[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise TdqError(
                "temporal", pattern, "matches no enabled activation quantizer", f"There are, for example, {names[:5]}"
            )
        matched.update(found)
    return matched


def _calibrate_weights(model: nn.Module, method: str) -> None:
    if method != "keep":
        {"max": max_calibrate, "mse": mse_calibrate}[method](model, forward_loop=None)


def _run(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    timestep: CurrentTimestep,
    config: TdqCalibConfig,
    statistics: dict[str, StepStatistics],
    others: list[TensorQuantizer],
) -> Replay:
    """Run ``forward_loop`` once in full precision, collecting."""
    replay = Replay(model, timestep, config.replay_samples)
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled and m._if_quant]
    calibrated = [model.get_submodule(name) for name in statistics] + others
    calls = 0
    with tqdm(total=config.expected_calls, desc="calibrate", unit="call", disable=not config.progress) as bar:

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal calls
            calls += 1
            bar.update()

        handles = [
            model.register_forward_pre_hook(replay.record, with_kwargs=True),
            model.register_forward_hook(count),
        ]
        try:
            for quantizer in quantizers:
                quantizer.disable_quant()
            for quantizer in calibrated:
                quantizer.enable_calib()
            with torch.no_grad():
                forward_loop(model)
        finally:
            for handle in handles:
                handle.remove()
            for quantizer in calibrated:
                quantizer.disable_calib()
            for quantizer in quantizers:
                quantizer.enable_quant()
    if not calls:
        raise TdqError(
            "forward_loop", forward_loop, "it never called the model", "Call the model on calibration data in it"
        )
    for quantizer in others:
        if quantizer._calibrator is not None and quantizer._calibrator.compute_amax() is not None:
            quantizer.load_calib_amax()
    return replay


def _filled(statistics: StepStatistics, times: list[float]) -> Any:
    """Statistics over all times; a time at which this quantizer saw nothing takes the nearest one's."""
    collected = statistics.statistics(times)
    seen = collected.counts.sum(1) > 0
    if bool(seen.all()):
        return collected
    known = seen.nonzero().squeeze(1)
    nearest = known[(torch.arange(len(times)).unsqueeze(1) - known.unsqueeze(0)).abs().argmin(1)]
    return type(collected)(
        collected.counts[nearest], collected.exponent, collected.low[nearest], collected.high[nearest]
    )


def collect(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None, config: TdqCalibConfig) -> Calibration:
    """Promote the activation quantizers, calibrate the weights, and gather the evidence for every scale.

    Raises:
        TdqError: See :func:`tdq_calibrate`. The caller restores the model.
    """
    if forward_loop is None:
        raise TdqError(
            "forward_loop", None, "time-dependent scales need calibration data", "Pass a forward_loop to mtq.quantize"
        )
    per_tensor, others = _activation_quantizers(model)
    _temporal_names(config.temporal, list(per_tensor))
    timestep = deliver_timestep(model, config.timestep_argument)
    _calibrate_weights(model, config.weights)
    calibrators = {name: quantizer._calibrator for name, quantizer in per_tensor.items()}
    statistics = {name: StepStatistics(name, timestep, config.max_steps) for name in per_tensor}
    for name, quantizer in per_tensor.items():
        quantizer._calibrator = statistics[name]
    replay = _run(model, forward_loop, timestep, config, statistics, others)
    times = union(set().union(*(s.times for s in statistics.values())))
    if len(times) < 2 and config.bins != 1:
        raise TdqError(
            "forward_loop",
            times,
            "it visited a single time",
            'Run whole sampling trajectories in it, or ask for static scales with `"bins": 1`',
        )
    quantizers, evidence = {}, {}
    for name, quantizer in tqdm(per_tensor.items(), "errors", disable=not config.progress, unit="layer"):
        quantizer._calibrator = calibrators[name]
        if not statistics[name].times:
            quantizer.disable()  # a layer that the model does not run has nothing to quantize
            continue
        quantizers[name] = TemporalQuantizer.from_tensor_quantizer(quantizer, timestep)
        evidence[name] = _activation_evidence(statistics[name], times, quantizer, config)
    if config.statistic == "output":
        for name, curves in output_curves(model, evidence, replay, times, config.smoothing, config.progress).items():
            known = evidence[name]
            evidence[name] = Evidence(known.statistics, curves, known.num_bits, known.asymmetric)
    return Calibration(quantizers, times, evidence, replay)


def _activation_evidence(
    statistics: StepStatistics, times: list[float], quantizer: TemporalQuantizer, config: TdqCalibConfig
) -> Evidence:
    rows = _filled(statistics, times)
    options = []
    for asymmetric in (False, True) if config.asymmetric == "auto" else (bool(config.asymmetric),):
        if asymmetric and not isinstance(quantizer.num_bits, int):
            continue  # FP8 has a sign of its own
        grid = candidate_grid(rows, quantizer.num_bits, asymmetric)
        options.append(Evidence(rows, histogram_error(rows, *grid, quantizer.num_bits), quantizer.num_bits, asymmetric))
    if not options:
        grid = candidate_grid(rows, quantizer.num_bits, False)
        options.append(Evidence(rows, histogram_error(rows, *grid, quantizer.num_bits), quantizer.num_bits, False))
    if len(options) == 2:
        plain, shifted = (float(option.curves.error.amin(1).sum()) for option in options)
        return options[1] if shifted < plain * _ASYMMETRIC_GAIN else options[0]
    return options[0]


def _row_error(evidence: Evidence, scale: Tensor) -> Tensor:
    """[K] squared error of each row at the candidate nearest to its scale."""
    distance = (evidence.curves.scale.log().unsqueeze(0) - scale.log().unsqueeze(1)).abs()
    return evidence.curves.error.gather(1, distance.argmin(1, keepdim=True)).squeeze(1)


def _columns(evidence: Evidence, config: TdqCalibConfig, temporal: bool) -> tuple[Tensor, Tensor | None]:
    """Scale [K] and offset [K] (None if symmetric) of one quantizer."""
    rows = len(evidence.statistics.low)
    one = torch.ones(1, rows, dtype=torch.float64)
    scale, offset = (v.expand(rows) for v in choose_rows(evidence, one, config.statistic, config.percentile))
    if temporal and config.bins != 1:
        if config.bins == "per_step":
            pooling = smoothing_pooling(rows, config.smoothing)
        elif config.bins == "optimal":
            pooling = bin_pooling(optimal_bins(evidence.curves.error, config.max_bins))
        else:
            pooling = bin_pooling(uniform_bins(rows, int(config.bins)))
        new_scale, new_offset = choose_rows(evidence, pooling, config.statistic, config.percentile)
        gain = _row_error(evidence, scale).sum() / _row_error(evidence, new_scale).sum().clamp(min=1e-300)
        if config.keep_static_below is None or 10 * math.log10(max(float(gain), 1e-30)) >= config.keep_static_below:
            scale, offset = new_scale, new_offset
    return scale.contiguous(), offset.contiguous() if bool(offset.any()) else None


def tdq_calibrate(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate the activation quantizers of a ModelOpt-quantized model per time step.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: Calls the model on calibration data, over whole sampling trajectories.
        **fields: Fields of :class:`modelopt_tdq.config.TdqCalibConfig`.

    Raises:
        TdqError: ``forward_loop`` is missing, never runs, visits a single time, or meets NaN or infinity;
            a field, pattern or number format cannot be used. The model is left as it was.
    """
    known = {name: value for name, value in fields.items() if name in TdqCalibConfig.model_fields}
    config = TdqCalibConfig(**known)
    with restored_on_error(model):
        calibration = collect(model, forward_loop, config)
        follow = _temporal_names(config.temporal, list(calibration.quantizers))
        temporal: Columns = {n: _columns(e, config, n in follow) for n, e in calibration.evidence.items()}
        if config.protect_steps and config.bins != 1:
            static = {n: _columns(e, config, False) for n, e in calibration.evidence.items()}
            temporal, _ = protected_rows(
                model, calibration.quantizers, calibration.replay, calibration.times, temporal, static, config.progress
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        install(calibration.quantizers, torch.tensor(calibration.times), temporal, device)
