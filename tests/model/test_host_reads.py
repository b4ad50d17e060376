"""Nothing waits for the device layer by layer: what a call reads back does not grow with the layers."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from modelopt_tdq.lab.bench.gpu.model import static_config
from tests.support.host_reads import host_reads
from tests.support.models import TIMES, fast_config, noise

WIDTH = 8


class Chain(nn.Module):
    """As many layers as wanted, behind each other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * (1 + timestep.reshape(-1, 1, 1) / 1000)
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x


def _loop(model: nn.Module) -> None:
    for seed, time in enumerate(TIMES):
        model(noise(2, 4, WIDTH, seed=seed), torch.tensor(time))


def _reads(layers: int, config: dict[str, Any], time: Tensor, folded: bool = True) -> int:
    torch.manual_seed(0)
    model = mtq.quantize(Chain(layers).eval(), config, _loop)
    if folded:  # ModelOpt looks into the range of each weight before it quantizes it
        mtq.fold_weight(model)
    with torch.no_grad():
        model(noise(2, 4, WIDTH), time)  # what is done once for a model
        with host_reads() as reads:
            model(noise(2, 4, WIDTH), time)
    return reads.count


@pytest.mark.parametrize("fields", [{}, {"bins": 1}, {"asymmetric": True}, {"correction": "per_step"}])
@pytest.mark.parametrize("time", [torch.tensor(500.0), torch.tensor([500.0, 20.0])], ids=["one time", "two times"])
def test_a_quantized_call_reads_nothing_layer_by_layer(fields: dict[str, Any], time: Tensor) -> None:
    assert _reads(2, fast_config(**fields), time) == _reads(6, fast_config(**fields), time) <= 1


def test_with_weights_that_are_quantized_it_reads_less_than_modelopts() -> None:
    ours, theirs = (
        _reads(6, config, torch.tensor(500.0), folded=False) for config in (fast_config(), static_config(fast_config()))
    )
    assert ours <= theirs / 2


def test_a_calibrated_call_reads_no_more_than_modelopts() -> None:
    """Per layer and call; ModelOpt's calibrator of the largest magnitude looks whether that is a number."""

    def reads(layers: int, config: dict[str, Any]) -> int:
        torch.manual_seed(0)
        model = Chain(layers).eval()
        counts: list[int] = []

        def forward_loop(model: nn.Module) -> None:
            for seed, time in enumerate(TIMES):
                with host_reads() as reads:
                    model(noise(2, 4, WIDTH, seed=seed), torch.tensor(time))
                counts.append(reads.count)

        mtq.quantize(model, config, forward_loop)
        return counts[1]  # the first call tells what belongs to a sample

    ours, theirs = (reads(6, config) - reads(2, config) for config in (fast_config(), static_config(fast_config())))
    assert 0 < ours <= theirs
