"""The ``tdq_correct`` algorithm: which layers' outputs are corrected, by one gain and bias or by those of each time.

What quantization does to mean and amplitude of each output channel is taken back where a quantized product is turned
back into values anyway: by the factor and the bias behind it. So it costs an engine nothing. The last layer is
corrected whether it is quantized or not, for what all before it leave behind. See
:mod:`modelopt_tdq.calibration.correction_fit` for the fit.

``auto`` fits to one half of the replayed samples and judges by the other: each layer by its output, all together by the
model's; the model's once more with the halves exchanged, unless every time gains. What it chooses is fitted anew to all
samples. At a time at which the model predicts worse with corrections, nothing is corrected.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelopt_tdq.calibration.correction_fit import fit_corrections, halves_differ, last_layer, layer_errors
from modelopt_tdq.calibration.protect import prediction_error
from modelopt_tdq.config import CorrectionFields, TdqCorrectConfig
from modelopt_tdq.core.distributed import agreed, gather, union
from modelopt_tdq.core.layer_correction import LayerCorrection
from modelopt_tdq.core.time_weights import squared_weights, warn_of_other_times, weighted_mean
from modelopt_tdq.core.together import together
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.model.caches import require_no_cache
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.held_weights import held_weights
from modelopt_tdq.model.output_correction import (
    correctable_layers,
    forget_layer_correction,
    output_channels,
    set_layer_correction,
)
from modelopt_tdq.model.place import require_unattended
from modelopt_tdq.model.recording import counted_calls
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.model.stored_weight import sharded_layers
from modelopt_tdq.model.timestep import CurrentTimestep, deliver_timestep
from modelopt_tdq.model.unquantized import folded_weights
from modelopt_tdq.model.weight_fit import rounded_weights

__all__ = ["correct_layers", "layers_to_correct", "tdq_correct", "unfit"]

_log = logging.getLogger(__name__)

#: What becomes of one layer, cheapest first.
Kind = Literal["none", "static", "per_step"]
KINDS: tuple[Kind, ...] = ("none", "static", "per_step")

#: A dearer kind has to lower the error of a layer's output by this fraction.
_WORTH = 0.002

#: In dB: by so much the model has to predict better with corrections, and no time may be worse than without. The latter
#: is larger where corrections cannot be left out at a time.
_CLEAR, _NO_WORSE, _NO_WORSE_STATIC = 0.02, 0.02, 0.1

#: In dB: a model that gains this at every time is not judged twice.
_OBVIOUS = 0.1


def tdq_correct(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Correct the outputs of the quantized layers of a model that is calibrated or trained already.

    Args:
        model: Quantized by ``mtq.quantize``; its forward takes the time.
        forward_loop: Calls the model on calibration data, over whole sampling trajectories.
        **fields: Fields of :class:`modelopt_tdq.config.TdqCorrectConfig`.

    Raises:
        TdqError: ``forward_loop`` is missing or never runs, weights are folded, compressed, spread over processes or
            elsewhere, the corrections exceed their budget, or the model's calls cannot be repeated. The model is left
            as it was.
    """
    known = {name: value for name, value in fields.items() if name in TdqCorrectConfig.model_fields}
    config = TdqCorrectConfig(**known)
    if forward_loop is None:
        raise TdqError(
            "forward_loop", None, "corrections are fitted to calibration data", "Pass a forward_loop to mtq.quantize"
        )
    with restored_on_error(model), together("tdq_correct"):
        agreed("algorithm", config.model_dump(exclude={"progress", "expected_calls"}))
        require_no_cache(model, "have its layers corrected")
        require_unattended(model, "have its layers corrected")
        _warn_of_rounded_weights(model)
        timestep = deliver_timestep(model, config.timestep_argument)
        forget_layer_correction(model)
        replay = _recorded(model, forward_loop, timestep, config)
        correct_layers(model, replay, config)


def _warn_of_rounded_weights(model: nn.Module) -> None:
    rounded = [name.removesuffix(".weight_quantizer") for name in rounded_weights(model)]
    if rounded:
        warnings.warn(
            f"the weights of {len(rounded)} layers ({', '.join(rounded[:3])}, ...) are values of their codes already: "
            "these corrections make good what quantized activations do, and nothing that rounding the weights did. Fit "
            'them when the weights are rounded: "correction" is a field of tdq and of tdq_reconstruct',
            TdqWarning,
            stacklevel=3,
        )


def _recorded(
    model: nn.Module, forward_loop: Callable[[nn.Module], Any], timestep: CurrentTimestep, config: CorrectionFields
) -> Replay:
    replay = Replay(model, timestep, config.replay_samples)
    with (
        counted_calls(model, timestep, "record", config.expected_calls, config.progress),
        replay.recording(model),
        full_precision(model),
        torch.no_grad(),
    ):
        forward_loop(model)
    replay.agree()
    warn_of_other_times(config.time_weights, union(set(replay.times)))
    if not any(gather(bool(replay.times))):
        replay.require_samples()
        raise TdqError("forward_loop", forward_loop, "it never called the model", "Call the model on calibration data")
    return replay


def layers_to_correct(model: nn.Module, config: CorrectionFields) -> dict[str, nn.Module]:
    """The quantized layers that ``config`` wants corrected, by name.

    Raises:
        TdqError: It asks for corrections that cannot be made: see :func:`tdq_correct`.
    """
    if config.correction == "none":
        return {}
    layers = correctable_layers(model)
    wanted = config.correction != "auto" or isinstance(config, TdqCorrectConfig)
    folded = folded_weights(model)
    if folded and not wanted:
        return {}
    if folded:
        raise TdqError(
            "correction",
            folded[:3],
            "the weights of these layers are folded or compressed: what they were in full precision is not known",
            "Correct layers before mtq.fold_weight and mtq.compress",
        )
    sharded = sharded_layers(model)
    spread = [
        name
        for name, layer in layers.items()
        if isinstance(layer._parameters.get("weight"), DTensor) and layer not in sharded
    ]
    if spread and config.correction != "auto":
        raise TdqError(
            "correction",
            spread[:3],
            "the weights of these layers are spread over processes",
            'Correct layers before the model is sharded, or set "correction": "none"',
        )
    return {name: layer for name, layer in layers.items() if name not in spread}


def unfit(model: nn.Module, replay: Replay, times: list[float]) -> str | None:
    """Why nothing can be fitted to these calls; None if it can."""
    if not all(gather(replay.has_samples)):
        return "the model's calls cannot be taken apart into samples"
    if not all(gather(replay.is_first)):
        return "several processes compute the same samples together"
    if halves_differ(model, replay, times[0]):
        return "what the model makes of a sample depends on the others in the batch"
    return None


def correct_layers(model: nn.Module, replay: Replay, config: CorrectionFields) -> None:
    """Fit corrections to replayed calls, and put them into ``model``, which has none yet.

    Raises:
        TdqError: See :func:`tdq_correct`.
    """
    layers = layers_to_correct(model, config)
    times = union(set(replay.times))
    if not layers or not times:
        if layers and config.correction != "auto":
            replay.require_samples()
        return
    reason = unfit(model, replay, times)
    if reason is not None:
        if config.correction != "auto":
            raise TdqError("correction", config.correction, reason, 'Use "correction": "none"')
        _log.info("no corrections: %s", reason)
        return
    layers |= last_layer(model, replay, times[0])
    with held_weights(model):
        kinds, correction = _corrections(model, layers, replay, times, config)
    if correction is None:
        return
    set_layer_correction(model, correction)
    _log.info(
        "%d layers corrected over time, %d by one gain and bias",
        *(sum(kind == wanted for kind in kinds.values()) for wanted in ("per_step", "static")),
    )


def _corrections(
    model: nn.Module, layers: dict[str, nn.Module], replay: Replay, times: list[float], config: CorrectionFields
) -> tuple[dict[str, Kind], LayerCorrection | None]:
    """What becomes of each layer; and the gains and biases of all, None if no layer is corrected."""
    kinds: dict[str, Kind]
    worse = torch.zeros(len(times), dtype=torch.bool)
    if config.correction == "auto":
        kinds, worse = _chosen(model, layers, replay, times, config)
    else:
        kinds = dict.fromkeys(layers, config.correction)
        kinds = _within_budget(layers, kinds, {}, len(times), config)
    kept = {name: layer for name, layer in layers.items() if kinds[name] != "none"}
    if not kept:
        return kinds, None
    weights = squared_weights(config.time_weights, times)
    return kinds, _as_kinds(fit_corrections(model, kept, replay, times, config.progress), kinds, worse, weights)


def _as_kinds(fitted: LayerCorrection, kinds: Mapping[str, Kind], worse: Tensor, weights: Tensor) -> LayerCorrection:
    """``fitted``, averaged over time by ``weights`` [K] where static; nothing at the times [K] that are ``worse``."""
    kept = [name for name in fitted.names if kinds[name] != "none"]
    neutral = {"gain": 1.0, "bias": 0.0}
    rows: dict[str, dict[str, Tensor]] = {"gain": {}, "bias": {}}
    for what, found in rows.items():
        for name in kept:
            value: Tensor = getattr(fitted, what)[name]
            if kinds[name] == "static":
                value = weighted_mean(value, weights).unsqueeze(0)
            if bool(worse.any()):
                value = torch.where(worse.unsqueeze(1), neutral[what], value)
            found[name] = value
    return LayerCorrection(fitted.timesteps, rows["gain"], rows["bias"])


def _chosen(
    model: nn.Module, layers: dict[str, nn.Module], replay: Replay, times: list[float], config: CorrectionFields
) -> tuple[dict[str, Kind], Tensor]:
    """What becomes of each layer; and [K] bool, the times at which nothing is corrected."""
    nothing: dict[str, Kind] = dict.fromkeys(layers, "none")
    calm = torch.zeros(len(times), dtype=torch.bool)
    known, judged = replay.halves()
    if not union(set(known.times)) or not union(set(judged.times)):
        return nothing, calm
    weights = squared_weights(config.time_weights, times)
    trial = fit_corrections(model, layers, known, times, config.progress)
    errors = layer_errors(model, trial, judged, times, weights, config.progress)
    static = getattr(config, "bins", None) == 1  # nothing of the model is to follow time
    kinds = {name: _kind(errors[name][: 2 if static else 3]) if name in errors else "none" for name in layers}
    kinds = _within_budget(layers, kinds, errors, len(times), config)
    if all(kind == "none" for kind in kinds.values()):
        return nothing, calm
    gains = [_gains(model, _as_kinds(trial, kinds, calm, weights), judged, times, config)]
    if static:
        seen = gains[0].isfinite()
        found, gain = gains[0][seen], float(weighted_mean(gains[0][seen], weights[seen]))
        return (kinds, calm) if found.min() >= -_NO_WORSE_STATIC and gain > _CLEAR else (nothing, calm)
    if not gains[0].min() > _OBVIOUS:
        kept = {name: layer for name, layer in layers.items() if kinds[name] != "none"}
        trial = fit_corrections(model, kept, judged, times, config.progress)
        gains.append(_gains(model, _as_kinds(trial, kinds, calm, weights), known, times, config))
    worse, gain = _verdict(torch.stack(gains), weights)
    return (kinds, worse) if gain > _CLEAR else (nothing, calm)


def _gains(
    model: nn.Module, correction: LayerCorrection, judged: Replay, times: list[float], config: CorrectionFields
) -> Tensor:
    """[K] dB, by how much better the model predicts with ``correction``; NaN where no process has a sample."""
    references: dict[int, Tensor] = {}

    def predicted() -> Tensor:
        found = prediction_error(model, judged, times, references, "predictions", config.progress)
        rows = torch.full((len(times),), math.nan, dtype=torch.float64)
        for row, powers in found.items():
            error, power = powers.sum(0).clamp(min=1e-30)
            rows[row] = 10 * (error / power).log10()
        return rows

    without = predicted()
    set_layer_correction(model, correction)
    corrected = predicted()
    forget_layer_correction(model)
    return without - corrected


def _verdict(gains: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """From ``gains`` [F, K] of corrections fitted to parts of the samples, each judged on the others.

    Returns:
        [K] bool, the times that lose; and the mean gain, by ``weights`` [K], if nothing is corrected at those. For the
        mean, whether a time loses is told by the other part: times that lose by chance and are left out would count as
        a gain.
    """
    worse = gains.nanmean(0) < -_NO_WORSE
    told = (gains < -_NO_WORSE).flip(0)
    kept = torch.where(told, 0.0, gains)
    seen = ~kept.isnan()
    return worse, float(weighted_mean(kept[seen], weights.expand_as(kept)[seen]))


def _kind(errors: Tensor) -> Kind:
    """The cheapest kind whose error is close to the least; ``errors`` [2] or [3] in the order of the kinds."""
    best = 0
    for number in range(1, len(errors)):
        if errors[number] < (1 - _WORTH) * errors[best]:
            best = number
    return KINDS[best]


def _within_budget(
    layers: Mapping[str, nn.Module],
    kinds: dict[str, Kind],
    errors: Mapping[str, Tensor],
    rows: int,
    config: CorrectionFields,
) -> dict[str, Kind]:
    """``kinds``, with static corrections of those layers that gain least per byte over time, so that all fit.

    Raises:
        TdqError: One row of each is too much.
    """
    kinds, budget = dict(kinds), config.correction_budget * 2**20
    row = {name: 8 * output_channels(layers[name]) for name, kind in kinds.items() if kind != "none"}
    if sum(row.values()) > budget:
        raise TdqError(
            "correction_budget",
            config.correction_budget,
            f"one gain and bias of each channel take {sum(row.values()) / 2**20:.1f} MiB",
            'Use a larger "correction_budget", or "correction": "none"',
        )

    def worth(name: str) -> float:
        """Of a row of the layer, per byte."""
        known = errors.get(name)
        return (float(known[1] - known[2]) if known is not None else 1.0) / row[name]

    total = sum(row[name] * (rows if kinds[name] == "per_step" else 1) for name in row)
    for name in sorted((n for n in row if kinds[n] == "per_step"), key=worth):
        if total <= budget:
            break
        kinds[name] = "static"
        total -= row[name] * (rows - 1)
    return kinds
