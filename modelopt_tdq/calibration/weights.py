"""Scales of the weights, by ModelOpt's own calibration."""

from __future__ import annotations

from modelopt.torch.quantization.model_calib import max_calibrate, mse_calibrate
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.model.place import readable_for_modelopt
from modelopt_tdq.model.select import weight_quantizers

__all__ = ["calibrate_weights"]


def calibrate_weights(model: nn.Module, method: str) -> None:
    """Let ModelOpt calibrate the enabled weight quantizers: ``max``, ``mse``, or ``keep`` them as they are."""
    if method == "keep":
        return
    weights = [m for q in weight_quantizers(model) for m in q.modules() if isinstance(m, TensorQuantizer)]
    calibrators = [quantizer._calibrator for quantizer in weights]
    with readable_for_modelopt(model):
        {"max": max_calibrate, "mse": mse_calibrate}[method](model, forward_loop=None)
    # ModelOpt's mse leaves spent calibrators behind, which the next calibration would trip over
    for quantizer, calibrator in zip(weights, calibrators, strict=True):
        quantizer._calibrator = calibrator
        if calibrator is not None:
            calibrator.reset()
