"""By what the channels of each tensor are divided: what ``channel_smoothing="auto"`` chooses, on replayed calls.

Vectors are compared on one half of the samples by the outputs of the layers, and choices of them on the other half by
the output of the model, with the vectors and the ranges of the first half: smoothing makes all channels as large as the
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
from functools import partial
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.correct import layers_to_correct, unfit
from modelopt_tdq.calibration.correction_fit import corrected_prediction_error, last_layer
from modelopt_tdq.calibration.output_error import run_probes
from modelopt_tdq.calibration.protect import prediction_error
from modelopt_tdq.calibration.smoothed_layer import (
    ChannelRanges,
    Formula,
    SmoothedLayer,
    balanced,
    shared_vector,
    smooth,
    smoothing_vector,
)
from modelopt_tdq.calibration.smoothing_trial import CLIPS, OfAll, Settings, Trial
from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.config import CalibrationFields, CorrectionFields
from modelopt_tdq.core.distributed import union
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.rows import TimesKey, current_rows
from modelopt_tdq.model.select import temporal_names, weight_quantizers
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["chosen_vectors"]

_log = logging.getLogger(__name__)

#: The vectors that ``auto`` tries for each tensor, beside none; and those that it tries for all tensors at once.
_FORMULAS: tuple[Formula, ...] = (
    *(partial(smoothing_vector, strength=strength) for strength in (0.3, 0.5, 0.7)),
    *(partial(balanced, share=share) for share in (0.05, 0.1, 0.15, 0.25, 0.4)),
)
_UNIFORM: tuple[Formula, ...] = (partial(smoothing_vector, strength=0.5), partial(balanced, share=0.1))

#: Times at which ``auto`` compares outputs, of the layers and of the model; and by how many dB smoothing has to be
#: better than none.
_JUDGED = 8
_CLEAR = 0.1

#: ``auto`` smooths where it lowers the error of the outputs below this fraction of what it is without.
_WORTH = 0.98


def _spread(replay: Replay) -> list[float]:
    """Some of the times of all processes, evenly."""
    times = union(set(replay.times))
    count = min(len(times), _JUDGED)
    return [times[(2 * i + 1) * len(times) // (2 * count)] for i in range(count)]


def _clips(method: str) -> tuple[float, ...]:
    return (1.0,) if method == "max" else CLIPS


def _least_layer_error(
    model: nn.Module,
    groups: list[list[SmoothedLayer]],
    replay: Replay,
    times: list[float],
    settings: Settings,
    static: Callable[[str], bool],
    progress: bool,
) -> tuple[list[Formula | None], dict[int, ChannelRanges]]:
    """The vector of each group with the least error of its layers' outputs, over the times; None: not smoothed.

    And the ranges of their inputs, by the quantizer's id.
    """
    vectors = []
    trials: dict[int, Trial] = {}
    for group in groups:
        tried = [shared_vector(group, formula) for formula in _FORMULAS]
        vectors.append([torch.ones_like(tried[0]), *tried])
        for layer in group:
            temporal = not static(f"{layer.name}.input_quantizer")
            trials[id(layer)] = Trial(layer, vectors[-1], settings, temporal, len(times), replay.turns)
    probes = [(trial.layer.module, trial) for trial in trials.values()]
    with replay.turns.used():
        run_probes(model, probes, replay, times, "smoothing", progress)
    found: list[Formula | None] = []
    for group in groups:
        errors = torch.stack([trials[id(layer)].error() for layer in group]).sum(0)
        errors[0] *= _WORTH
        best = int(errors.argmin())
        found.append(_FORMULAS[best - 1] if best else None)
    ranges = {id(trial.layer.quantizer): trial.ranges for trial in trials.values()}
    for known in ranges.values():
        known.agree()
    return found, ranges


class _Judge:
    """The error of the model's output for a choice of vectors, on replayed calls at a few times.

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
        method: str,
        corrected: dict[str, nn.Module],
        ranges: dict[int, ChannelRanges],
    ) -> None:
        self._model, self._replay, self._times = model, replay, times
        self._ranges, self._times_bits, self._times_key = ranges, torch.tensor(times).view(torch.int32), TimesKey()
        self._settings, self._method, self._corrected = settings, method, corrected
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
            known = self._ranges.get(id(quantizer))
            extent = None if known is None else known.divided(self._row(output.device))
            of_all = OfAll(self._replay.turns, quantizer)
            return self._settings.rounded(output.float(), quantizer.num_bits, extent, of_all).to(output.dtype)

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

    def _row(self, device: torch.device) -> Tensor:
        """[1] number of the time of the call in progress, of which all samples have the same."""
        return current_rows(self._replay.timestep, self._times_bits, self._times_key, device)[:1]

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
        """Mean over the times of the error of the model as it is now, in dB."""
        model = self._model
        calibrate_weights(model, self._method, remember=False)
        with full_precision(model), self._replay.turns.used():
            if self._corrected:
                with self._rounding():
                    found = corrected_prediction_error(model, self._corrected, self._replay, self._times, self._exact)
            else:
                found = prediction_error(model, self._replay, self._times, self._references, "", False, self._rounding)
        rows = [powers.sum(0).clamp(min=1e-30) for powers in found.values()]
        return sum(10 * math.log10(float(row[0] / row[1])) for row in rows) / max(len(rows), 1)


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


def chosen_vectors(
    model: nn.Module,
    groups: list[list[SmoothedLayer]],
    quantizers: dict[str, TensorQuantizer],
    replay: Replay,
    timestep: CurrentTimestep,
    config: CalibrationFields,
) -> list[Tensor | None]:
    """The vectors of ``auto``: those with the least error of the model's output.

    Among none, those that are best for each tensor by itself, and some formulas everywhere. What rounding does to
    a weight is the same for all samples and times, and adds up through the layers: the best for each layer may not be
    the best for all.

    Where samples are spread over several processes, the scales of a call are those of all its samples.
    """
    times = _spread(replay)
    halves = _halves(replay)
    if halves is None:
        _log.info("no channels smoothed: there are no other samples to judge it by")
        return [None] * len(groups)
    known, judged = halves
    corrected = _corrected_layers(model, judged, times, config)
    settings = Settings(_clips(config.statistic), _clips(config.weights), bool(config.asymmetric), bool(corrected))
    follow = temporal_names(config.temporal, list(quantizers))
    own, ranges = _least_layer_error(
        model, groups, known, times, settings, lambda name: config.bins == 1 or name not in follow, config.progress
    )
    choices: list[list[Formula | None]] = [[None] * len(groups), own]
    choices += [[formula] * len(groups) for formula in _UNIFORM]

    def by_known(group: list[SmoothedLayer], formula: Formula | None) -> Tensor | None:
        """The vector that it would have of the first half of the samples."""
        if formula is None:
            return None
        return shared_vector(group, formula, [ranges[id(layer.quantizer)].largest for layer in group])

    judge, errors = _Judge(model, quantizers, judged, times, settings, config.weights, corrected, ranges), []
    for choice in tqdm(choices, "smoothings", disable=not config.progress):
        smooth(groups, [by_known(*pair) for pair in zip(groups, choice, strict=True)], timestep)
        errors.append(judge())
    errors[0] -= _CLEAR
    _log.info(
        "error of the prediction in dB: not smoothed (less %s), the best of each tensor, and each of %d for all: %s",
        _CLEAR,
        len(_UNIFORM),
        errors,
    )
    best = choices[errors.index(min(errors))]
    return [
        None if formula is None else shared_vector(group, formula) for group, formula in zip(groups, best, strict=True)
    ]
