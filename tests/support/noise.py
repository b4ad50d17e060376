"""Errors in the only unit that tells a fault from rounding: the error that quantization itself makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.model.full_precision import full_precision

#: Of quantization noise. A rounding difference flips single codes of later layers, which costs less (in the models that
#: tests use; a deep random model can be worse); a kernel of another arithmetic costs 0.1 and more.
SAME = 0.05


@dataclass(frozen=True)
class Expected:
    """What a quantized model returns, and how far each tensor is from that of the same model in full precision."""

    outputs: list[np.ndarray[Any, Any]]
    noise: list[float]

    def error(self, found: Sequence[Any]) -> float:
        """The largest distance of an output, in quantization noise."""
        pairs = zip(found, self.outputs, self.noise, strict=True)
        errors = [(rms(np.asarray(a, dtype=np.float64) - b), noise) for a, b, noise in pairs]
        return max(error / noise if noise else (math.inf if error else 0.0) for error, noise in errors)


def expected(model: nn.Module, inputs: Mapping[str, Any]) -> Expected:
    """Of one call."""
    with torch.no_grad():
        quantized = [tensor.float().numpy() for tensor in tensors(model(**inputs))]
        with full_precision(model):
            plain = [tensor.float().numpy() for tensor in tensors(model(**inputs))]
    return Expected(quantized, [rms(a - b) for a, b in zip(quantized, plain, strict=True)])


def tensors(output: Any) -> list[Tensor]:
    """All of a model's output, whatever they are wrapped in."""
    if isinstance(output, Tensor):
        return [output]
    return [
        tensor for value in (output.values() if isinstance(output, Mapping) else output) for tensor in tensors(value)
    ]


def rms(values: Any) -> float:
    """Root mean square, in float64."""
    return float(np.sqrt(np.square(np.asarray(values, dtype=np.float64)).mean()))
