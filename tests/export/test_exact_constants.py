"""Constants near 0 and 1 stay in the graph, which torch's optimizer would take for 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq

_CONSTANTS = (1e-15, -1e-15, 1e-9, 5e-9, -2e-8, 1e-12, 0.0, 1.0, 1 + 1e-6, 1 - 5e-6, 1 + 9e-6, -1.0)
_OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda x, c: x + c,
    "left add": lambda x, c: c + x,
    "sub": lambda x, c: x - c,
    "left sub": lambda x, c: c - x,
    "mul": lambda x, c: x * c,
    "div": lambda x, c: x / c if c else x,
    "clamp": lambda x, c: x.clamp(min=c),
    "maximum": lambda x, c: torch.maximum(x, torch.tensor(c)),
    "pow": lambda x, c: (x.abs() + 1.0) ** c,
    "where": lambda x, c: torch.where(x > c, x, torch.tensor(c)),
    "scalar add": lambda x, c: x.sum() + c,
    "scalar mul": lambda x, c: x.sum() * c,
}


class Every(nn.Module):
    """Every operator with every constant, on what a layer gives: an output for each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        x = self.layer(sample) * 1e-9 * timestep  # so small that the smallest constants matter

        def outputs(operator: Callable[[Tensor, float], Tensor]) -> Tensor:
            found = [operator(x, c).reshape(-1) / (abs(c) if 0 < abs(c) < 0.5 else 1e-9) for c in _CONSTANTS]
            return torch.cat([*found, self.layer(sample).reshape(-1)])

        return tuple(map(outputs, _OPERATORS.values()))


@torch.no_grad()
def test_every_operator_keeps_every_constant(tmp_path: Path) -> None:
    sample, time = torch.randn(2, 8), torch.tensor([3.0])
    config = tdq.make_config(high_precision=(), progress=False, protect_steps=False)
    model = mtq.quantize(Every().eval(), config, lambda m: [m(sample, torch.tensor([t])) for t in (1.0, 3.0, 5.0)])
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": sample, "timestep": time}, lowering="reference")
    found = tdq.open_session(tmp_path / "m.onnx")({"sample": sample, "timestep": time})
    for name, output, expected in zip(_OPERATORS, found.values(), model(sample, time), strict=True):
        np.testing.assert_allclose(output, expected.numpy(), rtol=2e-5, atol=2e-5, err_msg=name)


@torch.no_grad()
def test_a_division_by_a_sum_that_is_zero(tmp_path: Path) -> None:
    """Linear attention: the small number keeps 0 / 0 from being NaN."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            y = torch.relu(self.a(sample) + timestep.reshape(-1, 1) * 0 - 5)
            return y / (y.sum(-1, keepdim=True) + 1e-15)

    model, x, t = Attention().eval(), torch.randn(2, 8), torch.tensor([3.0])
    mtq.quantize(model, tdq.make_config(progress=False), lambda m: [m(x, torch.tensor([k])) for k in (1.0, 3.0, 5.0)])
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": x, "timestep": t})
    assert float(np.abs(tdq.open_session(tmp_path / "m.onnx")({"sample": x, "timestep": t})["output"]).max()) == 0.0
