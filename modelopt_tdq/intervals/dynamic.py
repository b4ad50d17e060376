"""Dynamic baselines: intervals measured on the activation at every call (TDQ, Table 1 of its supplementary).

They are there to be compared with. A backend would have to read every activation before it can quantize it, so
they do not become a table and are not exported.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from modelopt_tdq.intervals.encoding import TimeEncoding, schedule_position
from modelopt_tdq.intervals.source import SMALLEST, inverse_softplus, positive

__all__ = ["DYNAMIC", "DynamicIntervals"]

#: Rows (a), (b) and (c) of the table.
DYNAMIC = ("dynamic_absmax", "dynamic_statistics", "dynamic_statistics_time")


class DynamicIntervals(nn.Module):
    """The scale of one quantizer, for each sample of an activation.

    - ``dynamic_absmax``: max|x| / L;
    - ``dynamic_statistics``: an MLP on (min, max, mean, var) of the sample, 4-64-64-64-1, softplus;
    - ``dynamic_statistics_time``: the same on the statistics and the encoded time.

    Args:
        kind: One of :data:`DYNAMIC`.
        timesteps: [K] float32, the calibrated times.
        initial: The scale that the generators start at.
        levels: L, the largest code.
        generator: Draws the weights.
    """

    timesteps: Tensor

    def __init__(
        self,
        kind: str,
        timesteps: Tensor,
        initial: float,
        levels: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.levels = kind, levels
        self.register_buffer("timesteps", timesteps.detach().float().clone())
        self.encoding: TimeEncoding | None = None
        if kind == "dynamic_statistics_time":
            self.encoding = TimeEncoding("frequency")
        self.layers: nn.Sequential | None = None
        if kind != "dynamic_absmax":
            widths = [4 + (0 if self.encoding is None else self.encoding.width), 64, 64, 64]
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            output = nn.Linear(64, 1)
            self.layers = nn.Sequential(*layers, output)
            with torch.no_grad():
                for layer in layers:
                    if isinstance(layer, nn.Linear):
                        layer.weight.normal_(0.0, (2.0 / layer.in_features) ** 0.5, generator=generator)
                        layer.bias.zero_()
                output.weight.zero_()
                output.bias.copy_(inverse_softplus(torch.tensor([initial])))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scales [B, 1, ...] of an activation [B, ...] at times [1] or [B], float32."""
        shape = (len(x), *(1,) * (x.dim() - 1))
        flat = x.detach().flatten(1).float()
        if self.layers is None:
            return (flat.abs().amax(1) / self.levels).clamp(min=SMALLEST).reshape(shape)
        features = [torch.stack([flat.amin(1), flat.amax(1), flat.mean(1), flat.var(1)], 1)]
        if self.encoding is not None:
            encoded = self.encoding(schedule_position(time.to(x.device), self.timesteps))
            features.append(encoded.repeat_interleave(len(x) // len(encoded), 0))
        with torch.autocast(x.device.type, enabled=False):
            return positive(self.layers(torch.cat(features, 1)), softplus=True).reshape(shape)
