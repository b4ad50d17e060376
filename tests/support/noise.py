"""Errors in the only unit that tells a fault from rounding: the error that quantization itself makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.model.full_precision import full_precision

#: Of quantization noise. A rounding difference flips single codes of the next layer, which is far less; a kernel of
#: other arithmetic gives 0.1 and more.
SAME = 0.01


def first(output: Any) -> Tensor:
    """The tensor of a model's output, whatever it is wrapped in."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def rms(values: Any) -> float:
    """Root mean square, in float64."""
    return float(np.sqrt(np.square(np.asarray(values, dtype=np.float64)).mean()))


def expected_and_noise(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """The output of a quantized model, and how far it is from the output of the same model in full precision."""
    with torch.no_grad():
        quantized = first(model(**inputs)).float().numpy()
        with full_precision(model):
            plain = first(model(**inputs)).float().numpy()
    return quantized, rms(quantized - plain)
