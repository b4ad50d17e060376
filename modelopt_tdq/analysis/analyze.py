"""``analyze``: will time-dependent scales help a model, and which of its layers need high precision?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.utils import unwrap_model
from modelopt.torch.utils.distributed import is_dtensor_sharded
from torch import nn

from modelopt_tdq.analysis.headroom import LayerHeadroom, headroom, median
from modelopt_tdq.analysis.probe import Probe
from modelopt_tdq.analysis.propose import Proposal, propose
from modelopt_tdq.analysis.sensitivity import LayerSensitivity, sensitivities
from modelopt_tdq.calibration.collect import Calibration, collect
from modelopt_tdq.calibration.columns import columns
from modelopt_tdq.calibration.output_error import output_curves
from modelopt_tdq.calibration.protect import Columns, install, prediction_error, recorded_outputs
from modelopt_tdq.config import TdqCalibConfig, make_config
from modelopt_tdq.core.metrics import decibels
from modelopt_tdq.core.together import together
from modelopt_tdq.errors import TdqError
from modelopt_tdq.layer_coverage import Coverage, coverage
from modelopt_tdq.model.held_weights import held_weights
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.wrapped import unwrapped

__all__ = ["Analysis", "analyze"]

#: Gain of the model's output in dB from which temporal scales are called worth it, or worth a try.
_CLEAR_GAIN, _SMALL_GAIN = 1.0, 0.3


@dataclass(frozen=True)
class Analysis:
    """Result of :func:`analyze`; see the parts' own documentation.

    Attributes:
        times: [K] calibrated times.
        layers: Headroom per quantizer, largest first.
        static_db: [K] SQNR of the model's output with the best single scales, on calibration inputs, in dB.
        temporal_db: [K] likewise with scales over time.
        max_db: [K] likewise with single scales from the largest magnitude, ModelOpt's default.
        probe_times: [T] times of the sensitivity analysis.
        sensitivity: ``{"static": [...], "temporal": [...]}``, most harmful layer first.
        proposals: Likewise, where a target was given.
        coverage: What of the model the config quantizes.
    """

    times: tuple[float, ...]
    layers: list[LayerHeadroom]
    static_db: tuple[float, ...]
    temporal_db: tuple[float, ...]
    max_db: tuple[float, ...]
    probe_times: tuple[float, ...] = ()
    sensitivity: dict[str, list[LayerSensitivity]] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    coverage: Coverage | None = None

    @property
    def gain_db(self) -> float:
        """Mean over time of what scales over time gain at the model's output against the best single ones."""
        return float((torch.tensor(self.temporal_db) - torch.tensor(self.static_db)).mean())

    @property
    def verdict(self) -> str:
        """One line: will temporal scales help this model at this bit width."""
        gain = self.gain_db
        against_max = float((torch.tensor(self.temporal_db) - torch.tensor(self.max_db)).mean())
        move = median([layer.spread_ratio for layer in self.layers])
        largest = max((layer.spread_ratio for layer in self.layers), default=1.0)
        word = (
            "will help clearly"
            if gain >= _CLEAR_GAIN
            else "will help a little"
            if gain >= _SMALL_GAIN
            else "will not help"
        )
        return (
            f"Temporal scales {word}: {gain:+.1f} dB at the model's output against the best static scales "
            f"({against_max:+.1f} dB against static max); activation spread moves by a factor of {move:.1f} over time "
            f"at the median layer, {largest:.1f} at most."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"verdict": self.verdict, "gain_db": self.gain_db, **asdict(self)}


def _single(pass_: Calibration, config: TdqCalibConfig) -> Columns:
    return {name: columns(evidence, config, False) for name, evidence in pass_.evidence.items()}


def analyze(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    config: dict[str, Any] | None = None,
    *,
    target: float | None = None,
    probes: int = 3,
    one_by_one: bool = False,
    progress: bool = True,
) -> Analysis:
    """Headroom and sensitivity of ``model``; the model itself is not changed.

    Args:
        model: In full precision, not quantized yet.
        forward_loop: As for ``mtq.quantize``: calls the model over whole sampling trajectories.
        config: As for ``mtq.quantize``; default :data:`modelopt_tdq.TDQ_CONFIG`.
        target: SQNR of the output in dB; if given, the smallest sets of layers to keep in high precision.
        probes: Times to look at for sensitivity, spread over the schedule; 0 leaves it out.
        one_by_one: Measure what each layer does to the output with nothing else quantized, which takes two calls of the
            model for each layer and time. By default all are estimated at once from a few backward passes.
        progress: Show progress bars.

    Raises:
        TdqError: As in calibration; or ``target`` without probes, or a negative number of probes.
    """
    if probes < 0 or (target is not None and probes == 0):
        raise TdqError("probes", probes, "a target needs at least one probed time", "Use probes=3")
    config = make_config() if config is None else config
    algorithm = config.get("algorithm")
    if not isinstance(algorithm, dict) or algorithm.get("method") != "tdq":
        raise TdqError(
            "algorithm", algorithm, "not the tdq algorithm", "Use a config of modelopt_tdq, such as TDQ_CONFIG"
        )
    settings = TdqCalibConfig(**{**algorithm, "progress": progress})
    model = unwrapped(model)
    require_weights(model, "be analyzed")
    with together("analyze"):
        return _analyzed(_copy(model), forward_loop, config["quant_cfg"], settings, target, probes, one_by_one)


def _copy(model: nn.Module) -> nn.Module:
    if is_dtensor_sharded(model):
        raise TdqError(
            "model",
            type(model).__name__,
            "its parameters are spread over processes, and such a model cannot be copied",
            "Analyze it before `fully_shard`",
        )
    plain: nn.Module = unwrap_model(model, force_unwrap=True)
    # weights are read, or replaced by others: their values need no copy
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in plain.parameters() if type(p) is nn.Parameter}
    copied = copy.deepcopy(plain, shared)
    return copied.eval()


def _analyzed(
    copied: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    rules: list[dict[str, Any]],
    settings: TdqCalibConfig,
    target: float | None,
    probes: int,
    one_by_one: bool,
) -> Analysis:
    mtq.quantize(copied, {"quant_cfg": rules, "algorithm": None})
    calibration = collect(copied, forward_loop, settings)
    with held_weights(copied):
        return _judged(copied, calibration, settings, target, probes, one_by_one)


def _judged(
    copied: nn.Module,
    calibration: Calibration,
    settings: TdqCalibConfig,
    target: float | None,
    probes: int,
    one_by_one: bool,
) -> Analysis:
    """What the calibration and calls on its samples tell; the weights stay as they are."""
    progress, replay = settings.progress, calibration.replay
    covered = coverage(copied)
    times, quantizers = calibration.times, calibration.quantizers
    fit, judge = (
        output_curves(copied, calibration.evidence, half, times, settings.smoothing, progress)
        for half in replay.halves()
    )
    variants = {
        "max": _single(calibration, settings.model_copy(update={"statistic": "max"})),
        "static": _single(calibration, settings),
        "temporal": {name: columns(evidence, settings, True) for name, evidence in calibration.evidence.items()},
    }
    rows, most = torch.tensor(times), replay.largest_batch
    references = recorded_outputs(copied, replay, times, most)
    sqnr_db = {}
    for name, variant in variants.items():
        install(copied, quantizers, rows, variant)
        noise = prediction_error(copied, replay, times, references, f"{name} scales", progress, most=most)
        powers = [sums.sum(0).tolist() for sums in noise.values()]
        sqnr_db[name] = tuple(decibels(signal, error) for error, signal in powers)
    found: dict[str, list[LayerSensitivity]] = {}
    proposals: dict[str, Proposal] = {}
    chosen = sorted({round(i * (len(times) - 1) / max(probes - 1, 1)) for i in range(probes)})
    if probes:
        calls = [(b, references[n]) for n, b in enumerate(replay.batches(times, most=most)) if b.row in chosen]
        probe = Probe(copied, calls, chosen)

        def use(variant: str, name: str) -> None:
            if name in variants[variant]:
                install(copied, quantizers, rows, {name: variants[variant][name]})

        uses = {variant: partial(use, variant) for variant in ("static", "temporal")}
        for name, sensitivity in sensitivities(probe, uses, not one_by_one, progress).items():
            found[name] = sensitivity.layers
            if target is not None:
                install(copied, quantizers, rows, variants[name])
                proposals[name] = propose(probe, sensitivity, target)
    return Analysis(
        tuple(times),
        headroom(calibration, fit, judge),
        sqnr_db["static"],
        sqnr_db["temporal"],
        sqnr_db["max"],
        tuple(times[row] for row in chosen),
        found,
        proposals,
        covered,
    )
