"""The TDQ module: a small MLP per quantizer from the encoded time to its interval, all of a model as one batch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from modelopt_tdq.intervals.encoding import TimeEncoding, schedule_position
from modelopt_tdq.intervals.source import IntervalSource, inverse_softplus

__all__ = ["INITIALIZATIONS", "MlpIntervals"]

INITIALIZATIONS = ("he", "xavier", "zero", "gaussian")


def _initialize(weight: Tensor, kind: str, generator: torch.Generator | None) -> None:
    """Fill [Q, in, out] weights, the same distribution for every quantizer."""
    _, inputs, outputs = weight.shape
    if kind == "he":
        weight.normal_(0.0, (2.0 / inputs) ** 0.5, generator=generator)
    elif kind == "xavier":
        bound = (6.0 / (inputs + outputs)) ** 0.5
        weight.uniform_(-bound, bound, generator=generator)
    elif kind == "gaussian":
        weight.normal_(0.0, 1.0, generator=generator)
    else:
        weight.zero_()


class MlpIntervals(IntervalSource):
    """s(t) = softplus(MLP(encoding(t))), one MLP per quantizer (TDQ, section 4.2).

    The output layer starts with zero weights and the bias softplus^-1(initial), so every interval starts at its
    calibrated value. ReLU between the layers, dropout before the last.

    Args:
        timesteps: [K] float32, the calibrated times.
        initial: [Q] float32, positive.
        encoding: See :class:`TimeEncoding`.
        hidden: Width.
        layers: Linear layers, the output layer included.
        dropout: Probability.
        initialization: Of the hidden layers' weights, one of :data:`INITIALIZATIONS`. With ``zero``, no hidden unit
            ever becomes active, and what is learned is one static value through softplus.
        generator: Draws the weights.
    """

    def __init__(
        self,
        timesteps: Tensor,
        initial: Tensor,
        encoding: str = "frequency",
        hidden: int = 64,
        layers: int = 4,
        dropout: float = 0.2,
        initialization: str = "he",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(timesteps)
        quantizers = len(initial)
        self.encoding = TimeEncoding(encoding, generator=generator)
        self.dropout = dropout
        widths = [self.encoding.width, *[hidden] * (layers - 1), 1]
        self.weights = nn.ParameterList(torch.zeros(quantizers, a, b) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(quantizers, 1, b) for b in widths[1:])
        with torch.no_grad():
            for weight in list(self.weights)[:-1]:
                _initialize(weight, initialization, generator)
            self.biases[-1].copy_(inverse_softplus(initial.float()).reshape(quantizers, 1, 1))

    def forward(self, time: Tensor) -> Tensor:
        """See :class:`IntervalSource`; computed in float32 under autocast too."""
        with torch.autocast(time.device.type, enabled=False):
            h = self.encoding(schedule_position(time, self.timesteps))
            h = h.expand(len(self.weights[0]), *h.shape)  # [Q, B, features]
            last = len(self.weights) - 1
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                if layer == last:
                    h = F.dropout(h, self.dropout, self.training)
                h = torch.baddbmm(bias, h, weight)
                if layer < last:
                    h = h.relu()
            return F.softplus(h).squeeze(2).T
