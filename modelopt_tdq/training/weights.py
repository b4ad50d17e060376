"""Weights with a learned scale: LSQ (Esser et al. 2020), per tensor or per channel."""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.fake_quant import SUPPORTED_BITS, code_range, fake_quantize
from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.source import SMALLEST

__all__ = ["LearnedWeightQuantizer"]


class LearnedWeightQuantizer(TensorQuantizer):  # type: ignore[misc]
    """A weight quantizer whose scale is a parameter, started at the calibrated one.

    Codes lie in [-L, L] with L = 2^(b-1) - 1: ModelOpt's narrow range, which the quantizer has from then on. The
    gradient of the scale is LSQ's, times 1 / sqrt(elements * L).
    """

    weight_scale: nn.Parameter

    @classmethod
    def from_tensor_quantizer(cls, quantizer: TensorQuantizer, name: str) -> LearnedWeightQuantizer:
        """Turn a calibrated weight quantizer into a learned one in place.

        Raises:
            TdqError: It is not calibrated, or its format is not an integer or FP8 per tensor or channel.
        """
        amax = quantizer.amax
        plain = quantizer.block_sizes is None and not quantizer._dynamic and not quantizer.unsigned
        if amax is None or not plain or quantizer.num_bits not in SUPPORTED_BITS:
            raise TdqError(
                "learn_weights",
                name,
                f"its scale cannot be learned: {quantizer.extra_repr()}",
                'Use integers or FP8 per tensor or per channel, or set "learn_weights": False',
            )
        scale = amax.detach().float() / code_range(quantizer.num_bits)[1]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        quantizer.__class__ = cls
        learned: LearnedWeightQuantizer = quantizer
        learned._learns_weight_scale = learned._narrow_range = True
        del learned._amax
        learned.register_parameter("weight_scale", nn.Parameter(scale.clone()))
        return learned

    def unlearn(self) -> None:
        """Become ModelOpt's calibrated quantizer again, in place, with the scale that it has."""
        amax = self.amax.detach().clone()
        del self._parameters["weight_scale"]
        del self._learns_weight_scale
        self.__class__ = TensorQuantizer
        self.register_buffer("_amax", amax)

    @property
    def scale(self) -> Tensor:
        """The scale in use, of the shape of ModelOpt's amax; float32, positive."""
        return self.weight_scale.float().clamp(min=SMALLEST)

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        scale, largest = self.scale, code_range(self._num_bits)[1]
        if torch.is_grad_enabled():
            factor = (inputs.numel() / scale.numel() * largest) ** -0.5
            scale = scale * factor + (scale * (1 - factor)).detach()
        # the code range of fake_quantize reaches to -L - 1
        return fake_quantize(torch.maximum(inputs, (-largest * scale).to(inputs.dtype)), scale, None, self._num_bits)

    @property
    def amax(self) -> Tensor:
        """Largest magnitude that has a code."""
        return self.scale * code_range(self._num_bits)[1]

    @amax.setter
    def amax(self, value: Tensor | float) -> None:
        scale = torch.as_tensor(value).detach().float() / code_range(self._num_bits)[1]
        with torch.no_grad():
            self.weight_scale.copy_(scale.to(self.weight_scale.device).expand_as(self.weight_scale))
