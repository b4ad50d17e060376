"""Our stages, each with what the one before has; and static scales with everything else: what time is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.budget import budget
from modelopt_tdq.lab.bench.qat_run import QatRun, train_qat
from modelopt_tdq.lab.bench.rivals.setting import Setting, is_linear

__all__ = [
    "EVERYTHING",
    "MARGIN",
    "OFFSETS",
    "PLAIN",
    "ROUNDING",
    "SHIFTS",
    "SMOOTHING",
    "qat",
    "reconstructed",
    "stage",
    "static_with_everything",
    "time_linear",
]

#: Scales alone.
PLAIN: dict[str, Any] = {
    "asymmetric": False,
    "channel_smoothing": "none",
    "channel_shift": "none",
    "rounding": "nearest",
    "correction": "none",
}

#: What goes together with scales, over time or not.
OFFSETS: dict[str, Any] = {"asymmetric": "auto"}
SMOOTHING: dict[str, Any] = {"channel_smoothing": "auto"}
SHIFTS: dict[str, Any] = {"channel_shift": "auto"}
MARGIN: dict[str, Any] = {"margin": "auto"}
ROUNDING: dict[str, Any] = {"rounding": "auto"}
EVERYTHING: dict[str, Any] = {**OFFSETS, **SMOOTHING, **SHIFTS, **MARGIN, **ROUNDING, "correction": "auto"}


def stage(**fields: Any) -> Callable[[Setting], nn.Module]:
    """The recipe with these fields of ``tdq``."""

    def make(setting: Setting) -> nn.Module:
        config = setting.config(**{**PLAIN, **fields})
        return setting.quantize(config["quant_cfg"], config["algorithm"])

    return make


def time_linear(setting: Setting) -> nn.Module:
    """Scales over time of linear layers; convolutions stay in high precision."""
    rules = setting.rules(lambda layer: {"axis": None} if is_linear(layer) else None)
    return setting.quantize(rules, setting.config(**PLAIN)["algorithm"])


def static_with_everything(setting: Setting) -> nn.Module:
    """One scale per quantizer; all else as over time, shifts and corrections static."""
    return stage(bins=1, **EVERYTHING)(setting)


def reconstructed(setting: Setting) -> nn.Module:
    """Rounding and intervals learned block by block, behind offsets, smoothing and shifts; then corrections."""
    fields = {**OFFSETS, **SMOOTHING, **SHIFTS, "correction": "auto", "iterations": setting.iterations}
    config = setting.config("tdq_reconstruct", **fields)
    return setting.quantize(config["quant_cfg"], config["algorithm"])


def qat(setting: Setting) -> nn.Module:
    """Weights and intervals trained on images, behind offsets, smoothing and shifts; corrections would undo it.

    Raises:
        TdqError: There are no images.
    """
    if setting.images is None:
        raise TdqError("data", None, "QAT needs images to train on", "Pass --data cifar10.npz")
    cost = replace(
        budget("quick"),
        steps=setting.training_steps,
        calibration_samples=len(setting.start),
        calibration_steps=setting.steps,
    )
    weights, activations = setting.bits.weights, setting.bits.activations
    if not isinstance(weights, int) or not isinstance(activations, int):
        raise TdqError("formats", setting.bits.name, "the bench trains integers", "Use W4A4")
    run = QatRun(weights, activations, options={**SMOOTHING, **SHIFTS})
    return train_qat(setting.model, setting.scheduler, setting.images, run, cost).eval()
