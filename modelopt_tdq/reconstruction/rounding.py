"""AdaRound (Nagel et al. 2020): whether each weight is rounded up or down is learned.

    w_hat = clip(floor(w / s) + h(v), low, high) * s,    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

h starts at the fraction that rounding cuts off, so w_hat starts at w; the regularisation sum(1 - |2h - 1|^beta)
drives it to 0 or 1.
"""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.fake_quant import code_range

__all__ = ["RoundingQuantizer", "can_learn_rounding", "exponent", "regularization", "rounding_rate"]

_STRETCH, _SHIFT = 1.2, -0.1

#: ModelOpt's own limit, below which a channel counts as zero.
_ZERO_AMAX = 1.0 / (1 << 24)


def can_learn_rounding(quantizer: TensorQuantizer, weight: Tensor) -> bool:
    """Whether the quantizer is an ordinary one of ModelOpt, calibrated, of integers per tensor or per channel."""
    plain = type(quantizer) is TensorQuantizer and quantizer.fake_quant and quantizer.backend is None
    integers = isinstance(quantizer.num_bits, int) and not quantizer.unsigned
    if not plain or not integers or quantizer.block_sizes is not None or quantizer._dynamic:
        return False
    amax = quantizer.amax
    if amax is None or quantizer.rotate_is_enabled or quantizer.bias is not None:
        return False
    return bool(amax.numel() == 1 or (amax.dim() == weight.dim() and amax.numel() == max(amax.shape)))


def rectified(v: Tensor) -> Tensor:
    """h(v), in [0, 1]."""
    return (torch.sigmoid(v) * _STRETCH + _SHIFT).clamp(0.0, 1.0)


def regularization(v: Tensor, beta: float) -> Tensor:
    """Sum over all weights of 1 - |2 h(v) - 1|^beta: a scalar."""
    return (1.0 - (2.0 * rectified(v) - 1.0).abs().pow(beta)).sum()


def exponent(progress: float, warm_up: float, start: float, end: float) -> float | None:
    """Beta of the regularisation, from ``start`` to ``end``; None during the warm-up.

    Args:
        progress: Fraction of the steps that are done.
        warm_up: Fraction of the steps without regularisation.
        start: beta after the warm-up.
        end: beta at the end.
    """
    if progress < warm_up:
        return None
    return end + (start - end) * (1.0 - (progress - warm_up) / (1.0 - warm_up))


def rounding_rate(iterations: int) -> float:
    """Learning rate of Adam that lets a rounding flip within so many steps."""
    return min(0.02, max(0.001, 20.0 / iterations))


class RoundingQuantizer(TensorQuantizer):  # type: ignore[misc]
    """A weight quantizer of ModelOpt whose rounding is learned, and then fixed; made in place, and undone.

    Codes and values are ModelOpt's: ``round(w * (L / amax))``, ``code / (L / amax)``, in float32.

    Attributes:
        _v: The rounding variables while they are learned, of the weight's shape; then None.
        _up: Bool of the weight's shape once they are fixed.
    """

    _v: Tensor | None
    _up: Tensor | None

    @classmethod
    def from_tensor_quantizer(cls, quantizer: TensorQuantizer) -> RoundingQuantizer:
        """Turn a calibrated weight quantizer into one with learned rounding, in place."""
        quantizer.__class__ = cls
        made: RoundingQuantizer = quantizer
        made._v = made._up = None
        return made

    def undo(self) -> None:
        """Become ModelOpt's again."""
        del self._v, self._up
        self.__class__ = TensorQuantizer

    def _steps(self) -> tuple[Tensor, Tensor]:
        """What a weight is multiplied with, and which of its channels are not zero."""
        amax = self._amax.float()
        alive = amax > _ZERO_AMAX
        # a tensor: dividing a number by a tensor rounds twice
        largest = torch.tensor(code_range(self._num_bits)[1], device=amax.device)
        return torch.where(alive, largest / amax, 1.0), alive

    def _values(self, weight: Tensor, fraction: Tensor) -> Tensor:
        factor, alive = self._steps()
        low, high = code_range(self._num_bits)
        if self._narrow_range:
            low = -high
        with torch.no_grad():
            floor = torch.floor(weight.float() * factor)
        return (floor + fraction).clamp(low, high) * alive / factor

    def begin(self, weight: Tensor) -> Tensor:
        """Start to learn; returns the variables, a leaf."""
        factor, _ = self._steps()
        steps = weight.detach().float() * factor
        fraction = steps - torch.floor(steps)
        v = -torch.log(_STRETCH / (fraction - _SHIFT) - 1.0)
        self._v, self._up = v.requires_grad_(), None
        return v

    def finish(self) -> None:
        """Fix the rounding as learned."""
        if self._v is not None:
            self.fix(rectified(self._v.detach()) >= 0.5)

    def fix(self, up: Tensor | None) -> None:
        """Fix the rounding.

        Args:
            up: Bool, of the weight's shape; None: ModelOpt's rounding, to the nearest.
        """
        self._v, self._up = None, up

    def fold(self, weight: nn.Parameter) -> None:
        """Replace the weight by its quantized value, and become ModelOpt's again: its rounding gives the same codes."""
        if self._up is not None:
            # a model that was made in inference mode can be changed there alone
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.copy_(self._values(weight, self._up.float()))
        self.undo()

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        if self._v is not None:
            return self._values(inputs, rectified(self._v)).to(inputs.dtype)
        if self._up is not None:
            return self._values(inputs, self._up.float()).to(inputs.dtype)
        values: Tensor = super()._fake_quantize(inputs)
        return values
