"""A quantized model as if it were not: every quantizer passes its input on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

__all__ = ["full_precision"]


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """All quantizers of ``model`` pass their input on (ModelOpt's pre-quantization scales stay active)."""
    changed = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled and m._if_quant]
    for quantizer in changed:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer in changed:
            quantizer.enable_quant()
