"""``recalibrate_weights``: scales of weights that changed after calibration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.model.output_correction import OutputCorrection
from modelopt_tdq.model.select import weight_quantizers
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.model.weight_fit import (
    calibration_method,
    is_learned,
    plain_weights,
    remember_weight,
    require_smoothed_weights,
    weight_change,
)

__all__ = ["recalibrate_weights"]


def recalibrate_weights(model: nn.Module, method: Literal["max", "mse"] | None = None) -> tuple[str, ...]:
    """Fit the scales of weights that changed after calibration, as by ``pipeline.fuse_lora()`` or ``load_state_dict``.

    Weights that did not change keep their scales, and the rounding that a reconstruction has found for them. The scales
    of the activations stay as they are: where a weight is of another size than before, the activations behind it are
    too, and the model has to be calibrated again; a warning then says so. Corrections of the outputs of these layers,
    which took back what rounding did to the old weights, are taken off.

    Args:
        model: Quantized by ``mtq.quantize``.
        method: ModelOpt's calibration of the weights; None: the one that they were calibrated with.

    Returns:
        Names of the weight quantizers that were calibrated again.

    Raises:
        TdqError: No weight of the model is quantized, their scales are learned, ``method`` is not known, or the weight
            of a layer whose channels are smoothed was replaced or merged with another. Nothing is changed then.
    """
    if method not in (None, "max", "mse"):
        raise TdqError("method", method, "no such calibration of weights", "Use 'max' or 'mse'")
    if not any(quantizer.is_enabled for quantizer in weight_quantizers(model)):
        raise TdqError(
            "model",
            type(model).__name__,
            "no weight of it is quantized",
            "Quantize it first: mtq.quantize(model, modelopt_tdq.TDQ_CONFIG, forward_loop)",
        )
    require_smoothed_weights(model)
    changed = []
    for name, layer, weight, quantizer in plain_weights(model):
        if is_learned(quantizer):
            raise TdqError(
                "model",
                name,
                "its scale is learned together with the weight",
                "Train on, or call modelopt_tdq.stop_learning(model) first",
            )
        change = weight_change(name, layer, weight, quantizer)
        if change.is_another:
            changed.append((change, layer, weight, quantizer, method or calibration_method(quantizer)))
    unknown = [change.name for change, *_, how in changed if how is None]
    if unknown:
        raise TdqError(
            "method",
            None,
            f"it is not known how these weights were calibrated: {unknown[:3]}",
            "Say how to calibrate them: recalibrate_weights(model, method='mse')",
        )
    with restored_on_error(model):
        for wanted in ("max", "mse"):
            group = [(layer, weight, quantizer) for _, layer, weight, quantizer, how in changed if how == wanted]
            if not group:
                continue
            layers = nn.ModuleList({id(layer): layer for layer, _, _ in group}.values())
            with _only([quantizer for _, _, quantizer in group], layers):
                calibrate_weights(layers, wanted, remember=False)
            for _, weight, quantizer in group:
                remember_weight(weight, quantizer, wanted, size=False)
            for layer, _, _ in group:
                output = layer._modules.get("output_quantizer")
                if isinstance(output, OutputCorrection):
                    output.forget()
    resized = [str(change) for change, *_ in changed if change.is_resized]
    if resized:
        warnings.warn(
            f"{len(resized)} weights are of another size than when the activations were calibrated: "
            f"{', '.join(resized[:10])}. The activations behind them are too: calibrate the model again, with "
            "mtq.quantize(model, config, forward_loop)",
            TdqWarning,
            stacklevel=2,
        )
    return tuple(change.name for change, *_ in changed)


@contextmanager
def _only(quantizers: list[TensorQuantizer], layers: nn.Module) -> Iterator[None]:
    """All other quantizers of ``layers`` are disabled, so that nobody calibrates them."""
    wanted = {id(quantizer) for quantizer in quantizers}
    others = [m for m in layers.modules() if isinstance(m, TensorQuantizer) and m.is_enabled and id(m) not in wanted]
    for quantizer in others:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in others:
            quantizer.enable()
