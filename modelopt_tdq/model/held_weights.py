"""Quantized weights that are held while a model is called again and again: quantizing them takes longer than a call.

On a CPU, an 860 M parameter U-Net at small latents takes four times as long with its weights quantized in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.quantized_weight import quantized_parts
from modelopt_tdq.model.select import shared_parameters
from modelopt_tdq.model.stored_weight import whole
from modelopt_tdq.model.weight_fit import is_learned, plain_weights

__all__ = ["HeldWeight", "held_weights", "own_weights"]

#: Bytes of quantized weights that are held; the others are quantized in every call.
_MOST = 4 << 30


class HeldWeight(TensorQuantizer):  # type: ignore[misc]
    """A weight quantizer of ModelOpt that gives the values it was told; made in place, and undone."""

    _values: Tensor

    @classmethod
    def from_tensor_quantizer(cls, quantizer: TensorQuantizer, values: Tensor) -> None:
        """Let ``quantizer`` give ``values``, whatever it is given."""
        quantizer.__class__ = cls
        quantizer._values = values

    def release(self) -> Tensor:
        """The values; become ModelOpt's again."""
        values = self._values
        del self._values
        self.__class__ = TensorQuantizer
        return values

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        return whole(self._values).to(inputs.device)


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """In the body, the weights of ``model`` do not change: what they are quantized to is computed once."""
    held: list[HeldWeight] = []
    try:
        left = _MOST
        for weight, quantizer in _constant(model).values():
            left -= weight.nbytes
            if left >= 0:
                HeldWeight.from_tensor_quantizer(quantizer, _quantized(weight, quantizer))
                held.append(quantizer)
        yield
    finally:
        for quantizer in held:
            quantizer.release()


@torch.no_grad()
def _quantized(weight: Tensor, quantizer: TensorQuantizer) -> Tensor:
    values, row = torch.empty_like(weight), 0
    for part in quantized_parts(weight, quantizer, dtype=None):
        values[row : row + len(part)] = part
        row += len(part)
    return values


def _constant(model: nn.Module) -> dict[nn.Module, tuple[Tensor, TensorQuantizer]]:
    """What :func:`own_weights` gives, where hooks bring no other tensors."""
    try:
        require_weights(model, "hold its weights")
    except TdqError:
        return {}
    return own_weights(model)


def own_weights(model: nn.Module, elsewhere: bool = False) -> dict[nn.Module, tuple[Tensor, TensorQuantizer]]:
    """By layer, the weight that no other layer has and its quantizer of ModelOpt, where neither learns.

    Args:
        model: Quantized.
        elsewhere: Those that accelerate or ``fully_shard`` keeps elsewhere, too; see
            :mod:`modelopt_tdq.model.stored_weight`.
    """
    shared = shared_parameters(model)
    return {
        layer: (weight, quantizer)
        for _, layer, weight, quantizer in plain_weights(model, elsewhere)
        if type(quantizer) is TensorQuantizer
        and layer._parameters.get("weight") is weight
        and id(weight) not in shared
        and not is_learned(quantizer)
    }
