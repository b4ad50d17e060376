"""One pass over the calibration data, in full precision: the evidence for every scale."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.channel_smoothing import Channels, smooth_channels, undo_channel_smoothing
from modelopt_tdq.calibration.choose import Evidence, own_curves
from modelopt_tdq.calibration.columns import worth_an_offset
from modelopt_tdq.calibration.growth import common_growth
from modelopt_tdq.calibration.others import load_amax
from modelopt_tdq.calibration.output_error import output_curves
from modelopt_tdq.calibration.statistics import ActivationStatistics, StepStatistics, too_many_times
from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.core.distributed import agreed, gather, union
from modelopt_tdq.core.schedule import nearest_known
from modelopt_tdq.core.time_weights import squared_weights, warn_of_other_times
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.model.caches import require_no_cache
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.multiply_adds import remember_multiply_adds
from modelopt_tdq.model.place import release, require_unattended
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.recording import counted_calls
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import activation_quantizers, temporal_names
from modelopt_tdq.model.stored_weight import at_rest
from modelopt_tdq.model.timestep import CurrentTimestep, deliver_timestep
from modelopt_tdq.model.token_times import readers
from modelopt_tdq.model.unquantized import forget_left_out, leave_out
from modelopt_tdq.model.weight_fit import require_own_weights, require_smoothed_weights
from modelopt_tdq.model.wrapped import require_plain_parts

__all__ = ["Calibration", "collect"]


#: What becomes of a forward_loop over data that can be read only once.
_TWICE = "Call the model on calibration data in it, each of the two times that it runs with `channel_smoothing`"
_RUNS_ONCE = (
    "channels are not smoothed: forward_loop called the model in its first run and not in its second, in which the "
    "scales of smoothed activations are found. Let it begin anew with its data each time it is called, or set "
    '"channel_smoothing": "none"'
)


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


def _run(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    timestep: CurrentTimestep,
    config: CalibrationFields,
    statistics: dict[str, StepStatistics],
    others: list[TensorQuantizer],
    replay: Replay | None = None,
) -> bool:
    """Run ``forward_loop`` once in full precision, collecting, and recording into ``replay``.

    Returns:
        Whether it called the model, in any process.
    """
    description = "smoothed" if replay is None else "calibrate"
    recording = nullcontext() if replay is None else replay.recording(model)
    quantizers = {name: model.get_submodule(name) for name in statistics}
    calibrators = {name: quantizer._calibrator for name, quantizer in quantizers.items()}
    calibrated = [*quantizers.values(), *others]
    with counted_calls(model, timestep, description, config.expected_calls, config.progress) as calls:
        try:
            for name, quantizer in quantizers.items():
                quantizer._calibrator = statistics[name]
            for quantizer in calibrated:
                quantizer.enable_calib()
            with recording, full_precision(model), require_own_weights(model), torch.no_grad():
                forward_loop(model)
        finally:
            for quantizer in calibrated:
                quantizer.disable_calib()
            for name, quantizer in quantizers.items():
                quantizer._calibrator = calibrators[name]
    at_rest(model)
    if not any(gather(calls())):
        return False
    load_amax(model, others)
    if replay is not None:
        replay.agree()
    return True


def _filled(statistics: StepStatistics, times: list[float]) -> ActivationStatistics:
    """Statistics over all times; a time at which this quantizer saw nothing takes those of the nearest time."""
    collected = statistics.statistics(times)
    seen = collected.seen
    return collected if bool(seen.all()) else collected.at(nearest_known(torch.tensor(times), seen))


def collect(
    model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None, config: CalibrationFields
) -> Calibration:
    """Promote the activation quantizers, calibrate the weights, and gather the evidence for every scale.

    Raises:
        TdqError: See :func:`tdq_calibrate`. The caller restores the model.
    """
    if forward_loop is None:
        raise TdqError(
            "forward_loop", None, "time-dependent scales need calibration data", "Pass a forward_loop to mtq.quantize"
        )
    require_no_cache(model, "be calibrated")
    forget_left_out(model)
    require_unattended(model, "be calibrated")
    require_plain_parts(model)
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            release(module)
    per_tensor, others = activation_quantizers(model)
    _require_the_same(model, config)
    follow = temporal_names(config.temporal, list(per_tensor))
    timestep = deliver_timestep(model, config.timestep_argument)
    if config.weights != "keep":  # else the weights stay as they are, with what they were multiplied by
        require_smoothed_weights(model)
        undo_channel_smoothing(model)
    channels = Channels(model, per_tensor, config)
    layers, static = readers(model), config.bins == 1

    def collected(names: Iterable[str]) -> dict[str, StepStatistics]:
        return {
            name: StepStatistics(name, timestep, config.max_steps, layers.get(name), name in follow and not static)
            for name in names
        }

    statistics = collected(per_tensor)
    replay = Replay(model, timestep, config.replay_samples)
    with channels.observed(model, timestep):
        called = _run(model, forward_loop, timestep, config, statistics, others, replay)
    if not called:
        raise _never_called(forward_loop, "Call the model on calibration data in it")
    smoothed = smooth_channels(model, channels, per_tensor, replay, timestep, config)
    if smoothed:
        again = collected(smoothed)
        if _run(model, forward_loop, timestep, config, again, []):
            statistics |= again
        elif config.channel_smoothing == "auto":
            channels.undo(timestep)
            warnings.warn(_RUNS_ONCE, TdqWarning, stacklevel=2)
        else:
            raise _never_called(forward_loop, _TWICE)
    calibrate_weights(model, config.weights)
    times = union(set().union(*(s.times for s in statistics.values())))
    if len(times) > config.max_steps:
        raise too_many_times(config.max_steps)
    if len(times) < 2 and config.bins != 1:
        raise TdqError(
            "forward_loop",
            times,
            "it visited a single time",
            'Run whole sampling trajectories in it, or ask for static scales with `"bins": 1`',
        )
    seen = union({name for name, s in statistics.items() if s.times})
    quantizers, evidence = {}, {}
    leave_out(model, [name for name in per_tensor if name not in seen])
    rows = {name: _filled(statistics[name], times) for name in per_tensor if name in seen}
    growth = common_growth({name: own.growth for name, own in rows.items()})
    warn_of_other_times(config.time_weights, times)
    weights = squared_weights(config.time_weights, times)
    for name, own in tqdm(rows.items(), "errors", disable=not config.progress, unit="layer"):
        quantizer = TemporalQuantizer.from_tensor_quantizer(per_tensor[name], timestep, name)
        known = _activation_evidence(replace(own, growth=growth[name]), quantizer, weights, config)
        quantizers[name], evidence[name] = quantizer, _settled(known, config, name in follow)
    if config.statistic == "output":
        for name, curves in output_curves(model, evidence, replay, times, config.smoothing, config.progress).items():
            evidence[name] = _settled(replace(evidence[name], known=curves), config, name in follow)
    remember_multiply_adds(model, replay, times)
    return Calibration(quantizers, times, evidence, replay)


def _never_called(forward_loop: Callable[[nn.Module], Any], cure: str) -> TdqError:
    return TdqError("forward_loop", forward_loop, "it never called the model", cure)


def _require_the_same(model: nn.Module, config: CalibrationFields) -> None:
    """All processes calibrate the same quantizers in the same way."""
    agreed("algorithm", config.model_dump(exclude={"progress", "expected_calls"}))
    enabled = {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    agreed("quant_cfg", {name: (q.num_bits, q.axis, q.block_sizes) for name, q in enabled.items()})


def _activation_evidence(
    rows: ActivationStatistics, quantizer: TemporalQuantizer, weights: Tensor, config: CalibrationFields
) -> Evidence:
    num_bits = quantizer.num_bits
    asymmetric = bool(config.asymmetric) and isinstance(num_bits, int)  # FP8 has a sign of its own
    judged = config.statistic in ("mse", "output")
    return Evidence(rows, num_bits, asymmetric, own_curves(rows, num_bits, asymmetric) if judged else None, weights)


def _settled(evidence: Evidence, config: CalibrationFields, temporal: bool) -> Evidence:
    """With `asymmetric: auto`, the evidence without offsets where these gain too little."""
    undecided = evidence.asymmetric and config.asymmetric == "auto"
    return evidence if not undecided or worth_an_offset(evidence, config, temporal) else evidence.symmetric()
