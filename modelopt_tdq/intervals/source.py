"""The interface of interval sources: s(t) for all quantizers of a model at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["IntervalSource", "inverse_softplus"]

#: No interval gets smaller than this; a learned one that would has run away.
SMALLEST = 1e-8


def inverse_softplus(value: Tensor) -> Tensor:
    """The number whose softplus is ``value``, for positive values."""
    return value + torch.log(-torch.expm1(-value))


class IntervalSource(nn.Module):
    """Intervals of Q quantizers as a function of time.

    Args:
        timesteps: [K] float32, the calibrated times, strictly ascending.
    """

    timesteps: Tensor

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps.detach().to(torch.float32).clone())

    def forward(self, time: Tensor) -> Tensor:
        """Intervals at these times.

        Args:
            time: [B] float32, in the model's own units.

        Returns:
            [B, Q] float32, positive.
        """
        raise NotImplementedError

    def static_parameters(self) -> list[nn.Parameter]:
        """Parameters that are scales themselves, for the optimizer group of scales."""
        return []

    def fingerprint(self) -> Tensor:
        """[P] int64, not negative: a number for each parameter, which another value of any of its elements changes.

        The same on every device, as it is computed with integers only; cheap enough for every call of a model.
        """
        return torch.stack([_weighted_bits(parameter) for parameter in self.parameters()])


def _weighted_bits(parameter: Tensor) -> Tensor:
    """Sum of the bits of all elements as float32, each times an odd number of its own, modulo 2^32; below 2^62."""
    bits = parameter.detach().float().reshape(-1).view(torch.int32)
    odd = torch.arange(1, 2 * len(bits), 2, dtype=torch.int32, device=bits.device)
    return (bits * odd).sum(dtype=torch.int64) & ((1 << 62) - 1)


def positive(value: Tensor, softplus: bool) -> Tensor:
    """A positive interval from a learned number: through softplus, or the number itself, bounded from below."""
    return F.softplus(value) if softplus else value.clamp(min=SMALLEST)


def unconstrained(interval: Tensor, softplus: bool) -> Tensor:
    """The learned number that gives ``interval``."""
    return inverse_softplus(interval) if softplus else interval
