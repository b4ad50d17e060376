"""Activation quantization schemes: how x_hat depends on a learned interval while training, and what is deployed.

In all of them ``L`` is the largest code, and ``interval`` is what a source makes a function of time: the scale for
LSQ, the clipping value a = L s for the others. A shifted quantizer (outputs of SiLU) has a ``zero``, the number of
steps by which its codes are shifted: offset = zero * s, so that zero keeps a code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from modelopt_tdq.core.fake_quant import NumBits, code_range, dequantize, fake_quantize
from modelopt_tdq.core.scales import Scales
from modelopt_tdq.intervals.source import inverse_softplus

__all__ = ["SCHEMES", "Deployed", "Scheme"]


class Deployed(Scales):
    """What a learned interval becomes, all of the interval's shape."""

    __slots__ = ()

    def __call__(self, x: Tensor, num_bits: NumBits) -> Tensor:
        """Fake quantization in the deployed form."""
        return fake_quantize(x, self.scale, self.offset, num_bits, self.dequant_scale, self.dequant_offset)


def _levels(num_bits: NumBits) -> float:
    return code_range(num_bits)[1]


def _bounds(deployed: Deployed, num_bits: NumBits) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that has a code."""
    low, high = code_range(num_bits)
    return (dequantize(torch.full_like(deployed.scale, code), deployed.scale, deployed.offset) for code in (low, high))  # type: ignore[return-value]


class Scheme:
    """LSQ (Esser et al. 2020): the straight-through gradient of the scale, times 1 / sqrt(elements * L)."""

    #: Whether static intervals are learned through softplus.
    softplus = False

    def interval(self, scale: Tensor, num_bits: NumBits) -> Tensor:
        """The interval that stands for a calibrated scale."""
        return scale

    def further(self, scale: float, zero: float, num_bits: NumBits) -> dict[str, Tensor]:
        """Initial values of further learned parameters of one quantizer, static in time; [1] each."""
        return {}

    def deployed(self, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]) -> Deployed:
        """Scale and offset, and those of the way back where they differ."""
        return Deployed(interval, interval * zero if zero else None)

    def train(
        self, x: Tensor, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]
    ) -> Tensor:
        """x_hat while training, with the scheme's gradient.

        Args:
            x: [B, ...].
            interval: [1] or [B, 1, ...], positive.
            zero: Shift of the codes, in steps.
            num_bits: Format of the codes.
            further: From :meth:`further`, as learned so far.
        """
        elements = x.numel() / max(1, interval.numel())
        factor = (elements * _levels(num_bits)) ** -0.5
        interval = interval * factor + (interval * (1 - factor)).detach()
        return self.deployed(interval, zero, num_bits, further)(x, num_bits)

    def penalty(self, interval: Tensor) -> Tensor | None:
        """What the scheme adds to the loss for an interval, before its weight; None if nothing."""
        return None


class _Clipping(Scheme):
    """Schemes that learn the clipping value a = L s."""

    def interval(self, scale: Tensor, num_bits: NumBits) -> Tensor:
        return scale * _levels(num_bits)

    def deployed(self, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]) -> Deployed:
        scale = interval / _levels(num_bits)
        return Deployed(scale, scale * zero if zero else None)


class Pact(_Clipping):
    """PACT (Choi et al. 2018): the clipping value gets the gradient of the clipped elements only, and an L2 penalty."""

    def train(
        self, x: Tensor, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]
    ) -> Tensor:
        deployed = self.deployed(interval, zero, num_bits, further)
        clipped = torch.clamp(x.float(), *_bounds(deployed, num_bits))
        with torch.no_grad():
            rounded = deployed(clipped, num_bits)
        return (rounded + (clipped - clipped.detach())).to(x.dtype)

    def penalty(self, interval: Tensor) -> Tensor:
        return interval.square().mean(0).sum()


class Nipq(_Clipping):
    """NIPQ (Shin et al. 2023): noise in place of rounding, drawn from the rounding errors of the tensor itself."""

    softplus = True

    def train(
        self, x: Tensor, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]
    ) -> Tensor:
        deployed = self.deployed(interval, zero, num_bits, further)
        low, high = _bounds(deployed, num_bits)
        x32 = x.float()
        clipped = torch.clamp(x32, low, high)
        with torch.no_grad():
            errors = (deployed(clipped, num_bits) - clipped) / deployed.scale
            drawn = errors.flatten()[torch.randint(errors.numel(), errors.shape, device=x.device)]
            noise = drawn * ((x32 >= low) & (x32 <= high))
        return (clipped + noise * deployed.scale).to(x.dtype)


class NipqRounding(_Clipping):
    """NIPQ after its noise: rounding, with LSQ's gradient."""

    softplus = True


class Duq(_Clipping):
    """DuQ (Shin et al. 2023): different learned scales before and after rounding; a follows time, c does not."""

    softplus = True

    def further(self, scale: float, zero: float, num_bits: NumBits) -> dict[str, Tensor]:
        return {"output": inverse_softplus(torch.tensor([scale * _levels(num_bits)]))}

    def deployed(self, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]) -> Deployed:
        plain = super().deployed(interval, zero, num_bits, further)
        output = (F.softplus(further["output"]) / _levels(num_bits)).expand_as(interval)
        return Deployed(plain.scale, plain.offset, output, output * zero if zero else torch.zeros_like(output))

    def train(
        self, x: Tensor, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]
    ) -> Tensor:
        return self.deployed(interval, zero, num_bits, further)(x, num_bits)


class Qil(_Clipping):
    """QIL (Jung et al. 2019): codes between two learned ends; the width follows time, the lower end does not.

    One-sided where the quantizer is shifted: x <= p becomes 0, and p >= 0, so that zero stays zero. Two-sided
    without a dead zone (p = 0) otherwise: with one, no single QuantizeLinear could hold it. The output in [0, 1] or
    [-1, 1] is brought back to the range of x by a learned factor, which the paper leaves to the next layer.
    """

    softplus = True

    def further(self, scale: float, zero: float, num_bits: NumBits) -> dict[str, Tensor]:
        further = {"output": inverse_softplus(torch.tensor([scale]))}
        if zero:
            further["lower"] = torch.tensor([0.0])
        return further

    def deployed(self, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]) -> Deployed:
        scale = interval / _levels(num_bits)
        output = F.softplus(further["output"]).expand_as(interval)
        if not zero:
            return Deployed(scale, None, output, torch.zeros_like(output))
        low = code_range(num_bits)[0]
        return Deployed(scale, further["lower"].clamp(min=0.0) - low * scale, output, -low * output)

    def train(
        self, x: Tensor, interval: Tensor, zero: float, num_bits: NumBits, further: Mapping[str, Tensor]
    ) -> Tensor:
        return self.deployed(interval, zero, num_bits, further)(x, num_bits)


#: By the name in the algorithm config; and what ``stop_noise`` turns NIPQ into.
SCHEMES: dict[str, Scheme] = {
    "lsq": Scheme(),
    "pact": Pact(),
    "nipq": Nipq(),
    "nipq_rounding": NipqRounding(),
    "duq": Duq(),
    "qil": Qil(),
}
