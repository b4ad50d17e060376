"""What export reads from the quantizers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.fake_quant import FP8_E4M3, SUPPORTED_BITS
from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.spec import ActivationSpec, CorrectionSpec, QuantizationSpec, WeightSpec
from modelopt_tdq.model.model_table import scale_table, temporal_quantizers
from modelopt_tdq.model.output_correction import OutputCorrection, layer_correction, output_corrections
from modelopt_tdq.model.quantized_weight import coded_parts, quantized_parts
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.temporal_features.runtime import feature_table, has_features, idle_layers
from modelopt_tdq.temporal_features.table import FeatureTable
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["read_quantization", "read_weight", "unsupported", "weight_quantizers"]


def weight_quantizers(model: nn.Module) -> dict[int, Tensor]:
    """The weight of each enabled weight quantizer of ``model``, by the quantizer's id."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, QuantModule):
            for weight, quantizer in module.iter_weights_for_calibration():
                if quantizer.is_enabled:
                    found[id(quantizer)] = weight
    return found


def unsupported(name: str, value: Any, problem: str) -> TdqError:
    """The error for a quantizer of a form that no graph expresses."""
    return TdqError(
        name,
        value,
        f"{problem} cannot be exported",
        f"Leave it out with the quant_cfg rule {{'quantizer_name': '{name}', 'enable': False}}",
    )


def read_weight(name: str, quantizer: Any, weight: Tensor) -> WeightSpec | tuple[Callable[[], Any], str]:
    """The codes of one weight, or how its fake-quantized values are computed and why they have no codes."""
    if not quantizer.fake_quant:
        raise unsupported(name, type(weight).__name__, "a weight that is stored compressed")

    def without(reason: str) -> tuple[Callable[[], Any], str]:
        return lambda: torch.cat([part.cpu() for part in quantized_parts(weight, quantizer)]).numpy(), reason

    if not isinstance(quantizer, TensorQuantizer) or isinstance(quantizer, SequentialQuantizer):
        return without("several quantizers in a row")
    bits, axis = quantizer.num_bits, quantizer.axis
    axes = (axis,) if isinstance(axis, int) else tuple(axis or ())
    if quantizer.block_sizes is not None or bits not in SUPPORTED_BITS or quantizer.unsigned or len(axes) > 1:
        return without(f"no per-channel weight format of ONNX: {quantizer.extra_repr()}")
    amax = quantizer.amax
    if amax is None:
        return without("no calibrated amax")
    channel = axes[0] % weight.dim() if axes else None
    if isinstance(quantizer, LearnedWeightQuantizer):
        scale = quantizer.scale.detach().cpu()
    else:
        scale = amax.detach().float().cpu() / quantizer.maxbound
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if amax.numel() != (1 if channel is None else weight.shape[channel]):
        return without(f"its amax has shape {tuple(amax.shape)}")
    scale = scale.reshape(()) if channel is None else scale.reshape(-1)
    divisor = scale if channel is None else scale.reshape([-1] + [1] * (weight.dim() - 1 - channel))

    def codes() -> Any:
        parts = coded_parts(weight, quantizer, divisor, bits)
        return torch.cat([some.view(torch.uint8) if bits == FP8_E4M3 else some for _, _, some in parts]).numpy()

    for values, own, some in coded_parts(weight, quantizer, divisor, bits):
        error = some.float().mul_(own).sub_(values).abs_()
        if not bool((error <= values.abs_().mul_(1e-5)).all()):  # rounding
            return without("its values are no multiples of its scale")
    return WeightSpec(name, tuple(weight.shape), bits, scale.numpy(), channel, codes)


def _constant(rows: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    values: np.ndarray[Any, np.dtype[np.float32]] = rows.detach().cpu().to(torch.float32).numpy()
    return values[:1] if (values == values[0]).all() else values


def _optional(rows: Tensor | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    return None if rows is None else _constant(rows)


def _static_activation(name: str, quantizer: TensorQuantizer) -> ActivationSpec:
    if quantizer.num_bits not in SUPPORTED_BITS or quantizer.unsigned:
        raise unsupported(name, quantizer.num_bits, "an activation format other than signed integers and FP8 E4M3")
    amax = torch.tensor(448.0) if quantizer._use_constant_amax else quantizer.amax
    if quantizer.block_sizes is not None or quantizer._dynamic or quantizer.bias_calibrator is not None:
        raise unsupported(name, type(quantizer).__name__, "a block-wise, dynamic or affine activation quantizer")
    if amax is None or amax.numel() != 1:
        raise unsupported(name, amax, "an activation quantizer without one calibrated amax per tensor")
    scale = amax.detach().float().cpu().reshape(1) / quantizer.maxbound
    return ActivationSpec(name, quantizer.num_bits, scale.numpy())


def _temporal_activations(model: nn.Module, idle: tuple[str, ...]) -> tuple[dict[str, ActivationSpec], Tensor | None]:
    """The quantizers of layers that run; and the times [K] of their table, if a scale depends on time."""
    temporal = temporal_quantizers(model)
    if not temporal:
        return {}, None
    table = scale_table(model)
    activations: dict[str, ActivationSpec] = {}
    static = True
    for column, name in enumerate(table.names):
        if name.startswith(idle):
            continue
        scales = table.column(column)
        divisor, shift = temporal[name].channel_divisor, temporal[name].channel_shift
        activations[name] = ActivationSpec(
            name,
            temporal[name].num_bits,
            _constant(scales.scale),
            _optional(scales.offset),
            _optional(scales.dequant_scale),
            _optional(scales.dequant_offset),
            None if divisor is None else divisor.detach().cpu().numpy(),
            None if shift is None else shift.detach().cpu().numpy(),
        )
        static &= bool(table.is_static[column])
    return activations, None if static else table.timesteps


def _shift_times(model: nn.Module, activations: dict[str, ActivationSpec]) -> Tensor | None:
    """[K'] of all shifts that depend on time."""
    found: Tensor | None = None
    quantizers = temporal_quantizers(model)
    for name, activation in activations.items():
        if activation.shift is None or len(activation.shift) == 1:
            continue
        times = quantizers[name].shift_times.detach().cpu()
        if found is not None and not torch.equal(found, times):
            raise TdqError("channel_shift", name, "its rows are not those of the others", "Calibrate the model again")
        found = times
    return found


def _corrections(model: nn.Module, idle: tuple[str, ...]) -> tuple[dict[str, CorrectionSpec], Tensor | None]:
    """Of layers that run; and the times [K] of their rows, if one depends on time."""
    found = {name: c for name, c in output_corrections(model).items() if not f"{name}.".startswith(idle)}
    correction = layer_correction(model)
    if correction is None:
        return {}, None
    specs = {
        f"{name}.output_quantizer": CorrectionSpec(
            name, correction.gain[name].numpy(), correction.bias[name].numpy(), quantizer.trailing
        )
        for name, quantizer in found.items()
    }
    return specs, correction.timesteps if any(spec.is_temporal for spec in specs.values()) else None


def _times(
    model: nn.Module, scales: Tensor | None, features: FeatureTable | None, others: list[Tensor | None]
) -> tuple[Tensor, str | None]:
    """[K] the times that rows stand for, and the argument of the model that holds the time."""
    given = [scales, None if features is None else features.timesteps, *others]
    if all(times is None for times in given):
        return torch.zeros(1), None
    if scales is not None and features is not None and not torch.equal(scales, features.timesteps):
        raise TdqError(
            "timesteps",
            features.timesteps.tolist(),
            f"the rows of the temporal features are not those of the scales ({len(scales)} times)",
            "Make the features at the times of the scale table: scale_table(model).timesteps",
        )
    delivery = find_timestep(model)
    if delivery is None:
        raise TdqError(
            "model",
            type(model).__name__,
            "its scales depend on time, but it is not the module that was calibrated",
            "Pass the module that mtq.quantize was called with",
        )
    times = next(times for times in given if times is not None)
    return times, delivery.argument


def read_quantization(model: nn.Module) -> QuantizationSpec:
    """Read the enabled quantizers of ``model``, and its temporal features.

    Quantizers of layers that never run, since their output is looked up, are left out.

    Raises:
        TdqError: A quantizer is not calibrated or has a form that cannot be exported; scales depend on
            time but the model does not receive the time.
    """
    features = feature_table(model) if has_features(model) else None
    idle = tuple(f"{name}." for name in idle_layers(model))
    activations, timesteps = _temporal_activations(model, idle)
    temporal = tuple(temporal_quantizers(model))
    corrections, correction_times = _corrections(model, idle)
    shift_times = _shift_times(model, activations)
    times, argument = _times(model, timesteps, features, [correction_times, shift_times])
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.rotate_is_enabled:
            raise unsupported(name, "rotate", "a quantizer that rotates its input")
        if isinstance(module, nn.RNNBase) and any(
            part.is_enabled for part in module.modules() if isinstance(part, TensorQuantizer)
        ):
            raise unsupported(f"{name}.*", type(module).__bases__[-1].__name__, "a quantized recurrent layer")
    weights: dict[str, WeightSpec] = {}
    folded: dict[str, tuple[Any, str]] = {}
    found = weight_quantizers(model)
    for name, module in model.named_modules():
        if name.startswith(idle):
            continue
        if id(module) in found:
            spec = read_weight(name, module, found[id(module)])
            if isinstance(spec, WeightSpec):
                weights[name] = spec
            else:
                folded[name] = spec
        elif isinstance(module, (TemporalQuantizer, OutputCorrection)):
            continue
        elif isinstance(module, TensorQuantizer) and module.is_enabled:
            parent = model.get_submodule(name.rpartition(".")[0])
            if id(parent) in found:
                continue
            if isinstance(parent, SequentialQuantizer):
                raise unsupported(name, "SequentialQuantizer", "several activation quantizers in a row")
            activations[name] = _static_activation(name, module)
    return QuantizationSpec(
        activations,
        weights,
        folded,
        times.numpy(),
        argument,
        features,
        temporal,
        corrections,
        None if correction_times is None else correction_times.numpy(),
        None if shift_times is None else shift_times.numpy(),
    )
