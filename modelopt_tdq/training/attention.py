"""Attention of diffusers models that can be trained.

While ModelOpt's quantized attention runs, it replaces ``scaled_dot_product_attention`` by a function for its ONNX
export that has no backward. A model that learns gets one that quantizes the same operands and calls PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["leave_attention", "make_attention_trainable"]

_NAME = "scaled_dot_product_attention"
_plain = F.scaled_dot_product_attention

#: The attribute in which ModelOpt keeps what a module replaces while it runs: (package, name, function).
_REPLACED = "_functionals_to_replace"


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    query, key, value = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key), module.v_bmm_quantizer(value)
    output: Tensor = module.bmm2_output_quantizer(_plain(query, key, value, *args, **kwargs))
    return output


class _TrainableFunctionals:
    """ModelOpt's list with that one function replaced; an object without state, so that models stay copyable."""

    def __iter__(self) -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
        from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention

        for package, name, function in _QuantAttention._functionals_to_replace:
            yield package, name, _attention if name == _NAME else function


def make_attention_trainable(model: nn.Module) -> None:
    """Let gradients through the attention of ``model``; does nothing where there is none."""
    for module in model.modules():
        names = {entry[1] for entry in getattr(module, _REPLACED, ())}
        if _NAME in names and hasattr(module, "bmm2_output_quantizer"):
            setattr(module, _REPLACED, _TrainableFunctionals())


def leave_attention(model: nn.Module) -> None:
    """Undo :func:`make_attention_trainable`."""
    for module in model.modules():
        if isinstance(vars(module).get(_REPLACED), _TrainableFunctionals):
            delattr(module, _REPLACED)
