"""What export reads from the weight quantizers of a model: codes and scales, as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.fake_quant import FP8_E4M3, SUPPORTED_BITS, NumBits
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["WeightSpec", "read_weight", "unsupported", "weight_quantizers"]


@dataclass(frozen=True)
class WeightSpec:
    """One weight quantizer.

    Attributes:
        name: As in ``model.named_modules()``.
        codes: The weight's shape; int8, or the bytes of FP8 E4M3 values as uint8.
        num_bits: Number format of the codes.
        scale: float32, [C] along ``axis``, or [] per tensor.
        axis: Of the channels, or None per tensor.
    """

    name: str
    codes: np.ndarray[Any, np.dtype[Any]]
    num_bits: NumBits
    scale: np.ndarray[Any, np.dtype[np.float32]]
    axis: int | None

    @property
    def is_fp8(self) -> bool:
        """Whether the codes are FP8 E4M3."""
        return self.num_bits == FP8_E4M3

    @property
    def fits_int4(self) -> bool:
        """Whether a tensor of 4-bit integers can hold the codes."""
        return isinstance(self.num_bits, int) and self.num_bits <= 4


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


def read_weight(name: str, quantizer: Any, weight: Tensor) -> WeightSpec | tuple[Any, str]:
    """The codes of one weight, or its fake-quantized values and why they have no codes."""
    if not quantizer.fake_quant:
        raise unsupported(name, type(weight).__name__, "a weight that is stored compressed")
    values = quantizer(weight.detach().float()).detach().float().cpu()
    if not isinstance(quantizer, TensorQuantizer) or isinstance(quantizer, SequentialQuantizer):
        return values.numpy(), "several quantizers in a row"
    bits, axis = quantizer.num_bits, quantizer.axis
    axes = (axis,) if isinstance(axis, int) else tuple(axis or ())
    if quantizer.block_sizes is not None or bits not in SUPPORTED_BITS or quantizer.unsigned or len(axes) > 1:
        return values.numpy(), f"no per-channel weight format of ONNX: {quantizer.extra_repr()}"
    amax = quantizer.amax
    if amax is None:
        return values.numpy(), "no calibrated amax"
    channel = axes[0] % weight.dim() if axes else None
    if isinstance(quantizer, LearnedWeightQuantizer):
        scale = quantizer.scale.detach().cpu()
    else:
        scale = amax.detach().float().cpu() / quantizer.maxbound
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if amax.numel() != (1 if channel is None else weight.shape[channel]):
        return values.numpy(), f"its amax has shape {tuple(amax.shape)}"
    shape = [1] * weight.dim()
    if channel is not None:
        shape[channel] = -1
    codes = values / scale.reshape(shape)
    codes = codes.to(torch.float8_e4m3fn) if bits == FP8_E4M3 else torch.round(codes)
    if not torch.allclose(codes.float() * scale.reshape(shape), values, rtol=1e-5, atol=0.0):
        return values.numpy(), "its values are no multiples of its scale"
    stored = codes.view(torch.uint8) if bits == FP8_E4M3 else codes.to(torch.int8)
    scale = scale.reshape(()) if channel is None else scale.reshape(-1)
    return WeightSpec(name, stored.numpy(), bits, scale.numpy(), channel)
