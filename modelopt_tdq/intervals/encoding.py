"""How a time enters the interval MLP (TDQ, section 4.2 and Table 2 of its supplementary)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["ENCODINGS", "TimeEncoding", "schedule_position"]


def schedule_position(time: Tensor, timesteps: Tensor) -> Tensor:
    """The time counted in calibrated steps, as a fraction of the schedule: 0 at its smallest time, 1 at its largest.

    Linear between two neighbouring times, constant outside. So time means the same whatever the model's unit is
    (0..999, 0..1, sigma), and a schedule that is dense somewhere is resolved there.

    Args:
        time: [B] float32, in the model's own units.
        timesteps: [K] float32, strictly ascending.

    Returns:
        [B] float32 in [0, 1]; zeros if K is 1.
    """
    if timesteps.numel() == 1:
        return torch.zeros_like(time)
    last = timesteps.numel() - 1
    left = (torch.bucketize(time, timesteps, right=True) - 1).clamp(0, last - 1)
    start, end = timesteps[left], timesteps[left + 1]
    fraction = ((time - start) / (end - start)).clamp(0.0, 1.0)
    return (left + fraction) / last


ENCODINGS = ("frequency", "random_fourier", "normalized", "raw")

#: Positions are stretched to this range, that of the DDPM times, for the encodings that expect it.
_TIMES = 999.0


class TimeEncoding(nn.Module):
    """Features of a position in the schedule.

    - ``frequency``: cos and sin of t 10000^(-i/half), the sinusoidal embedding of diffusion models;
    - ``random_fourier``: cos and sin of 2 pi p w with w drawn once from N(0, 4^2) (Tancik et al. 2020);
    - ``normalized``: the position itself, in [0, 1];
    - ``raw``: the position times 999.

    Args:
        kind: One of :data:`ENCODINGS`.
        width: Number of features of the first two, even.
        generator: Draws the random frequencies.
    """

    frequencies: Tensor

    def __init__(self, kind: str, width: int = 128, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.width = width if kind in ("frequency", "random_fourier") else 1
        half = width // 2
        if kind == "frequency":
            frequencies = _TIMES * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
        elif kind == "random_fourier":
            frequencies = 2 * math.pi * 4.0 * torch.randn(half, generator=generator)
        else:
            frequencies = torch.tensor([_TIMES if kind == "raw" else 1.0])
        self.register_buffer("frequencies", frequencies)

    def forward(self, position: Tensor) -> Tensor:
        """[B] positions in [0, 1] to [B, width] float32."""
        phase = position.unsqueeze(1) * self.frequencies
        return phase if self.width == 1 else torch.cat([phase.cos(), phase.sin()], 1)
