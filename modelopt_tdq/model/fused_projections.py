"""Fusing the projections of attentions after quantization: refused, as it leaves the quantized layers behind.

``fuse_qkv_projections`` of diffusers makes a new linear layer of the weights of ``to_q``, ``to_k`` and ``to_v``. That
one has no quantizers, and its weights are those of the layers without what their quantizers divide by. So the model
would compute in floating point, or with wrong numbers where channels are smoothed. Taking it apart again leaves the
quantized layer behind in the same way.
"""

from __future__ import annotations

from typing import Any, NoReturn

from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from modelopt_tdq.errors import TdqError

__all__ = ["refuse_fusing"]

#: Of the models and of their attentions.
_METHODS = ("fuse_qkv_projections", "unfuse_qkv_projections", "fuse_projections", "unfuse_projections")


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise TdqError(
        "fuse_qkv_projections",
        "after quantization",
        "fusing the projections of an attention, or taking them apart, makes layers without quantizers",
        "Load the model again, call fuse_qkv_projections() first and quantize then",
    )


def refuse_fusing(model: nn.Module) -> None:
    """From now on, let diffusers' methods for it raise a :class:`TdqError`; harmless when done before.

    A copy of the model refuses it, too.

    Args:
        model: The root. Without quantized layers, it stays as it is.
    """
    if not any(isinstance(module, QuantModule) for module in model.modules()):
        return
    for module in model.modules():
        for name in _METHODS:
            if callable(getattr(type(module), name, None)):
                setattr(module, name, _refuse)
