"""Evidence from a layer's output, however the layer is called and whether it runs at every time."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import loop
from torch import Tensor, nn

import modelopt_tdq as tdq

TIMES = (0.0, 990.0, 1000.0)


class _Layers(nn.Module):
    """A linear layer and a convolution, with inputs whose range moves 10 times with the time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.nn.functional.silu(sample) * (1 + 9 * timestep / 1000)
        return self.run(x, timestep)

    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        image = self.linear(x).reshape(len(x), 1, 4, 4)
        return self.conv(image).flatten(1)


class _ByKeyword(_Layers):
    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        image = self.linear(input=x).reshape(len(x), 1, 4, 4)
        return self.conv(input=image).flatten(1)


class _OneByOne(_Layers):
    """Vectors [C] and images [C, H, W], without a batch dimension."""

    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.stack([self.conv(self.linear(row).reshape(1, 4, 4)).flatten() for row in x])


class _NotAlways(_Layers):
    """The convolution does not run at time 990."""

    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        image = self.linear(x).reshape(len(x), 1, 4, 4)
        return image.flatten(1) if timestep == 990 else self.conv(image).flatten(1)


class _NotWhenReplayed(_Layers):
    """The convolution runs in calibration, but in no call that is made again."""

    calls = 0

    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        image = self.linear(x).reshape(len(x), 1, 4, 4)
        return image.flatten(1) if self.calls > len(TIMES) else self.conv(image).flatten(1)


def _table(kind: type[_Layers], **fields: Any) -> tdq.ScaleTable:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 16, generator=generator), torch.tensor(t)) for t in TIMES]
    settings = {"statistic": "output", "smoothing": 0.0, "weights": "max", "protect_steps": False}
    settings |= {"correction": "none", "progress": False}
    config = tdq.make_config(8, 4, high_precision=(), **{**settings, **fields})
    model = mtq.quantize(copy.deepcopy(kind()).eval(), config, loop(data))
    return tdq.scale_table(model)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", [_ByKeyword, _OneByOne])
def test_the_same_scales_however_a_layer_is_called(kind: type[_Layers], asymmetric: bool) -> None:
    expected, found = _table(_Layers, asymmetric=asymmetric), _table(kind, asymmetric=asymmetric)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0.0)
    assert (found.offset is None) == (expected.offset is None) == (not asymmetric)
    if found.offset is not None and expected.offset is not None:
        torch.testing.assert_close(found.offset, expected.offset, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("statistic", ["output", "max"])
def test_a_layer_that_does_not_run_at_a_time_has_the_scale_of_the_nearest_time(statistic: str) -> None:
    """Nearest in time, though its row lies as far as the other one."""
    table = _table(_NotAlways, statistic=statistic)
    scale = table.scale[:, table.names.index("conv.input_quantizer")]
    assert scale[1] == scale[2] != scale[0]


def test_a_layer_that_does_not_run_again_has_the_scales_of_its_own_activation() -> None:
    column = [_table(kind, statistic=s) for kind, s in ((_NotWhenReplayed, "output"), (_NotWhenReplayed, "mse"))]
    index = column[0].names.index("conv.input_quantizer")
    assert torch.equal(column[0].scale[:, index], column[1].scale[:, index])
