"""By what the channels of each tensor are divided and shifted: what ``auto`` chooses, on replayed calls.

Ways of smoothing are compared on one half of the samples by the outputs of the layers, and choices of them on the
other half by the output of the model, with what the first half tells: smoothing makes all channels as large as the
largest, and where few samples tell how large they are, others exceed it in all of them.

Where the layers' outputs are corrected afterwards, what a gain and a bias of each channel take back does not count:
rounding the weights to few bits mostly shifts and scales outputs, and smoothing that mends only this is worth nothing.

See :mod:`modelopt_tdq.calibration.channel_smoothing`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.channel_ranges import ChannelRanges, shared_ranges
from modelopt_tdq.calibration.correct import layers_to_correct, unfit
from modelopt_tdq.calibration.correction_fit import corrected_prediction_error, last_layer
from modelopt_tdq.calibration.output_error import run_probes
from modelopt_tdq.calibration.protect import prediction_error
from modelopt_tdq.calibration.smoothed_layer import (
    ChannelMap,
    Formula,
    Kind,
    SmoothedLayer,
    balanced,
    shared_map,
    smooth,
    smoothing_vector,
)
from modelopt_tdq.calibration.smoothing_trial import CLIPS, OfAll, Settings, Trial
from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.config import CalibrationFields, CorrectionFields
from modelopt_tdq.core.distributed import union
from modelopt_tdq.core.time_weights import squared_weights
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.select import temporal_names, weight_quantizers
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["chosen_maps", "given_kind"]

_log = logging.getLogger(__name__)

#: What ``auto`` divides by for each tensor, beside 1; where it is shifted as well; and for all tensors at once.
_FORMULAS: tuple[Formula, ...] = (
    *(partial(smoothing_vector, strength=strength) for strength in (0.3, 0.5, 0.7)),
    *(partial(balanced, share=share) for share in (0.05, 0.1, 0.15, 0.25, 0.4)),
)
_WITH_SHIFT: tuple[Formula, ...] = (
    *(partial(smoothing_vector, strength=strength) for strength in (0.3, 0.5)),
    *(partial(balanced, share=share) for share in (0.1, 0.25)),
)
_UNIFORM: tuple[Formula, ...] = (partial(smoothing_vector, strength=0.5), partial(balanced, share=0.1))

#: Times at which ``auto`` compares outputs, of the layers and of the model; and by how many dB smoothing has to be
#: better than none.
_JUDGED = 8
_CLEAR = 0.1

#: ``auto`` smooths where it lowers the error of the outputs below this fraction of what it is without; and shifts,
#: which is one more operation, where it lowers it below this fraction of what it is without a shift.
_WORTH, _WORTH_A_SHIFT = 0.98, 0.9


def _spread(replay: Replay) -> list[float]:
    """Some of the times of all processes, evenly."""
    times = union(set(replay.times))
    count = min(len(times), _JUDGED)
    return [times[(2 * i + 1) * len(times) // (2 * count)] for i in range(count)]


def _clips(method: str) -> tuple[float, ...]:
    return (1.0,) if method == "max" else CLIPS


def given_kind(config: CalibrationFields) -> Kind:
    """What is done at least: to divide, by the strength that is given."""
    if config.channel_smoothing in ("none", "auto"):
        return Kind()
    return Kind(_by_strength(float(config.channel_smoothing)))


@lru_cache
def _by_strength(strength: float) -> Formula:
    return partial(smoothing_vector, strength=strength)


def _kinds(group: list[SmoothedLayer], config: CalibrationFields) -> list[Kind]:
    """The ways that are tried for one tensor: what is done at least first, those that shift last."""
    least, automatic = given_kind(config), config.channel_smoothing == "auto"
    found = [least, *(Kind(formula) for formula in _FORMULAS if automatic)]
    if config.channel_shift == "auto" and not any(layer.pads for layer in group):
        found += [replace(least, shifts=True), *(Kind(formula, shifts=True) for formula in _WITH_SHIFT if automatic)]
    return found


def _everywhere(config: CalibrationFields) -> list[Kind]:
    """The ways that are tried for all tensors at once."""
    found = [Kind(formula) for formula in _UNIFORM] if config.channel_smoothing == "auto" else [given_kind(config)]
    return found + [replace(kind, shifts=True) for kind in found if config.channel_shift == "auto"]


def _least_layer_error(
    model: nn.Module,
    groups: list[list[SmoothedLayer]],
    replay: Replay,
    times: list[float],
    settings: Settings,
    static: Callable[[str], bool],
    config: CalibrationFields,
) -> tuple[list[list[Kind]], dict[int, ChannelRanges]]:
    """What to do with each group for the least error of its layers' outputs, over the times: at all, without shifts.

    And the ranges of their inputs, by the quantizer's id.
    """
    trials: dict[int, Trial] = {}
    for group in groups:
        temporal = [not static(f"{layer.name}.input_quantizer") for layer in group]
        ranges = shared_ranges([layer.ranges for layer in group])
        maps = [shared_map(group, kind, ranges, all(temporal)) for kind in _kinds(group, config)]
        for layer, own in zip(group, temporal, strict=True):
            trials[id(layer)] = Trial(layer, maps, settings, own, times, replay.turns)
    probes = [(trial.layer.module, trial) for trial in trials.values()]
    with replay.turns.used():
        run_probes(model, probes, replay, times, "smoothing", config.progress)
    found: list[list[Kind]] = [[], []]
    weights = squared_weights(config.time_weights, times)
    for group in groups:
        kinds = _kinds(group, config)
        errors = torch.stack([trials[id(layer)].error(weights) for layer in group]).sum(0)
        errors[0] *= _WORTH
        errors[torch.tensor([kind.shifts for kind in kinds])] /= _WORTH_A_SHIFT
        found[0].append(kinds[int(errors.argmin())])
        found[1].append(kinds[int(errors[: sum(not kind.shifts for kind in kinds)].argmin())])
    for trial in trials.values():
        trial.agree()
    return found, {id(trial.layer.quantizer): trial.ranges for trial in trials.values()}


class _Judge:
    """The error of the model's output for one choice, on replayed calls at a few times.

    Weights are quantized as they will be; activations by the ranges that other samples had at the same time, or with a
    scale for each call where these are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        quantizers: dict[str, TensorQuantizer],
        replay: Replay,
        times: list[float],
        settings: Settings,
        config: CalibrationFields,
        corrected: dict[str, nn.Module],
        layers: dict[int, SmoothedLayer],
        ranges: dict[int, ChannelRanges],
    ) -> None:
        self._model, self._replay, self._times = model, replay, times
        self._layers, self._ranges = layers, ranges
        self._settings, self._method, self._corrected = settings, config.weights, corrected
        self._weights_of_times: list[float] = squared_weights(config.time_weights, times).tolist()
        self._activations = list(quantizers.values())
        inner = [part for q in weight_quantizers(model) for part in q.modules()]
        self._weights = [q for q in inner if isinstance(q, TensorQuantizer) and q.is_enabled]
        self._references: dict[int, Tensor] = {}
        self._rounds = True

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        def hook(quantizer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._rounds:
                return output
            layer, of_all = self._layers.get(id(quantizer)), OfAll(self._replay.turns, quantizer)
            if layer is None:
                return self._settings.rounded(output.float(), quantizer.num_bits, None, of_all).to(output.dtype)
            extent = layer.as_quantized(self._ranges[id(quantizer)].at(self._time()))
            rounded = self._settings.rounded(quantizer.shifted(output.float()), quantizer.num_bits, extent, of_all)
            restored: Tensor = quantizer.shifted_back(rounded)
            return restored.to(output.dtype)

        handles = [quantizer.register_forward_hook(hook) for quantizer in self._activations]
        for quantizer in self._weights:
            quantizer.enable_quant()
        try:
            yield
        finally:
            for quantizer in self._weights:
                quantizer.disable_quant()
            for handle in handles:
                handle.remove()

    def _time(self) -> float:
        """Of the call in progress, of which all samples have the same."""
        return float(self._replay.timestep.require_each().flatten()[0])

    @contextmanager
    def _exact(self, layer: nn.Module) -> Iterator[None]:
        self._rounds = False
        try:
            with full_precision(layer):
                yield
        finally:
            self._rounds = True

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the times, by their weights, of the error of the model as it is now, in dB."""
        model = self._model
        calibrate_weights(model, self._method, remember=False)
        with full_precision(model), self._replay.turns.used():
            if self._corrected:
                with self._rounding():
                    found = corrected_prediction_error(model, self._corrected, self._replay, self._times, self._exact)
            else:
                found = prediction_error(model, self._replay, self._times, self._references, "", False, self._rounding)
        rows = {row: powers.sum(0).clamp(min=1e-30) for row, powers in found.items()}
        weights = {row: self._weights_of_times[row] for row in rows}
        total = sum(weights[row] * 10 * math.log10(float(power[0] / power[1])) for row, power in rows.items())
        return total / (sum(weights.values()) or 1.0)


def _halves(replay: Replay) -> tuple[Replay, Replay] | None:
    """Of the samples; None where there is a time that has only one."""
    halves = replay.halves()
    times = [union(set(half.times)) for half in (replay, *halves)]
    return halves if times[0] == times[1] == times[2] else None


def _corrected_layers(
    model: nn.Module, replay: Replay, times: list[float], config: CalibrationFields
) -> dict[str, nn.Module]:
    """Those that will be corrected, by name, as far as that is known before the scales are."""
    layers = layers_to_correct(model, config) if isinstance(config, CorrectionFields) else {}
    with full_precision(model):
        if not layers or unfit(model, replay, times) is not None:
            return {}
    return layers | last_layer(model, replay, times[0])


def chosen_maps(
    model: nn.Module,
    groups: list[list[SmoothedLayer]],
    quantizers: dict[str, TensorQuantizer],
    replay: Replay,
    timestep: CurrentTimestep,
    config: CalibrationFields,
) -> list[ChannelMap]:
    """What ``auto`` does with each group: that with the least error of the model's output.

    Among no more than is asked for, what is best for each tensor by itself, with shifts and without, and some formulas
    everywhere. What rounding does to a weight is the same for all samples and times, and adds up through the layers:
    the best for each layer may not be the best for all.

    Where samples are spread over several processes, the scales of a call are those of all its samples.
    """
    follow = temporal_names(config.temporal, list(quantizers))

    def static(name: str) -> bool:
        return config.bins == 1 or name not in follow

    def made(kinds: list[Kind], ranges_of: Callable[[SmoothedLayer], ChannelRanges]) -> list[ChannelMap]:
        temporal = [not any(static(f"{layer.name}.input_quantizer") for layer in group) for group in groups]
        ranges = [shared_ranges([ranges_of(layer) for layer in group]) for group in groups]
        return [shared_map(*each) for each in zip(groups, kinds, ranges, temporal, strict=True)]

    times, halves = _spread(replay), _halves(replay)
    least = [given_kind(config)] * len(groups)
    if halves is None:
        _log.info("nothing is chosen for channels: there are no other samples to judge it by")
        return made(least, lambda layer: layer.ranges)
    known, judged = halves
    corrected = _corrected_layers(model, judged, times, config)
    settings = Settings(_clips(config.statistic), _clips(config.weights), bool(config.asymmetric), bool(corrected))
    own, ranges = _least_layer_error(model, groups, known, times, settings, static, config)
    choices = [least, *own, *([kind] * len(groups) for kind in _everywhere(config))]
    choices = [choice for number, choice in enumerate(choices) if choice not in choices[:number]]
    layers = {id(layer.quantizer): layer for group in groups for layer in group}
    judge, errors = _Judge(model, quantizers, judged, times, settings, config, corrected, layers, ranges), []
    for choice in tqdm(choices, "smoothings", disable=not config.progress):
        smooth(groups, made(choice, lambda layer: ranges[id(layer.quantizer)]), timestep)  # by the first half
        errors.append(judge())
    errors[0] -= _CLEAR
    best = choices[errors.index(min(errors))]
    _log.info(
        "error of the prediction in dB: the least that is asked for (less %s), and each of %d choices: %s; the best "
        "divides %d and shifts %d of %d tensors",
        _CLEAR,
        len(choices) - 1,
        errors,
        sum(kind.formula is not None for kind in best),
        sum(kind.shifts for kind in best),
        len(best),
    )
    return made(best, lambda layer: layer.ranges)
