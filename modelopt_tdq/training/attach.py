"""From a calibrated model to one that learns its scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.calibration.calibrate import calibrate_scales
from modelopt_tdq.calibration.pooling import uniform_bins
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.core.fake_quant import code_range
from modelopt_tdq.core.together import together
from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.dynamic import DYNAMIC, DynamicIntervals
from modelopt_tdq.model import select
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.model.place import place_of_new_parts
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.model.timestep import INTERVALS
from modelopt_tdq.training.attention import make_attention_trainable
from modelopt_tdq.training.config import LearningFields, TdqQatConfig
from modelopt_tdq.training.learned import (
    FreshTable,
    LearnedIntervals,
    SameSettings,
    learned_intervals,
    learned_quantizers,
)
from modelopt_tdq.training.quantizer import DynamicQuantizer, LearnedQuantizer
from modelopt_tdq.training.schemes import SCHEMES
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["as_learned", "install_intervals", "learn_scales", "tdq_qat", "weight_quantizers"]


def tdq_qat(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate a ModelOpt-quantized model, and make its scales parameters.

    Args:
        model: Quantized by ``mtq.quantize``.
        forward_loop: As for :func:`modelopt_tdq.calibration.calibrate.calibrate_scales`.
        **fields: Fields of :class:`TdqQatConfig`.

    Raises:
        TdqError: As calibration; or a weight quantizer has a format whose scale cannot be learned. The model is left
            as it was.
    """
    config = TdqQatConfig(**{name: value for name, value in fields.items() if name in TdqQatConfig.model_fields})
    with restored_on_error(model), together("tdq_qat"):
        calibrate_scales(model, forward_loop, calibration_config(config))
        learn_scales(model, config)


def calibration_config(config: LearningFields) -> CalibrationFields:
    """Of the calibration that comes before learning: one row per time only where each will be learned."""
    return config if config.intervals == "table" else config.model_copy(update={"bins": 1})


def _bins(scale: Tensor, offset: Tensor | None, config: LearningFields) -> Tensor:
    """[K] which learned value each row of a calibrated column uses."""
    rows = len(scale)
    if config.intervals != "table" or bool((scale == scale[0]).all()):
        return torch.zeros(rows, dtype=torch.int64)
    if config.bins == "per_step":
        return torch.arange(rows)
    if isinstance(config.bins, int):
        return uniform_bins(rows, config.bins)
    changed = scale[1:] != scale[:-1]
    if offset is not None:
        changed |= offset[1:] != offset[:-1]
    return torch.cat([torch.zeros(1, dtype=torch.int64), changed.long().cumsum(0)])


def _rows(config: LearningFields, timesteps: Tensor) -> list[float]:
    if config.rows is None:
        return [float(t) for t in timesteps]
    rows = list(range(config.rows)) if isinstance(config.rows, int) else sorted({float(t) for t in config.rows})
    if not rows:
        raise TdqError("rows", config.rows, "no times", "Name times of the model, or a number of them")
    return [float(t) for t in rows]


def learn_scales(model: nn.Module, config: LearningFields) -> None:
    """Make the scales of a calibrated model parameters; see :func:`tdq_qat`."""
    quantizers = temporal_quantizers(model)
    scheme = SCHEMES[config.scheme]
    timesteps = max((q._timesteps for q in quantizers.values()), key=len).cpu()
    initial, bins = [], []
    for column, quantizer in enumerate(quantizers.values()):
        scale, offset = quantizer._scale.detach().cpu(), quantizer.offset
        offset = None if offset is None else offset.detach().cpu()
        zero = 0.0 if offset is None else float((offset / scale).median().round())
        scale = scale.expand(len(timesteps))
        initial.append(scheme.interval(scale, quantizer._num_bits))
        bins.append(_bins(scale, offset, config))
        start = float(scale.double().log().mean().exp())
        device = quantizer._scale.device
        learned = as_learned(quantizer, config.intervals)
        further = scheme.further(start, zero, quantizer._num_bits)
        learned.learn(config.scheme, column, zero, {name: value.to(device) for name, value in further.items()})
    description = {
        "intervals": config.intervals,
        "scheme": config.scheme,
        "encoding": config.encoding,
        "initialization": config.initialization,
        "dropout": config.dropout,
        "seed": config.seed,
        "softplus": scheme.softplus,
        "timesteps": [float(t) for t in timesteps],
        "rows": _rows(config, timesteps),
        "initial": torch.stack(initial, 1).tolist(),
        "bins": torch.stack(bins, 1).tolist(),
        "checksum": True,
    }
    install_intervals(model, description)
    if config.learn_weights:
        for name, quantizer in weight_quantizers(model).items():
            LearnedWeightQuantizer.from_tensor_quantizer(quantizer, name)
    if config.intervals not in DYNAMIC:
        learned_intervals(model).materialize(model)


def weight_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The enabled weight quantizers of ``model``, by name."""
    weights = {id(quantizer) for quantizer in select.weight_quantizers(model) if quantizer.is_enabled}
    return {name: module for name, module in model.named_modules() if id(module) in weights}


def as_learned(quantizer: TensorQuantizer, intervals: str) -> LearnedQuantizer:
    """Turn a quantizer into the kind that learns such intervals, in place."""
    quantizer.__class__ = DynamicQuantizer if intervals in DYNAMIC else LearnedQuantizer
    learned: LearnedQuantizer = quantizer
    learned._learns = intervals
    return learned


def install_intervals(model: nn.Module, description: dict[str, Any]) -> None:
    """Put what makes the intervals into ``model``, on its device and in its mode."""
    learned = LearnedIntervals(description)
    device = place_of_new_parts(model)
    model._modules.pop(INTERVALS, None)
    model.add_module(INTERVALS, learned.to(device).train(model.training))
    make_attention_trainable(model)
    if not any(isinstance(getattr(h, "hook", h), SameSettings) for h in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(SameSettings())  # type: ignore[no-untyped-call]
        model.register_state_dict_pre_hook(FreshTable())  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(description["seed"])
    timesteps = torch.tensor(description["timesteps"], dtype=torch.float32)
    starts = torch.tensor(description["initial"], dtype=torch.float64).log().mean(0).exp().tolist()
    for quantizer in learned_quantizers(model).values():
        if isinstance(quantizer, DynamicQuantizer):
            start, levels = starts[quantizer._column], code_range(quantizer._num_bits)[1]
            made = DynamicIntervals(description["intervals"], timesteps, start, levels, generator)
            quantizer.measure(made.to(place_of_new_parts(quantizer)).train(model.training))
